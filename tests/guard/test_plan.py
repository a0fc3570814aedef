"""When a monitor measures and what it costs, without a trainer; and with one, that it is said before training."""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from laws import changed, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import plan as planning
from rlrazor.guard import waiting
from rlrazor.guard.base_side import ProbeSizes
from rlrazor.guard.log_schema import LogRow
from rlrazor.guard.plan import Costs, Plan
from rlrazor.guard.schedule import tokens_of_step
from rlrazor.guard.waiting import SetUpProgress
from rlrazor.system.documents import checked
from tiny_models import char_tokenizer, tiny_llama
from watching import ROWS, trainer_of, watch

COSTS = [1e-4, 0.01, 0.3, 7.0, 1e4]  # of a whole measurement, in steps of training


def worth_of(whole: float, floor: float = 0.16) -> Callable[[float], float]:
    """No measurement has less than some prompts."""
    return lambda fraction: whole * max(fraction, floor)


@pytest.mark.parametrize("whole", [None, *COSTS])
def test_there_are_four_measurements_in_a_run_however_short(whole: float | None) -> None:
    for steps in [*range(1, 60), 100, 997, 20_000]:
        plan = planning.choose(steps, None if whole is None else worth_of(whole))
        due = plan.steps(steps)
        assert len(due) >= min(4, steps)
        assert len(due) <= max(51, min(4, steps))
        assert due[-1] == steps
        assert steps < 4 or due[0] <= math.ceil(steps / 4) < steps  # so that there is something to stop
        gaps = [after - before for before, after in zip([0, *due], due, strict=False)]
        assert max(gaps) <= plan.every


@pytest.mark.parametrize("whole", COSTS)
def test_it_costs_what_is_aimed_at_unless_there_have_to_be_four(whole: float) -> None:
    for steps in (24, 200, 5000):
        worth = worth_of(whole)
        plan = planning.choose(steps, worth)
        costs = Costs(steps, 0, ProbeSizes([]), 0.0, worth)
        spent = costs.of_training(plan)
        # Independently: what each measurement costs, one after the other.
        fractions = [plan.last_fraction if step == steps else plan.fraction for step in plan.steps(steps)]
        assert spent == pytest.approx(sum(map(worth, fractions)) / steps)
        assert spent is not None
        if spent > 0.05 + 1e-9:
            assert plan.every == math.ceil(steps / 4)
            assert plan.fraction <= 0.16 or len(plan.steps(steps)) == 4


def test_a_plan_in_words() -> None:
    sizes = ProbeSizes([{"kl_forward": [10] * 100, "kl_probe": [50] * 60}])
    assert sizes.read(1.0) == 4000
    assert sizes.read(0.5) == 2000
    assert sizes.read(0.01) == 16 * 60
    assert ProbeSizes([*sizes.parts, {"kl_forward": [10] * 30}]).read(1.0) == 4000  # who reads most
    costs = Costs(24, 0, sizes, 1e-3, lambda fraction: sizes.read(fraction) / 2000)
    plan = Plan(6, 0.1, 0.5)
    said = planning.described(plan, costs)
    assert said == (
        "plan: 4 readings, after steps 6, 12, 18 and 24, on 16 of 100 prompts and 16 of 60 generic texts, the last on "
        "50 of 100 prompts and 30 of 60 generic texts. Measuring takes about 4.9 s in all, 0.96 s each time and 2.0 s "
        "the last, which is 10% of training by the tokens that are read, more than the 5% aimed at, as a run is "
        "measured at least 4 times; `every` sets how often."
    )
    timed = planning.timed(plan, replace(costs, step_seconds=2.0))
    assert timed.startswith("plan: a step of training takes 2.0 s. Measuring takes about 4.9 s in all")
    assert ", which is 10% of training by the clock, more than the 5% aimed at" in timed  # 4.88 / 48
    asked = planning.described(Plan(10, asked=True), costs)
    assert asked.startswith(
        "plan: 3 readings, after steps 10, 20 and 24, as `every` says, on all 100 prompts and all 60"
    )
    assert asked.endswith("12 s in all, 4.0 s each time, which is 25% of training by the tokens that are read.")
    often = Costs(1000, 0, sizes, 1e-3, lambda fraction: sizes.read(fraction) / 2000)
    said = planning.described(planning.choose(1000, often.worth), often)
    assert "readings, every 80 steps and after the last, 1000, on all 100" in said
    assert said.endswith(": as often as 5% pays for.")
    unknown = Costs(24, 0, sizes, 1e-3)
    assert "what share of training that is, is said once" in planning.described(Plan(6), unknown)
    assert "at least every 6 steps, which is 4 times or more" in planning.undecided(unknown)
    resumed = Costs(24, 15, sizes, 1e-3, costs.worth)
    assert "2 readings, after steps 18 and 24" in planning.described(plan, resumed)
    assert resumed.of_training(plan) == pytest.approx((960 + 2000) / 2000 / 9)
    assert "no step is left" in planning.described(plan, Costs(24, 24, sizes, 1e-3))


def test_an_older_log_is_read() -> None:
    assert Plan.of_row({"every": 3, "share": 0.5, "last_share": 1.0}) == Plan(3, 0.5, 1.0)
    assert Plan.of_row(Plan(3, 0.5, 1.0).as_json()) == Plan(3, 0.5, 1.0)
    assert Plan.of_row({}) is None
    for damaged in ({"every": 0, "share": 1.0, "last_share": 1.0}, {"every": "x", "share": 1.0, "last_share": 1.0}):
        with pytest.raises(RazorError, match="every"):
            checked(LogRow, damaged, "A row")


def test_tokens_of_a_step_are_those_of_the_first_rows() -> None:
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=3)
    rows = [{"input_ids": [1] * length} for length in (2, 4, 30)]
    for dataset in (rows, Dataset.from_list(rows)):
        loader = SimpleNamespace(dataset=dataset)
        assert tokens_of_step(args, loader) == 12 * 12
        assert tokens_of_step(SimpleNamespace(**vars(args), max_length=6), loader) == 12 * 4
    for unseen in ([{"text": "a"}], [], iter(rows), Dataset.from_list([{"text": "a"}]), None, 3):
        assert tokens_of_step(args, SimpleNamespace(dataset=unseen)) is None


def boom(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class Streaming(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ROWS


class Listening(TrainerCallback):  # type: ignore[misc]
    """What was said of the plan before the first step."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd, self.before = capfd, ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = self.before or self.capfd.readouterr().out


@pytest.mark.parametrize(
    ("config", "due"),
    [
        ({"max_steps": 24}, [6, 12, 18, 24]),
        ({"max_steps": 3}, [1, 2, 3]),
        ({"max_steps": -1, "num_train_epochs": 1.3}, [4, 8, 12, 13]),
        ({"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, [2, 4, 6, 8]),
    ],
    ids=["short", "shortest", "epochs", "accumulation"],
)
def test_the_plan_is_said_before_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], config: dict[str, Any], due: list[int]
) -> None:
    watching, listening = watch(tmp_path), Listening(capfd)
    trainer_of(tmp_path, [watching, listening], **config).train()
    assert [reading.step for reading in watching.readings] == due
    assert f"plan: {len(due)} readings, after steps {', '.join(map(str, due[:-1]))} and {due[-1]}, on 16 of 24" in (
        listening.before
    )
    assert "% of training by the tokens that are read" in listening.before
    assert capfd.readouterr().out.count("[razor] plan: a step of training takes ") == 1
    assert watching.schedule is not None
    assert watching.schedule.costs is not None
    assert watching.schedule.costs.worth is not None
    # Eight rows of six tokens a step, however they are shared out.
    assert watching.schedule.costs.worth(1.0) == pytest.approx(2 * watching.base.tokens / (3 * 8 * 6))  # type: ignore[union-attr]


def test_of_rows_that_stream_it_is_decided_after_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watching, listening = watch(tmp_path), Listening(capfd)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=8, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(
        tiny_llama(), arguments, train_dataset=Streaming(), processing_class=char_tokenizer(),
        callbacks=[watching, listening],
    ).train()  # fmt: skip
    assert "How often is decided after the first step" in listening.before
    assert "at least every 10 steps, which is 4 times or more" in listening.before
    assert "plan: 4 readings, after steps 10, 20, 30 and 40" in capfd.readouterr().out
    assert [reading.step for reading in watching.readings] == [10, 20, 30, 40]


def test_what_the_user_asked_for_is_priced_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    watching, listening = watch(tmp_path, every=4), Listening(capfd)
    trainer_of(tmp_path, [watching, listening]).train()
    assert "plan: 2 readings, after steps 4 and 6, as `every` says, on all 24 prompts and all 24" in listening.before
    assert "% of training by the tokens" in listening.before


def test_a_run_resumes_by_the_plan_of_an_older_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, [watch(tmp_path)], **saving).train()
    log = tmp_path / "razor.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row |= {"every": 5, "share": row.pop("probe_fraction"), "last_share": row.pop("last_probe_fraction")}
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    resumed, listening = watch(tmp_path), Listening(capfd)
    trainer_of(tmp_path, [resumed, listening], **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "plan: 2 readings, after steps 5 and 6, on 16 of 24" in listening.before
    assert [reading.step for reading in resumed.readings] == [5, 6]


def test_a_law_that_may_not_judge_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    law = law_of(model, scale=0.01)
    guessing = changed(law, choice__guess=0.0)
    assert law.useful
    assert not guessing.useful
    watching = watch(tmp_path, guessing, budget=1e-6, on_budget="stop")
    trainer = trainer_of(tmp_path, [watching], model)
    trainer.train()
    assert trainer.state.global_step == 6
    assert [reading.within for reading in watching.readings] == [None] * len(watching.readings)
    out = capfd.readouterr().out
    assert out.count("the budget is not watched") == 1
    assert "over the budget" not in out


def test_a_set_up_that_takes_long_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines where there is no terminal, of the first process; a bar with time left where there is one."""
    trainer_of(tmp_path, [watch(tmp_path)])
    assert "[razor]" not in capfd.readouterr().err  # it is quick
    monkeypatch.setattr(waiting, "LINE_EVERY", 0.0)
    trainer_of(tmp_path, [watch(tmp_path / "other")])
    err = capfd.readouterr().err
    assert re.search(r"\[razor\] the base completes the prompts: 17%, about [0-9.e-]+ s left", err)
    with SetUpProgress(speaks=False, draws=True) as quiet:
        quiet("the base reads", 0.5)
    assert capfd.readouterr().err == ""
    with monkeypatch.context() as patched, SetUpProgress(speaks=True, draws=True) as unheard:
        patched.setattr(sys, "stderr", SimpleNamespace(write=boom, flush=boom))
        unheard("the base reads", 0.1)
        unheard("the base reads", 0.5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with SetUpProgress(speaks=True, draws=True) as drawn:
        drawn("the base reads", 0.01)
        time.sleep(0.11)  # as often as tqdm draws
        drawn("the base reads", 0.5)
        drawn("something else", 0.5)
    err = capfd.readouterr().err
    assert "[razor] the base reads:  50%|" in err
    assert "<00:0" in err
    assert "\n" not in err.rstrip("\n")
