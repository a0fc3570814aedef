"""The monitor on real trainers: it measures what it should, acts on the budget, and changes nothing."""

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import ForgettingMonitor, Measuring, placing, trackers
from rlrazor.guard.base_side import BaseSide, joined
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.outputs import KeptModel
from rlrazor.guard.overlap import count_overlap
from rlrazor.guard.verdict import Verdict
from rlrazor.lm import kl, probes
from rlrazor.lm.models import add_lora
from rlrazor.lm.probes import GenericText, ProbeSettings
from tiny_models import char_tokenizer, tiny_llama
from watching import trainer_of, watch
from watching import watch as monitor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses names that transformers has renamed

TOKENIZER = char_tokenizer()
ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a};"} for a in "abcdefgh" for b in "0123456789"]


def sft(
    out: Path, callbacks: list[Any], model: Any = None, *, lora: bool = False, **config: Any
) -> tuple[SFTTrainer, list[float]]:
    """Train six steps; the trainer and every step's loss."""
    settings = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "bf16": False,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    } | config  # fmt: skip
    resume = settings.pop("resume", None)
    trainer = SFTTrainer(
        model or tiny_llama(attention_dropout=0.3),
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=char_tokenizer(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear") if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def with_frozen_parts() -> Any:
    """LoRA-FA: of each pair only one factor is trained."""
    adapted = add_lora(tiny_llama(attention_dropout=0.3), 2)
    for name, weight in adapted.named_parameters():
        weight.requires_grad_(".lora_B." in name)
    return adapted


@pytest.mark.parametrize("how", ["full", "lora", "lora-fa"])
def test_training_is_the_same_to_the_bit(tmp_path: Path, how: str) -> None:
    """With dropout, so that a generator moved or a mode left behind would show."""

    def train(name: str, callbacks: list[Any]) -> tuple[SFTTrainer, list[float]]:
        torch.manual_seed(5)  # of the adapter that is there already
        model = with_frozen_parts() if how == "lora-fa" else None
        return sft(tmp_path / name, callbacks, model, lora=how == "lora")

    _, plain = train("plain", [])
    watching = monitor(tmp_path, every=1)
    trainer, watched = train("watched", [watching])
    assert watched == plain
    assert len(watching.readings) == 6
    # What it measured is KL from the model it was given to the model at the end.
    base = tiny_llama()
    for name, sequences in (
        ("kl_forward", probes.of_prompts(base, TOKENIZER, PROMPTS, SETTINGS, cache_dir=tmp_path)),
        ("kl_probe", probes.of_generic(base, TOKENIZER, GENERIC, SETTINGS)),
    ):
        expected = kl.forward_kl(kl.Probe(base, sequences), trainer.model).per_completion
        assert watching.readings[-1].kl[name] == pytest.approx(expected, rel=1e-4)
    steps = rows_of(tmp_path / "watched" / "razor.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["kl_forward"] == watching.readings[-1].kl["kl_forward"].mean
    assert steps[-1]["forecast"] is None


def test_grpo_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """It keeps metrics until it logs, and samples between updates."""

    def train(name: str, callbacks: list[Any]) -> list[dict[str, float]]:
        config = GRPOConfig(
            output_dir=str(tmp_path / name), max_steps=4, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=6, learning_rate=3e-3, bf16=False, report_to="none", logging_steps=2, use_cpu=True,
            save_strategy="no", disable_tqdm=True, temperature=1.0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            tiny_llama(attention_dropout=0.3),
            lambda completions, **_: [float(completion.count("a")) for completion in completions],
            config,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
            processing_class=char_tokenizer(),
            callbacks=callbacks,
        )
        trainer.train()
        kept = ("loss", "reward", "completions/mean_length", "grad_norm", "num_tokens")
        return [{name: entry.get(name) for name in kept} for entry in trainer.state.log_history if "loss" in entry]

    watching = monitor(tmp_path, every=1)
    assert train("watched", [watching]) == train("plain", [])
    assert [reading.step for reading in watching.readings] == [1, 2, 3, 4]


def test_a_preference_trainer_and_the_plain_one_are_watched_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "x;"} for row in ROWS]
    common = {
        "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    watching = ForgettingMonitor(
        [*PROMPTS, ROWS[0]["prompt"]], settings=SETTINGS, generic=GENERIC, cache_dir=tmp_path / "cache", every=1
    )
    DPOTrainer(
        tiny_llama(),
        ref_model=tiny_llama(),
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), **common),
        train_dataset=Dataset.from_list(rows),
        processing_class=char_tokenizer(),
        callbacks=[watching],
    ).train()
    assert [reading.step for reading in watching.readings] == [1, 2]
    assert watching.readings[-1].kl["kl_forward"].mean > 0
    assert "1 of the 25 prompts are in the training set" in capfd.readouterr().out
    ids = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(8)]
    plain = monitor(tmp_path, every=1, tokenizer=char_tokenizer())
    Trainer(
        tiny_llama(),
        TrainingArguments(output_dir=str(tmp_path / "plain"), **common),
        train_dataset=ids,
        callbacks=[plain],
    ).train()
    assert [reading.step for reading in plain.readings] == [1, 2]
    with pytest.raises(RazorError, match="needs the tokenizer"):
        Trainer(
            tiny_llama(), TrainingArguments(output_dir=str(tmp_path / "none"), **common), callbacks=[monitor(tmp_path)]
        )


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_that_does_not_move_has_no_kl(tmp_path: Path, bf16: bool) -> None:
    """Under autocast both sides are computed with it: rounding is not drift."""
    watching = monitor(tmp_path, every=3)
    sft(tmp_path, [watching], tiny_llama(), learning_rate=0.0, bf16=bf16)
    for reading in watching.readings:
        assert [estimate.mean for estimate in reading.kl.values()] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_forecast_is_the_laws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    law = law_of(model, scale=20.0)
    watching = monitor(tmp_path, law, every=2, budget=0.5)
    sft(tmp_path / "run", [watching], model)
    for reading in watching.readings:
        means = {name: estimate.mean for name, estimate in reading.kl.items()}
        assert reading.forecast == law.forecaster.forecast(means)  # on the calibration's own prompts
        assert reading.remaining == law.forecaster.remaining(means, 0.5)
        assert reading.within == (reading.forecast.drop <= 0.5)
    out = capfd.readouterr().out
    assert "A law of KL on the generic probe, fitted to 10 runs" in out
    assert "Intervals are of 90%" in out
    assert "forecast drop" in out
    rows = rows_of(tmp_path / "run" / "razor.jsonl")
    assert [row["forecast"]["drop"] for row in rows] == [r.forecast.drop for r in watching.readings if r.forecast]
    # On other prompts KL has an error of its own, and the interval covers it.
    other = ForgettingMonitor(PROMPTS[:20], law, every=6, cache_dir=tmp_path / "cache")
    sft(tmp_path / "other", [other], tiny_llama())
    (last,) = other.readings
    assert last.forecast is not None
    spread = {name: estimate.stderr for name, estimate in last.kl.items()}
    means = {name: estimate.mean for name, estimate in last.kl.items()}
    assert last.forecast == law.forecaster.forecast(means, stderr=spread)
    assert last.forecast.high > law.forecaster.forecast(means).high


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, Mapping[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights[state.global_step] = copy.deepcopy(model.state_dict())


def test_a_budget_warns_stops_or_keeps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    law = law_of(model)
    # A budget that is crossed on the way: the forecast half-way.
    scout = monitor(tmp_path, law, every=1)
    _, losses = sft(tmp_path / "scout", [scout], copy.deepcopy(model))
    drops = [reading.forecast.drop for reading in scout.readings if reading.forecast]
    assert drops == sorted(drops)
    budget = 0.9 * drops[2] + 0.1 * drops[3]

    warned = monitor(tmp_path, law, every=1, budget=budget)
    capfd.readouterr()
    assert sft(tmp_path / "warn", [warned], copy.deepcopy(model))[1] == losses
    assert [reading.within for reading in warned.readings] == [True] * 3 + [False] * 3
    said = [line for line in capfd.readouterr().out.splitlines() if "budget" in line]
    assert [f"step {step}:" in line for step, line in enumerate(said, 1)] == [True] * 6  # a line for each, and no more
    assert ["is over the budget" in line for line in said] == [False] * 3 + [True] * 3
    assert said[-1].endswith("training goes on")

    stopped = monitor(tmp_path, law, every=1, budget=budget, on_budget="stop")
    assert sft(tmp_path / "stop", [stopped], copy.deepcopy(model))[1] == losses[:4]
    assert capfd.readouterr().out.count("training stops here") == 1

    cautious = monitor(tmp_path, law, every=1, budget=budget, on_budget="stop", cautious=True)
    highs = [reading.forecast.high for reading in scout.readings if reading.forecast]
    first_over = next(index for index, high in enumerate(highs) if high > budget)
    assert sft(tmp_path / "cautious", [cautious], copy.deepcopy(model))[1] == losses[: first_over + 1]
    assert first_over <= 3
    assert capfd.readouterr().out.count("whose upper end is over the budget of") == 1
    for reading in cautious.readings[:first_over]:
        room, kl_now = reading.remaining["kl_probe"], reading.kl["kl_probe"].mean
        assert law.forecaster.forecast({"kl_probe": kl_now + room}).high == pytest.approx(budget)

    snapshots = Snapshots()
    keeping = monitor(tmp_path, law, every=1, budget=budget, on_budget="keep")
    assert sft(tmp_path / "keep", [keeping, snapshots], copy.deepcopy(model))[1] == losses
    kept = load_file(tmp_path / "keep" / "within-budget" / "model.safetensors")
    assert all(torch.equal(weight, snapshots.weights[3][name]) for name, weight in kept.items())
    assert json.loads((tmp_path / "keep" / "within-budget" / "razor.json").read_text())["step"] == 3
    assert (tmp_path / "keep" / "within-budget" / "tokenizer.json").exists()
    assert not list((tmp_path / "keep").glob(".within*"))


def test_nothing_is_within_a_budget_beyond_what_the_law_was_fitted_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The interval is of smaller KLs, so that the budget is kept is a guess: as in compare and pick."""
    model = tiny_llama()
    whole = law_of(model)
    scout = monitor(tmp_path, whole, every=1)
    sft(tmp_path / "scout", [scout], copy.deepcopy(model))
    kls = [reading.kl["kl_probe"].mean for reading in scout.readings]
    end = (kls[2] + kls[3]) / 2  # of what the runs of this law came to
    law = changed(whole, highest={"kl_probe": end})
    drops = [reading.forecast for reading in scout.readings if reading.forecast]
    assert max(drop.high for drop in drops) < 0.89  # so that by the numbers alone all is within

    def watched(name: str, **how: Any) -> ForgettingMonitor:
        own = monitor(tmp_path, law, every=1, budget=0.89, **how)
        sft(tmp_path / name, [own], copy.deepcopy(model))
        return own

    careful = watched("stop", on_budget="stop", cautious=True)
    assert [(reading.within, reading.verdict) for reading in careful.readings] == [
        *[(True, Verdict.WITHIN)] * 3, (False, Verdict.ABOVE)
    ]  # fmt: skip
    for reading, nats in zip(careful.readings, kls, strict=False):
        assert reading.remaining["kl_probe"] == pytest.approx(max(end - nats, 0.0))
    said = "that it is within the budget of 89.0 cannot be told, which counts as over it: training stops here; beyond"
    assert said in capfd.readouterr().out

    kept = watched("keep", on_budget="keep")
    assert [reading.verdict for reading in kept.readings] == [Verdict.WITHIN] * 3 + [Verdict.UNCERTAIN] * 3
    assert [row["within"] for row in rows_of(tmp_path / "keep" / "razor.jsonl")] == [True] * 3 + [None] * 3
    assert json.loads((tmp_path / "keep" / "within-budget" / "razor.json").read_text())["step"] == 3
    said = "whether that is within the budget of 89.0 cannot be told: this model is not kept; beyond what the law"
    assert capfd.readouterr().out.count(said) == 3


def test_what_an_earlier_run_kept_is_not_taken_for_this_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    kept = tmp_path / "within-budget"
    kept.mkdir()
    (kept / "earlier").write_text("")
    with pytest.raises(RazorError, match=r"within-budget is there already, and was not written by this"):
        sft(tmp_path, [monitor(tmp_path, law_of(model), every=3, budget=0.5, on_budget="keep")], tiny_llama())
    (kept / "razor.json").write_text('{"step": 7}')
    over = monitor(tmp_path, law_of(model, scale=0.01), every=3, budget=1e-6, on_budget="keep")
    sft(tmp_path, [over], model)
    assert [reading.within for reading in over.readings] == [False, False]
    out = capfd.readouterr().out
    assert "no measured model within it is kept" in out
    assert "is an earlier run's" in out
    assert not kept.exists()
    assert (tmp_path / "within-budget-of-earlier-run-1" / "earlier").exists()
    # A process that was killed between two renames: what it kept is found again, and moved aside as well.
    kept.with_name(".within-budget.old").mkdir()
    within = monitor(tmp_path, law_of(tiny_llama()), every=6, budget=0.9, on_budget="keep")
    sft(tmp_path, [within], tiny_llama())
    assert not kept.with_name(".within-budget.old").exists()
    assert not list((tmp_path / "within-budget-of-earlier-run-2").iterdir())
    assert (tmp_path / "within-budget-of-earlier-run-1" / "earlier").exists()
    assert (kept / "model.safetensors").exists()
    # Nor is its log.
    assert [row["step"] for row in rows_of(tmp_path / "razor-of-earlier-run-1.jsonl")] == [3, 6]
    assert [row["step"] for row in rows_of(tmp_path / "razor.jsonl")] == [6]
    assert not (tmp_path / "razor-of-earlier-run-2.jsonl").exists()


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends training after step 4, as early stopping does: after the step's own callbacks."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= 4
        return control


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_ends_early_is_measured_where_it_ends(tmp_path: Path, best: bool) -> None:
    watching = monitor(tmp_path, every=3)
    saving = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2} if best else {}
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=3e-3, bf16=False,
            report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2,
            **{"save_strategy": "no", **saving},
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:8]),
        processing_class=char_tokenizer(),
        callbacks=[watching, Stopping()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    # Before the best model is loaded, after which there is no model of the last step any more.
    assert [reading.step for reading in watching.readings] == [3, 4]
    if not best:
        base = tiny_llama()
        sequences = probes.of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
        expected = kl.forward_kl(kl.Probe(base, sequences), trainer.model).per_completion
        assert watching.readings[-1].kl["kl_forward"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_is_placed_as_training_begins_is_looked_at_then(tmp_path: Path) -> None:
    """DeepSpeed casts it, and with bf16_full_eval it waits on the CPU."""
    for waits in (
        {"device": torch.device("cpu"), "deepspeed": "zero2.json"},
        {"device": torch.device("cpu"), "deepspeed_plugin": "of accelerate launch"},
        {"device": torch.device("meta")},
    ):
        arguments = SimpleNamespace(output_dir=str(tmp_path), fsdp=[], **waits)
        watching = monitor(tmp_path, every=1)
        model = tiny_llama()
        watching.on_init_end(arguments, None, None, model=model, processing_class=TOKENIZER)
        assert watching.base is None
        resuming = SimpleNamespace(global_step=3)
        with pytest.raises(RazorError, match="the base is gone"):
            watching.on_train_begin(arguments, resuming, None, model=model, processing_class=TOKENIZER)
        begin = SimpleNamespace(global_step=0)
        watching.on_train_begin(arguments, begin, None, model=model, processing_class=TOKENIZER)
        assert watching.base is not None
        # Under an adapter the base is there whenever it is looked at.
        adapted = monitor(tmp_path, every=1)
        with_lora = add_lora(tiny_llama(), 2)
        adapted.on_train_begin(arguments, resuming, None, model=with_lora, processing_class=TOKENIZER)
        assert adapted.base is not None
    there = SimpleNamespace(output_dir=str(tmp_path), fsdp=[], device=torch.device("cpu"))
    watching.on_init_end(there, None, None, model=tiny_llama(), processing_class=TOKENIZER)
    assert watching.base is not None


def test_a_run_that_resumes_is_measured_against_the_same_base(tmp_path: Path) -> None:
    model = tiny_llama()
    whole = monitor(tmp_path)
    sft(tmp_path / "whole", [whole], copy.deepcopy(model))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    sft(tmp_path / "parts", [monitor(tmp_path)], copy.deepcopy(model), **saving)
    log = tmp_path / "parts" / "razor.jsonl"
    with log.open("a") as file:
        file.write('{"step": 5, "half-writ')
    resumed = monitor(tmp_path)
    checkpoint = str(tmp_path / "parts" / "checkpoint-3")
    sft(tmp_path / "parts", [resumed], copy.deepcopy(model), resume=checkpoint, **saving)
    first, second = (rows_of(tmp_path / name / "razor.jsonl") for name in ("whole", "parts"))
    for rows in (first, second):
        assert len({row["run"] for row in rows}) == 1
        for row in rows:
            del row["seconds"], row["run"]
    assert second == first
    assert [reading.step for reading in resumed.readings] == [
        step for step in (row["step"] for row in first) if step > 3
    ]
    # Of another probe, its KLs would not be comparable: it is refused, and the log is as it was.
    sft(tmp_path / "other", [monitor(tmp_path, every=1)], copy.deepcopy(model), **saving)
    log = tmp_path / "other" / "razor.jsonl"
    before = log.read_bytes()
    other = monitor(tmp_path, settings=ProbeSettings(7))
    with pytest.raises(RazorError, match="of another base, other prompts or another probe"):
        sft(log.parent, [other], copy.deepcopy(model), resume=str(log.parent / "checkpoint-3"), **saving)
    assert log.read_bytes() == before
    late = sft(tmp_path / "late", [], copy.deepcopy(model), **saving)[0]
    late.add_callback(monitor(tmp_path))
    with pytest.raises(RazorError, match="added after the trainer was made"):
        late.train(resume_from_checkpoint=str(tmp_path / "late" / "checkpoint-3"))


def test_it_measures_as_often_as_five_percent_allow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the tokens of a step, with twice a forward pass for a measurement and three for training."""
    large = monitor(tmp_path)
    sft(tmp_path / "large", [large], max_steps=20, per_device_train_batch_size=64)
    assert large.base is not None
    assert large.schedule is not None
    assert large.schedule.plan is not None
    per_step = 0.05 / 2 * 3 * 64 * len("ab=ba;")
    assert math.ceil(2 * large.schedule.thin.tokens / per_step) > 20  # it would be once
    assert large.schedule.plan.every == 5
    assert [reading.step for reading in large.readings] == [5, 10, 15, 20]
    found = 4 * 2 * large.schedule.thin.tokens / (20 * 3 * 64 * len("ab=ba;"))
    first, second, *_ = (line for line in capfd.readouterr().out.splitlines() if "plan:" in line or " step 1" in line)
    assert "4 readings, after steps 5, 10, 15 and 20, on 16 of 24 prompts and 16 of 24 generic texts" in first
    assert f"which is {100 * found:.0f}% of training by the tokens that are read, more than the 5% aimed at" in first
    assert "a step of training takes" in second
    # A probe too large for ten measurements is thinned, less at the end, which half of the time allowed is for.
    many = [f"{a}{b}{c}:" for a in "abcdef" for b in "0123456" for c in "01234"]
    thinned = ForgettingMonitor(many, settings=SETTINGS, generic=GENERIC, cache_dir=tmp_path / "cache")
    sft(tmp_path / "thin", [thinned], max_steps=60, per_device_train_batch_size=64)
    assert thinned.schedule is not None
    assert thinned.schedule.plan is not None
    assert thinned.schedule.plan.every == 15
    assert [reading.step for reading in thinned.readings] == [15, 30, 45, 60]
    assert thinned.readings[0].prompts == {"kl_forward": 16, "kl_probe": 16}
    assert thinned.base is not None
    share = 60 * per_step / (2 * thinned.base.tokens)
    assert 16 / len(many) < share < 1
    assert thinned.readings[-1].prompts["kl_forward"] == math.ceil(share * len(many))
    row = rows_of(tmp_path / "thin" / "razor.jsonl")[0]
    assert row["last_probe_fraction"] == pytest.approx(share)
    assert "share" not in row
    # An update of an adapter is cheaper, by the gradients of the weights that are not trained.
    adapted = monitor(tmp_path)
    trainer, _ = sft(tmp_path / "lora", [adapted], lora=True, max_steps=20, per_device_train_batch_size=64)
    sizes = [(weight.numel(), weight.requires_grad) for weight in trainer.model.parameters()]
    cost = 2 + sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
    assert cost < 2.5
    assert adapted.schedule is not None
    assert adapted.schedule.costs is not None
    assert adapted.schedule.costs.worth is not None
    assert adapted.base is not None
    assert adapted.schedule.costs.worth(1.0) == pytest.approx(2 * adapted.base.tokens / (cost * 64 * len("ab=ba;")))


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: each has half of the prompts, and they share what they find.

    Where the generic probe is what the base writes itself, one of them has it write.
    """
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path

            import torch

            torch.set_num_threads(1)
            sys.path.insert(0, sys.argv[1])
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            from laws import PROMPTS, SETTINGS, law_of
            from rlrazor.guard import ForgettingMonitor
            from rlrazor.lm import own_texts
            from test_monitor import ROWS, monitor
            from tiny_models import char_tokenizer, tiny_llama
            from watching import leave, trainer_of

            out, draw = Path(sys.argv[2]), own_texts.draw

            def counted(*arguments):
                with (out.parent / "drawn.txt").open("a") as file:
                    file.write("drawn\\n")
                return draw(*arguments)
            model = tiny_llama()
            config = SFTConfig(
                output_dir=str(out), max_steps=3, per_device_train_batch_size=4, learning_rate=3e-3, bf16=False,
                report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model, config, train_dataset=Dataset.from_list(ROWS), processing_class=char_tokenizer(),
                callbacks=[monitor(out, law_of(model, scale=20.0), every=1, budget=0.001, on_budget="stop")],
            )
            trainer.train()
            own_texts.draw, own = counted, out / "own"
            watching = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic="self", every=2, cache_dir=own / "cache")
            trainer_of(own, [watching], tiny_llama(), max_steps=2, per_device_train_batch_size=4).train()
            leave()
            """
        )
    )
    tests = str(Path(__file__).parents[1])
    paths = [tests, str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*run, script, tests, tmp_path / "two"], check=False, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    model = tiny_llama()
    whole = monitor(tmp_path, law_of(model, scale=20.0), every=1, budget=0.001, on_budget="stop")
    sft(tmp_path / "one", [whole], model, max_steps=3)
    one, two = (rows_of(tmp_path / name / "razor.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for of_one, of_two in zip(one, two, strict=True):
        assert of_two["prompts"] == of_one["prompts"]
        for name in ("kl_forward", "kl_probe", "kl_forward_stderr", "kl_probe_per_token"):
            assert of_two[name] == pytest.approx(of_one[name], rel=0.02)
    assert (tmp_path / "drawn.txt").read_text().splitlines() == ["drawn"]
    row = rows_of(tmp_path / "two" / "own" / "razor.jsonl")[-1]
    own = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic="self", every=2, cache_dir=tmp_path / "cache")
    trainer_of(tmp_path / "own", [own], tiny_llama(), max_steps=2).train()
    assert row["prompts"] == {"kl_forward": len(PROMPTS), "kl_probe": 64}
    assert row["kl_probe"] == pytest.approx(own.readings[-1].kl["kl_probe"].mean, rel=0.02)


@pytest.mark.parametrize("stopped", [None, "step", "epoch"])
def test_tensorboard_has_one_file_that_is_read_whole(tmp_path: Path, stopped: str | None) -> None:
    """By a reader that looks while the run goes on, as TensorBoard does: it goes on to a newer file and never back."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Reader(TrainerCallback):  # type: ignore[misc]
        """Ends training early, too, where it is asked to."""

        events: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            (folder,) = (tmp_path / "run" / "runs").iterdir()
            self.events = self.events or EventAccumulator(str(folder))
            self.events.Reload()
            control.should_training_stop |= stopped == "step" and state.global_step == 4
            return control

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop |= stopped == "epoch"
            return control

    model, reader = tiny_llama(), Reader()
    watching = watch(tmp_path, law_of(model), every=3, budget=0.5)
    early = {"eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 16}
    trainer = trainer_of(
        tmp_path / "run", [watching, reader], model, report_to="tensorboard", **(early if stopped == "epoch" else {})
    )
    trainer.train()
    (_one,) = (tmp_path / "run" / "runs").rglob("events.out.*")
    reader.events.Reload()
    ended = {None: 6, "step": 4, "epoch": 5}[stopped]
    assert [event.step for event in reader.events.Scalars("train/loss")] == list(range(1, ended + 1))
    for name, expected in (
        ("razor/kl_forward", [reading.kl["kl_forward"].mean for reading in watching.readings]),
        ("razor/forecast_drop_high", [r.forecast.high for r in watching.readings if r.forecast]),
        ("razor/remaining_kl_probe", [reading.remaining["kl_probe"] for reading in watching.readings]),
    ):
        seen = reader.events.Scalars(name)
        assert [event.step for event in seen] == [3, ended]
        assert [event.value for event in seen] == pytest.approx(expected, rel=1e-6)


def test_trackers_get_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, Any]] = []
    running = SimpleNamespace(get=lambda: "run")
    wandb = SimpleNamespace(run="run", log=lambda values: sent.append(("wandb", values)))
    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=running), log=lambda values: sent.append(("trackio", values))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    mlflow = SimpleNamespace(
        active_run=lambda: wandb.run, log_metrics=lambda values, step: sent.append(("mlflow", {**values, "step": step}))
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    arguments = SimpleNamespace(report_to=["wandb", "trackio", "mlflow", "comet_ml"], output_dir=str(tmp_path))
    trackers.send(arguments, {"razor/x": 1.0}, 7)
    expected_values = {"razor/x": 1.0, "train/global_step": 7}
    assert sent == [
        ("wandb", expected_values), ("trackio", expected_values), ("mlflow", {"razor/x": 1.0, "step": 7})
    ]  # fmt: skip
    wandb.run = None
    running.get = lambda: None
    trackers.send(arguments, {"razor/x": 2.0}, 8)
    assert len(sent) == 3


def test_what_cannot_be_written_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A log and a tracker are not worth a run; what is late is written when it can be."""

    def offline(values: Any) -> None:
        raise ConnectionError("no route")

    class Obstacles(TrainerCallback):  # type: ignore[misc]
        """Before steps 2 to 4 the log is a folder; models cannot be saved from step 3 on, tokenizers from step 5."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            log, aside = tmp_path / "razor.jsonl", tmp_path / "aside"
            if state.global_step == 1:
                log.rename(aside)
                log.mkdir()
            if state.global_step == 4:
                log.rmdir()
                aside.rename(log)
            if state.global_step == 2:
                monkeypatch.setattr(model, "save_pretrained", self.full)
            if state.global_step == 4:
                monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: folder.mkdir())
                monkeypatch.setattr(tokenizer, "save_pretrained", self.full_for_tokenizers)

        @staticmethod
        def full(folder: Path, **_: Any) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_text("half")
            raise SafetensorError("No space left on device")

        @staticmethod
        def full_for_tokenizers(folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run="run", log=offline))
    model, tokenizer = tiny_llama(), char_tokenizer()
    watching = monitor(tmp_path, law_of(model), every=1, budget=0.9, on_budget="keep")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=3e-3, bf16=False,
            report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=[Obstacles(), watching],
    )  # fmt: skip
    trainer.args.report_to = ["wandb"]
    trainer.train()
    out = capfd.readouterr().out
    assert out.count("razor.jsonl cannot be written (Is a directory)") == 1
    assert out.count("wandb does not take what was measured (no route); training goes on") == 1
    assert out.count("the model within the budget could not be written to") == 4
    assert out.count("the model of step 2 is there, and training goes on") == 4
    rows = rows_of(tmp_path / "razor.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "within-budget" / "razor.json").read_text())["step"] == 2
    assert not list(tmp_path.glob(".within*"))


def test_without_a_law_it_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ForgettingMonitor(["ab:", "cd:"], settings=SETTINGS, cache_dir=tmp_path, budget=0.1, every=6)
    sft(tmp_path, [few])
    out = capfd.readouterr().out
    assert "uncalibrated: no law was given" in out
    assert "the budget is not watched" in out
    assert "2 prompts are few" in out
    assert "uncalibrated: no law, so no forecast" in out
    assert few.on.generic == GenericText.built_in()
    assert few.readings[0].within is None


def test_what_is_in_the_way_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def immovable(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(RazorError, match=r"log is a file, and .* is a folder"):
        monitor(tmp_path, log=tmp_path)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "a"}\n')
    (tmp_path / "linked.jsonl").hardlink_to(asked)
    for log in (asked, tmp_path / "linked.jsonl"):
        with pytest.raises(RazorError, match=r"jsonl would be written, and is read as well"):
            ForgettingMonitor(asked, log=log)
    (tmp_path / "there").write_text("")
    with pytest.raises(RazorError, match=r"Cannot write to .*there: Not a directory"):
        sft(tmp_path / "run", [monitor(tmp_path, log=tmp_path / "there" / "log.jsonl")])
    earlier = tmp_path / "latin.jsonl"
    earlier.write_bytes(b"\xe9\n")
    with pytest.raises(RazorError, match=r"latin\.jsonl is there already, and was not written by this"):
        sft(tmp_path / "run", [monitor(tmp_path, log=earlier)])
    whole = b'{"run": "x", "step": 1, "error": "y"}\n\xe9\n'
    earlier.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", immovable)
        with pytest.raises(RazorError, match=r"latin\.jsonl is an earlier run's and cannot be renamed"):
            sft(tmp_path / "run", [monitor(tmp_path, log=earlier)])
    assert earlier.read_bytes() == whole
    sft(tmp_path / "run", [monitor(tmp_path, log=earlier, every=6)])
    assert (tmp_path / "latin-of-earlier-run-1.jsonl").read_bytes() == whole
    assert [row["step"] for row in rows_of(earlier)] == [6]


def test_a_kept_model_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rename fails, and however often."""
    said: list[str] = []
    kept, model = KeptModel(tmp_path / "kept", said.append), tiny_llama()
    assert kept.step is None
    for step in (1, 2):
        kept.save(model, None, {"step": step})
        assert kept.step == step
    rename, count = Path.rename, 0

    def failing(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > 1:  # the first sets the old one aside
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        kept.save(model, None, {"step": 3})
        kept.save(model, None, {"step": 4})
    assert len(said) == 2
    assert "no model is there" in said[0]
    kept.save(model, None, {"step": math.nan})  # which JSON does not take
    assert "the model of step 2 is there" in said[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = [f"{letter * 60}:" for letter in "abcdefghijklmnopqrst"]
    model = tiny_llama()
    law = changed(
        law_of(model), probe__prompts_hash=probes.content_hash([*long, "ab:", "cd:"]), probe__prompts_count=22
    )
    watching = ForgettingMonitor([*long, "ab:", "cd:"], law, cache_dir=tmp_path, every=6)
    sft(tmp_path, [watching], model)
    out = capfd.readouterr().out
    assert "20 of the 22 prompts are left out: they do not fit into the context" in out
    assert "2 prompts are few" in out
    (last,) = watching.readings
    assert last.prompts["kl_forward"] == 2
    # So the interval is widened, though they are the calibration's own.
    assert last.forecast == law.forecast(last.kl, prompts="") != law.forecast(last.kl, prompts=law.probe.prompts_hash)


def test_prompts_that_are_trained_on_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def loader(rows: list[dict[str, Any]]) -> Any:
        return SimpleNamespace(dataset=Dataset.from_list(rows))

    prompts = ["ab", "cd", "ef"]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "cd"}]
    ids = [[[1, 2], [8]], [[3, 4]], [[5, 6]]]
    assert count_overlap(prompts, ids, loader([{"prompt": "ab"}, {"prompt": "abc"}, {"prompt": "x"}])) == 1
    assert count_overlap(prompts, ids, loader([{"text": "cd and more"}, {"text": "x cd"}])) == 1
    assert count_overlap(prompts, ids, loader([{"messages": turns}])) == 1
    assert count_overlap([turns, "ab"], ids[:2], loader([{"messages": turns}, {"messages": turns}])) == 1
    assert count_overlap(prompts, ids, loader([{"input_ids": [3, 4, 9]}, {"input_ids": [9, 5, 6]}])) == 1
    assert count_overlap(prompts, ids, loader([{"input_ids": [8, 9]}, {"input_ids": [1, 2]}])) == 1
    assert count_overlap(prompts, ids, loader([{"prompt_ids": [8], "chosen_ids": [3, 4]}])) == 1
    assert count_overlap(prompts, ids, loader([{"other": [1, 2]}])) == 0
    assert count_overlap(prompts, ids, SimpleNamespace(dataset=iter([]))) == 0
    # What it cannot read is no match, whatever it is.
    assert count_overlap(prompts, ids, loader([{"prompt": None}, {"prompt": "ab"}])) == 1
    for odd in (3, ["ab"], [[1]], [{"content": [{"type": "image"}], "role": "user"}]):
        assert count_overlap(prompts, ids, loader([{"text": odd}])) == 0
        assert count_overlap(prompts, ids, loader([{"input_ids": odd}])) == 0
    tensors = SimpleNamespace(dataset=Dataset.from_list([{"input_ids": [3, 4, 9]}]).with_format("torch"))
    assert count_overlap(prompts, ids, tensors) == 1
    watching = ForgettingMonitor(
        [ROWS[0]["prompt"], "zz="], settings=SETTINGS, generic=GENERIC, cache_dir=tmp_path, every=6
    )
    sft(tmp_path, [watching])
    assert "1 of the 2 prompts are in the training set" in capfd.readouterr().out


def test_what_cannot_be_watched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_llama(), tiny_llama(seed=1)
    with pytest.raises(RazorError, match="calibrated for base, and this base is another one"):
        sft(tmp_path, [monitor(tmp_path, law_of(other))], model)
    law = law_of(model)
    law.save(tmp_path / "law.json")
    assert ForgettingMonitor(PROMPTS, tmp_path / "law.json").law == law
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"on_budget": "panic"}, "'warn', 'stop' or 'keep'"),
        ({"budget": 2}, "fraction of 1"),
        ({"level": 90}, "fraction of 1"),
        ({"every": 0}, "at least 1"),
        ({"settings": ProbeSettings(7)}, "another `settings`"),
        ({"generic": GenericText(texts=("x",))}, "another `generic`"),
    ]
    for arguments, message in wrong:
        with pytest.raises(RazorError, match=message):
            ForgettingMonitor(PROMPTS, law, **arguments)
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    here: dict[str, Any] = {"settings": ProbeSettings(7), "generic": tmp_path / "x.txt"}
    here |= {"level": 0.5, "tokenizer": "any", "cache_dir": tmp_path}
    assert ForgettingMonitor(PROMPTS, **here).measuring == Measuring(**here)
    some = ForgettingMonitor(PROMPTS, measuring=Measuring(level=0.5), settings=ProbeSettings(7))
    assert some.measuring == Measuring(settings=ProbeSettings(7), level=0.5)
    with pytest.raises(TypeError, match="given 'level' twice"):
        ForgettingMonitor(PROMPTS, measuring=Measuring(level=0.5), level=0.6)
    with pytest.raises(TypeError, match="no argument 'bugdet'"):
        ForgettingMonitor(PROMPTS, law, bugdet=0.1)
    with pytest.raises(RazorError, match="no prompts"):
        sft(tmp_path, [ForgettingMonitor([], cache_dir=tmp_path)])
    odd: list[tuple[Any, str]] = [({"text": "ab"}, "a mapping of"), (["ab"], "turn 1 is text"), (3, "the number 3")]
    for prompt, message in odd:
        with pytest.raises(RazorError, match=f"Prompt 2: .*{message}"):
            sft(tmp_path, [ForgettingMonitor(["ab:", prompt], cache_dir=tmp_path)])
    with pytest.raises(RazorError, match="Prompt 1: the prompt is blank"):
        sft(tmp_path, [ForgettingMonitor([""], cache_dir=tmp_path)])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(RazorError, match="is empty"):
        ForgettingMonitor(empty)
    damaged = tiny_llama()
    with torch.no_grad():
        damaged.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RazorError, match="NaN or infinite before training"):
        sft(tmp_path, [monitor(tmp_path)], damaged)
    training = SimpleNamespace(output_dir=str(tmp_path))

    def begun() -> None:
        monitor(tmp_path).on_init_end(training, None, None, model=model, processing_class=TOKENIZER)

    # Split by layers, as transformers, accelerate and Megatron say it.
    model._tp_size = 2
    with pytest.raises(RazorError, match=r"tensor parallel.*`razor watch RUN_FOLDER --base MODEL --prompts FILE`"):
        begun()
    model._tp_size = None
    model.config.distributed_config = SimpleNamespace(pp_size=2)
    with pytest.raises(RazorError, match="pipeline parallel"):
        begun()
    del model.config.distributed_config
    launched = SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM)
    monkeypatch.setattr(placing, "is_initialized", lambda: True)
    monkeypatch.setattr(placing, "AcceleratorState", lambda: launched)
    with pytest.raises(RazorError, match="Megatron-LM"):
        begun()
    launched.distributed_type = DistributedType.MULTI_GPU
    launched.parallelism_config = SimpleNamespace(tp_size=1, cp_size=4)
    with pytest.raises(RazorError, match="context parallel"):
        begun()


@pytest.mark.parametrize("how", ["fsdp", "deepspeed", "launched"])
def test_what_is_sharded_as_training_begins_is_measured_then(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that, other processes than the first may have no weights."""
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP)
    if how == "launched":
        monkeypatch.setattr(placing, "is_initialized", lambda: True)
        monkeypatch.setattr(placing, "AcceleratorState", lambda: launched)
    training = SimpleNamespace(
        output_dir=str(tmp_path), **{how: "zero3.json" if how == "deepspeed" else ["full_shard"]}
    )
    watching = monitor(tmp_path)
    watching.on_init_end(training, None, None, model=tiny_llama(), processing_class=TOKENIZER)
    assert watching.base is None


@pytest.mark.parametrize("processes", [3, 40])
def test_parts_of_many_processes_are_the_whole(processes: int) -> None:
    """With more of them than prompts, some have nothing to measure, and no prompt counts twice."""
    base, tuned = tiny_llama(), tiny_llama(seed=2)
    on = MeasuredOn(PROMPTS[:7], GENERIC, SETTINGS)
    whole = BaseSide.of(base, TOKENIZER, on)
    shares = [BaseSide.of(base, TOKENIZER, on, share=(rank, processes)) for rank in range(processes)]
    expected, found = whole.measure(tuned), joined([side.measure(tuned) for side in shares])
    assert {name: drift.n_prompts for name, drift in found.items()} == {"kl_forward": 7, "kl_probe": 24}
    for name, drift in expected.items():
        assert found[name].per_completion == pytest.approx(drift.per_completion, rel=1e-5)
    assert all(side.whole == whole.whole for side in shares)


def test_a_policy_that_diverges_does_not_end_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Breaking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            with torch.no_grad():
                model.lm_head.weight.fill_(np.nan)

    watching = monitor(tmp_path, every=1)
    sft(tmp_path, [Breaking(), watching], max_steps=2)
    assert watching.readings == []
    assert "no longer finite" in capfd.readouterr().out


def test_a_measurement_without_memory_for_it_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watching = monitor(tmp_path, every=1)
    with monkeypatch.context() as patched:
        patched.setattr(BaseSide, "measure", exhausted)
        sft(tmp_path / "run", [watching], max_steps=2)
    assert watching.readings == []
    assert "step 1: out of memory; nothing was measured" in capfd.readouterr().out
    monkeypatch.setattr(BaseSide, "of", exhausted)
    with pytest.raises(RazorError, match="Out of memory while the base completes"):
        sft(tmp_path / "none", [monitor(tmp_path)], max_steps=2)
