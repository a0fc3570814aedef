"""What ForgettingMonitor costs, at its default setting: seconds of training with it and without it, in turns.

    python benchmarks/monitor.py                                   # the tiny model, 192 steps of SFT
    python benchmarks/monitor.py SmolLM2-135M-Instruct.Q4_1.gguf   # a real one, 40 steps on 64-token sequences

Both trainings start from the same weights and see the same batches. Overhead: the time with the monitor over the time
without it, minus 1, of the medians; and apart from it, what computing the base's side takes once, before training,
without a cache. Run it on an idle machine.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from rlrazor.lm import compute

compute.prepare_process()

from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from rlrazor.experiments.language import tiny  # noqa: E402
from rlrazor.experiments.language.tasks import LETTERS_TASK, Item, find_task  # noqa: E402
from rlrazor.guard import ForgettingMonitor, Measuring  # noqa: E402
from rlrazor.lm import encoding  # noqa: E402
from rlrazor.lm.models import LanguageModel, load  # noqa: E402
from rlrazor.lm.probes import GenericText, ProbeSettings  # noqa: E402
from rlrazor.lm.prompts import encode  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a hub id, a folder or a .gguf file; by default the tiny one")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: 192 of the tiny model, 40 of another")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.model is None:
        lm = LanguageModel.in_memory(tiny.make_model(0), tiny.make_tokenizer(), "tiny")
        task, batch, steps = LETTERS_TASK, 64, arguments.steps or 192
        generic, settings = GenericText(prompts=tuple(tiny.probe_prompts())), ProbeSettings(5, 4, (";",), chat=False)
    else:
        lm = load(arguments.model)
        task, batch, steps = find_task("letter-word"), 8, arguments.steps or 40
        generic, settings = GenericText.built_in(), ProbeSettings(32)
    lm.model.requires_grad_(True)
    splits = task.load(None)
    rows = [_row(lm, item) for item in splits.train]
    prompts = [item.prompt for item in splits.test[:256]]
    plain, watched, setups, watchings = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.turns):
            plain.append(_seconds(lm, rows, batch, steps, Path(folder), []))
            measuring = Measuring(generic, settings, cache_dir=Path(folder) / f"cache-{turn}")
            monitor = ForgettingMonitor(prompts, measuring=measuring)
            watched.append(_seconds(lm, rows, batch, steps, Path(folder), [monitor]))
            setups.append(monitor.setup_seconds)
            watchings.append(monitor)
    last = watchings[-1]
    plan = None if last.schedule is None else last.schedule.plan
    print(
        json.dumps(
            {
                "model": lm.source,
                "steps": steps,
                "turns": arguments.turns,
                "seconds_without": [round(value, 2) for value in plain],
                "seconds_with": [round(value, 2) for value in watched],
                "overhead": round(median(watched) / median(plain) - 1, 4),
                "measuring_share": round(
                    median(sum(reading.seconds for reading in one.readings) for one in watchings) / median(plain), 4
                ),
                "measurements": len(last.readings),
                "every": None if plan is None else plan.every,
                "probe_fraction": None if plan is None else round(plan.fraction, 3),
                "base_side_seconds": round(median(setups), 2),
            },
            indent=1,
        )
    )


def _row(lm: LanguageModel, item: Item) -> dict[str, Any]:
    """Tokens, so that both trainings see the same and TRL has nothing to prepare."""
    [prompt] = encode(lm.tokenizer, [item.prompt], chat=lm.source != "tiny")
    completion = encoding.completion_ids(lm.tokenizer, item.demonstration or "", (";",) if lm.source == "tiny" else ())
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def _seconds(
    lm: LanguageModel, rows: list[dict[str, Any]], batch: int, steps: int, folder: Path, callbacks: list[Any]
) -> float:
    config = SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=steps, max_length=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        copy.deepcopy(lm.model),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
