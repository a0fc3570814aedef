"""Our sampling and training steps against TRL's own trainers, bf16 against float32, two threads against one.

    python benchmarks/language.py [MODEL] [--repeats 5] [--prompts 16] [--samples 16] [--tokens N] [--json]

MODEL is a hub id, a folder or a .gguf file, on `letter-word`; by default the tiny base, untrained: its speed is the
trained one's. Both sides of a comparison take the same prompts, lengths, group size, reward and optimiser settings, and
run in turns, so that what else the machine does hits both; a ratio is the median of the turns' ratios. The first step
of a run is not timed. Aim: our steps take no longer than TRL's. One thread, but where two are compared.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from rlrazor.experiments.language import tiny, trainers
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.methods import METHODS
from rlrazor.experiments.language.suites import lm_eval_suite, tiny_suite
from rlrazor.experiments.language.tasks import LETTERS_TASK, Task, find_task
from rlrazor.experiments.language.trainers import offline
from rlrazor.experiments.language.trainers.common import arguments_of
from rlrazor.lm import compute, encoding, sampling
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.prior import PriorTasks

TIMED = 5  # steps of a run, after one to warm up
TEST_PROMPTS, SAMPLES_MEASURED = 256, 4  # of the measured checkpoint, as in the preset `tiny`
PRIOR_ITEMS = 32


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, or of a call, and the tokens that it sampled or trained on."""

    seconds: float
    tokens: float = 0.0


Way = Callable[[], Timing]


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same; the ratio is the first's time over the second's."""

    title: str
    ways: Mapping[str, Way]


@dataclass(frozen=True)
class Workload:
    """A model, prompts and demonstrations, and the settings of the steps that are timed."""

    lm: LanguageModel
    task: Task
    prompts: Prompts
    examples: Sequence[trainers.Example]
    settings: trainers.Settings
    sft_batch: int

    @classmethod
    def of(cls, source: str, prompts: int, samples: int, tokens: int | None, sft_batch: int) -> "Workload":
        """The tiny model and its task, or the model of that name with `letter-word`."""
        if source == "tiny":
            lm, task = LanguageModel.in_memory(tiny.make_model(0), tiny.make_tokenizer(), source), LETTERS_TASK
        else:
            lm, task = load(source), find_task("letter-word")
        task = task.limited(tokens or 0)
        found = Prompts.of(task, task.load(None).train[: (TIMED + 1) * max(prompts, sft_batch)], lm)
        examples = [
            trainers.Example(ids, encoding.completion_ids(lm.tokenizer, item.demonstration or "", task.form.stop))
            for item, ids in zip(found.items, found.ids, strict=True)
        ]
        updates = trainers.Updates(
            lr=1e-5, schedule="constant", steps=TIMED + 1, warmup_steps=0, batch_size=prompts, kl_coef=0.0, seed=0
        )
        ends = encoding.stop_ids(lm.tokenizer, lm.model)  # the end-of-sequence tokens alone, at which TRL stops too
        settings = trainers.Settings(updates, trainers.Samples(samples, task.form.max_new_tokens, ends))
        return cls(lm, task, found, examples, settings, sft_batch)

    def sample(self) -> Timing:
        """A group for each prompt, by `lm.sampling`."""
        drawn = self.settings.samples
        start = clock()
        how = sampling.Sampling(drawn.max_new_tokens, drawn.stop_ids, self.lm.tokenizer.pad_token_id, drawn.group_size)
        completions = sampling.sample(self.lm.model, self.prompts.ids[: self.settings.updates.batch_size], how)
        return Timing(clock() - start, sum(map(len, completions)))

    def generate(self, trainer: Any) -> Timing:
        """The same by transformers' `generate`, as TRL's trainer calls it."""
        group = self.settings.samples.group_size
        asked = self.prompts.ids[: self.settings.updates.batch_size]
        start = clock()
        completions, _ = trainer._generate_single_turn(
            [list(ids) for ids in asked for _ in range(group)], None, {}, group
        )
        return Timing(clock() - start, sum(map(len, completions)))

    def ours(self, name: str, *, bf16: bool = False) -> Timing:
        """A step of `trainers.train`."""
        updates = replace(self.settings.updates, bf16=bf16, batch_size=self._rows(name))
        settings, reward, ends = replace(self.settings, updates=updates), Reward(), list[float]()
        model = copy.deepcopy(self.lm.model).requires_grad_(True)
        job = trainers.Job(
            METHODS[name], settings, model, self.lm.tokenizer, self.examples, None, lambda _, of: reward(of)
        )
        trainers.train(job, lambda *_: ends.append(clock()))
        return self._step(name, ends, reward)

    def trl(self, name: str) -> Timing:
        """A step of TRL's own trainer."""
        ends = list[float]()
        trainer, reward = self.trl_trainer(name)
        trainer.add_callback(StepEnds(ends))
        trainer.train()
        return self._step(name, ends, reward)

    def trl_trainer(self, name: str) -> tuple[Any, "Reward"]:
        """TRL's trainer with the arguments of ours, and the reward it calls."""
        model, tokenizer, settings = copy.deepcopy(self.lm.model).requires_grad_(True), self.lm.tokenizer, self.settings
        reward = Reward()
        if name == "sft":
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    **arguments_of(settings, self.sft_batch),
                    dataset_kwargs={"skip_prepare_dataset": True},
                    max_length=None,
                ),
                train_dataset=Dataset.from_list(
                    [offline.labelled(example.prompt, example.completion) for example in self.examples]
                ),
                processing_class=tokenizer,
            )
        else:
            trainer = GRPOTrainer(
                model=model,
                args=GRPOConfig(
                    **arguments_of(settings, settings.updates.batch_size * settings.samples.group_size),
                    steps_per_generation=1,
                    num_generations=settings.samples.group_size,
                    max_completion_length=settings.samples.max_new_tokens,
                    loss_type="grpo",
                ),
                reward_funcs=reward.of_trl,
                train_dataset=Dataset.from_list([{"prompt": item.prompt} for item in self.prompts.items]),
                processing_class=tokenizer,
            )
        trainer.remove_callback(PrinterCallback)
        return trainer, reward

    def _rows(self, name: str) -> int:
        return self.sft_batch if name == "sft" else self.settings.updates.batch_size

    def _step(self, name: str, ends: Sequence[float], reward: "Reward") -> Timing:
        """From the ends of steps: the mean of those after the first."""
        lengths = [len(example.prompt) + len(example.completion) for example in self.examples]
        tokens = self.sft_batch * statistics.mean(lengths) if name == "sft" else reward.tokens / len(ends)
        return Timing((ends[-1] - ends[0]) / (len(ends) - 1), tokens)

    def measure(self, data_mirror: Path | None) -> tuple[Callable[[], object], float]:
        """What measures a checkpoint as a run does, and the seconds that the base's side of it took, once."""
        if self.lm.source == "tiny":
            suite = tiny_suite()
        else:
            suite = lm_eval_suite(PriorTasks(["hellaswag"], PRIOR_ITEMS, data_mirror))
        start = clock()
        test = Prompts.of(self.task, self.task.load(None).test[:TEST_PROMPTS], self.lm)
        reference = Reference(self.lm, [Asked(self.lm, self.task, test, suite, SAMPLES_MEASURED, "sampled")], suite)
        seconds = clock() - start
        tuned = copy.deepcopy(self.lm.model)
        return (lambda: reference.checkpoint("benchmark", 1, 0.0, tuned, frozen=self.lm.model)), seconds


class Reward:
    """1 for a completion whose first token has an even id, which half of an untrained model's have; counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[float | None]:
        """A reward per completion, given as token ids."""
        self.tokens += sum(map(len, completions))
        return [float(completion[0] % 2 == 0) for completion in completions]

    def of_trl(self, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        """The same, as TRL calls it."""
        return self(completion_ids)


class StepEnds(TrainerCallback):  # type: ignore[misc]
    """Notes when steps end."""

    def __init__(self, ends: list[float]) -> None:
        self.ends = ends

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by transformers."""
        self.ends.append(clock())


def clock() -> float:
    """Seconds, with the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def with_threads(threads: int, call: Way) -> Timing:
    """The call with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def timed(call: Callable[[], object]) -> Timing:
    start = clock()
    call()
    return Timing(clock() - start)


def comparisons(work: Workload) -> list[Comparison]:
    trainer, _ = work.trl_trainer("grpo")
    found = [
        Comparison("sampling", {"lm.sampling": work.sample, "TRL's generate": partial(work.generate, trainer)}),
        *(
            Comparison(f"step of {name}", {"ours": partial(work.ours, name), "TRL's": partial(work.trl, name)})
            for name in ("grpo", "sft")
        ),
        *(
            Comparison(
                f"step of {name}",
                {"bf16": partial(work.ours, name, bf16=True), "float32": partial(work.ours, name)},
            )
            for name in ("grpo", "sft")
        ),
    ]
    if not torch.cuda.is_available():
        calls: dict[str, Way] = {
            "sampling": work.sample,
            "step of grpo": partial(work.ours, "grpo"),
            "step of sft": partial(work.ours, "sft"),
        }
        for title, call in calls.items():
            threads = {"two threads": 2, "one thread": 1}
            ways = {name: partial(with_threads, number, call) for name, number in threads.items()}
            found.append(Comparison(title, ways))
    return found


def in_turns(comparison: Comparison, repeats: int) -> dict[str, list[Timing]]:
    """Every way's timings; who goes first alternates."""
    found: dict[str, list[Timing]] = {name: [] for name in comparison.ways}
    for call in comparison.ways.values():
        call()  # what is compiled, cached or allocated the first time
    for turn in range(repeats):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            found[name].append(comparison.ways[name]())
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """Seconds and tokens per second of each way, and the ratio of the first's seconds to the second's."""
    first, second = timings.values()
    return {
        "ways": {
            name: {
                "seconds": spread([timing.seconds for timing in of_way]),
                "tokens_per_second": spread([timing.tokens / timing.seconds for timing in of_way]),
            }
            for name, of_way in timings.items()
        },
        "ratio": spread([a.seconds / b.seconds for a, b in zip(first, second, strict=True)]),
    }


def processor() -> str:
    """The processor's name where the system tells, and the GPU's."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def shown(of: dict[str, float], digits: int) -> str:
    return f"{of['median']:,.{digits}f} ({of['low']:,.{digits}f}–{of['high']:,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each comparison (default: 5)")
    parser.add_argument("--prompts", type=int, default=16, help="of a sampling call and a step of GRPO (default: 16)")
    parser.add_argument("--samples", type=int, default=16, help="of each prompt (default: 16)")
    parser.add_argument("--tokens", type=int, help="of a completion at most (default: the task's)")
    parser.add_argument("--sft-batch", type=int, default=64, help="sequences of a step of SFT (default: 64)")
    parser.add_argument("--data-mirror", type=Path, metavar="DIR", help="where MODEL's prior task, HellaSwag, is read")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()

    compute.prepare_process()
    warnings.simplefilter("ignore")  # the libraries' advice to each other
    transformers.utils.logging.set_verbosity_error()
    work = Workload.of(arguments.model, arguments.prompts, arguments.samples, arguments.tokens, arguments.sft_batch)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        work = replace(work, settings=replace(work.settings, saving=trainers.Saving(folder=Path(folder))))
        found = {}
        with Console(stderr=True).status("") as status:
            for comparison in comparisons(work):
                title = f"{comparison.title}: {', '.join(comparison.ways)}"
                status.update(title)
                found[title] = summary(in_turns(comparison, arguments.repeats))
            status.update("measuring a checkpoint")
            measure, base_seconds = work.measure(arguments.data_mirror)
            measure()
            checkpoint = spread([timed(measure).seconds for _ in range(arguments.repeats)])
    results = {
        "machine": processor(),
        "load_before": load_before,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
        "model": arguments.model,
        "parameters": sum(weight.numel() for weight in work.lm.model.parameters()),
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "tokens": work.settings.samples.max_new_tokens,
        "sft_batch": arguments.sft_batch,
        "repeats": arguments.repeats,
        "comparisons": found,
        "checkpoint_seconds": checkpoint,
        "reference_seconds": base_seconds,
    }
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


def show(results: dict[str, Any]) -> None:
    console = Console()
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    console.print(
        f"{results['machine']}; load {results['load_before']:.1f} at the start; {versions}.\n"
        f"{results['model']}, {results['parameters']:,} parameters. {results['prompts']} prompts x {results['samples']}"
        f" completions of up to {results['tokens']} tokens; SFT on {results['sft_batch']} sequences. "
        f"Medians of {results['repeats']}, and the range.",
        highlight=False,
    )
    table = Table(box=SIMPLE)
    for column in ("", "ms", "tokens/s", "time ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for title, comparison in results["comparisons"].items():
        what = title.partition(":")[0]
        for position, (name, of) in enumerate(comparison["ways"].items()):
            milliseconds = {key: 1e3 * value for key, value in of["seconds"].items()}
            table.add_row(
                f"{what}: {name}",
                shown(milliseconds, 0),
                f"{of['tokens_per_second']['median']:,.0f}",
                "" if position else shown(comparison["ratio"], 2),
                end_section=bool(position),
            )
    checkpoint = {key: 1e3 * value for key, value in results["checkpoint_seconds"].items()}
    table.add_row("measuring a checkpoint", shown(checkpoint, 0), "", "")
    table.add_row("the base's side of it, once", f"{1e3 * results['reference_seconds']:,.0f}", "", "")
    console.print(table)


if __name__ == "__main__":
    main()
