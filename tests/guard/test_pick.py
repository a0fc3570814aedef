"""Picking a checkpoint: the frontier against brute force, folders of a real Trainer, measured ones, and bad input."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import ForgettingMonitor
from rlrazor.guard.base_side import BaseSide
from rlrazor.guard.metric import NewScore, is_lower_better
from rlrazor.guard.pick import Pick, pick
from rlrazor.guard.scored import DropEstimate, Forgetting, ScoredCheckpoint, frontier
from rlrazor.guard.verdict import Limits, Verdict
from rlrazor.lm import kl, probes
from rlrazor.lm.models import load
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.report import drawing
from rlrazor.report.drawing import Figure, Points
from rlrazor.runs import items
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def candidate(step: int, new: float, drop: float, spread: float = 0.0) -> ScoredCheckpoint:
    return ScoredCheckpoint(f"checkpoint-{step}", step, new, DropEstimate(drop, drop - spread, drop + spread))


def taken(found: Pick) -> ScoredCheckpoint:
    assert found.advice.recommended is not None
    return found.advice.recommended


@pytest.mark.parametrize("lower", [False, True])
def test_the_frontier_is_what_nothing_beats(lower: bool) -> None:
    rng = np.random.default_rng(0)
    sign = -1 if lower else 1
    for _ in range(50):
        values = {step: rng.integers(0, 6, 2) / 5 for step in range(12)}
        many = [candidate(step, *of) for step, of in values.items()]
        front = frontier(many, lower_is_better=lower)
        beaten = [
            any(
                sign * other.new >= sign * one.new
                and values[other.step][1] <= values[one.step][1]
                and (sign * other.new > sign * one.new or values[other.step][1] < values[one.step][1])
                for other in many
            )
            for one in many
        ]
        unbeaten = {(one.new, one.drop) for one, is_beaten in zip(many, beaten, strict=True) if not is_beaten}
        assert {(one.new, one.drop) for one in front} == unbeaten
        assert len(front) == len(unbeaten)  # of equals, the earliest
        for one in front:
            assert one.step == min(other.step for other in many if (other.new, other.drop) == (one.new, one.drop))


Drops = dict[int, tuple[float, float, float]]


def write_run(folder: Path, metric: str, values: dict[int, float], drops: Drops, run: str | None = None) -> Path:
    """Checkpoints of a Trainer and the log of a monitor, whose run has an id or, as in older versions, none."""
    history = [{"step": step, "epoch": step / 10, metric: value} for step, value in values.items()]
    for step in values:
        own = [entry for entry in history if entry["step"] <= step]
        write_checkpoint(folder / f"checkpoint-{step}", step, own, run)
    (folder / "razor.jsonl").write_text(rows(drops, run))
    return folder


def write_checkpoint(folder: Path, step: int, history: list[Any], run: str | None = None, **settings: Any) -> None:
    """In the order in which a Trainer and a monitor write its files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    state = {"global_step": step, "log_history": history, **settings}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if run is not None:
        saved = hashlib.sha256((folder / "trainer_state.json").read_bytes()).hexdigest()[:16]
        (folder / "razor.json").write_text(json.dumps({"run": run, "step": step, "state": saved}))


def rows(drops: Drops, run: str | None = None) -> str:
    """Lines of a monitor's log."""
    own = {} if run is None else {"run": run}
    found = [
        {**own, "step": step, "forecast": {"drop": drop, "low": low, "high": high}}
        for step, (drop, low, high) in drops.items()
    ]
    return "".join(json.dumps(row) + "\n" for row in found)


def age(folder: Path, seconds: float) -> None:
    """Make all files of a folder older."""
    for path in folder.rglob("*"):
        if path.is_file():
            at = path.stat().st_mtime - seconds
            os.utime(path, (at, at))


def names(found: Pick) -> list[str]:
    return [one.name for one in found.candidates]


def test_the_best_within_the_budget_or_score_minus_drop(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        "eval_accuracy",
        {5: 0.5, 10: 0.6, 15: 0.58, 20: 0.9},
        {5: (0.0, 0.0, 0.01), 10: (0.01, 0.0, 0.05), 15: (0.015, 0.0, 0.05), 20: (0.2, 0.1, 0.3)},
    )
    found = pick(run)
    assert [one.step for one in found.candidates] == [5, 10, 15, 20]
    assert [one.step for one in found.frontier] == [5, 10, 20]
    assert taken(found).step == 20  # .9 - .2 against .6 - .01
    assert "eval_accuracy minus forecast drop is highest: 90.0 - 20.0 points" in found.advice.why
    assert taken(pick(run, Limits(0.02))).step == 10
    assert taken(pick(run, Limits(0.02, cautious=True))).step == 5
    assert taken(pick(run, Limits(cautious=True))).step == 20
    # Judged by upper ends, the best may be off the frontier, which is the forecast's.
    surer = write_run(
        tmp_path / "surer", "eval_accuracy", {5: 0.5, 10: 0.6}, {5: (0.01, 0.0, 0.015), 10: (0.005, 0.0, 0.3)}
    )
    assert [one.step for one in pick(surer).frontier] == [10]
    found = pick(surer, Limits(0.02, cautious=True))
    assert taken(found).step == 5
    assert "it is off the frontier" in found.advice.why
    assert taken(pick(surer, Limits(cautious=True))).step == 5
    none = pick(run, Limits(0.005, cautious=True))
    assert none.advice.recommended is None
    assert none.advice.verdict is Verdict.ABOVE
    assert (
        "within the budget of 0.5 points: the least that any drops, by the upper end of its interval, is 1.0 (chec"
        in (none.advice.why)
    )
    assert "By the estimate alone there is checkpoint-5." in none.advice.why
    assert [one.step for one in none.candidates] == [5, 10, 15, 20]
    with pytest.raises(RazorError, match="fraction of 1"):
        pick(run, Limits(20))
    loss = write_run(tmp_path / "loss", "eval_loss", {5: 3.0, 10: 2.0}, {5: (0.0, 0.0, 0.1), 10: (0.01, 0.0, 0.1)})
    assert taken(pick(loss, Limits(0.02))).step == 10
    with pytest.raises(RazorError, match="eval_loss is not a fraction of 1"):
        pick(loss)


LOWER = """
    loss eval_loss train_loss val_loss_1 eval_loss/mean loss/policy_avg eval_loss_gsm8k nll_loss aux_loss log_loss
    evalLoss fold_1_loss center_rewards_loss eval_perplexity perplexity/mean wikitext/word_perplexity,none
    eval_ppl_c4 kl mean_kl objective/kl kl_mean policy/approxkl_avg eval_kl_divergence eval/brier eval_brier_score
    eval_ece eval_nll_per_token eval_neg_log_likelihood eval_cross_entropy eval_wer eval_cer eval_rmse eval_smape
    eval_mean_absolute_error eval_bpc bits_per_byte eval_error_rate num_errors eval_failure_rate
    eval_false_negative_rate eval_edit_distance crows_pairs/likelihood_diff
"""
HIGHER = """
    reward eval_reward reward/mean eval_accuracy mean_token_accuracy accuracy acc_norm rewards/accuracies
    rewards/margins rewards/chosen logps/chosen objective/scores eval_f1 eval_bleu eval_rougeL eval_exact_match
    eval_pass@1 eval_match_rate eval_neg_log_loss neg_mean_squared_error eval_negative_mse 1-wer log_likelihood
    eval_true_negative_rate eval_loss_reduction eval_wer_accuracy eval_answer eval_clear eval_terse eval_center
    eval_place eval_skill eval_number
"""


def test_of_some_metrics_less_is_better_by_their_names() -> None:
    assert [name for name in LOWER.split() if not is_lower_better(name)] == []
    assert [name for name in HIGHER.split() if is_lower_better(name)] == []


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("eval_wer", True), ("eval_perplexity", True), ("eval_error_rate", True), ("eval_rmse", True), ("kl", True),
        ("eval_bpc", True), ("eval_neg_log_loss", False),
        ("eval_answer", False), ("eval_reward", False), ("eval_clear", False), ("eval_terse", False),
    ],
)  # fmt: skip
def test_of_some_metrics_less_is_better(tmp_path: Path, metric: str, lower: bool) -> None:
    run = write_run(tmp_path, metric, {5: 0.9, 10: 0.1}, {5: (0.0, 0.0, 0.1), 10: (0.01, 0.0, 0.1)})
    best, worst = (10, 5) if lower else (5, 10)
    assert taken(pick(run, Limits(0.1), NewScore(metric))).step == best
    assert taken(pick(run, Limits(0.1), NewScore(metric, lower_is_better=not lower))).step == worst
    assert main(["pick", str(run), "--metric", metric, "--budget", "0.1", "--no-lower-is-better"]) == 0


def test_what_weakens_a_forecast_is_noted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "reward", {5: 0.5, 10: 0.6}, {5: (0.01, 0.0, 0.1), 10: (0.02, 0.0, 0.1)})
    rows = [json.loads(line) for line in (run / "razor.jsonl").read_text().splitlines()]
    rows[1]["forecast"]["extrapolated"] = True
    lines = (json.dumps({**row, "level": 0.8, "law_useful": False}) for row in rows)
    (run / "razor.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert main(["pick", str(run)]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "forecast drop, points (80% interval)" in out
    assert "checkpoint-10: KL is beyond what the law was fitted to" in out
    assert "checkpoint-5: KL is beyond" not in out
    assert "no better than guessing, or fitted to noise: do not rely on it" in out


def test_a_value_of_an_earlier_step_is_said_and_a_missing_one_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "reward", {5: 0.5, 10: 0.6}, {7: (0.01, 0.0, 0.1)})
    found = pick(run)
    assert [one.step for one in found.candidates] == [10]
    assert found.notes == [
        "checkpoint-5 is left out: nothing was measured up to its step.",
        "checkpoint-10: the drop is that of step 7.",
    ]
    diverged = write_run(
        tmp_path / "diverged", "reward", {5: 0.5, 10: float("nan")}, {5: (0.01, 0.0, 0.1), 10: (0.02, 0.0, 0.1)}
    )
    assert [(one.step, one.new) for one in pick(diverged).candidates] == [(5, 0.5), (10, 0.5)]
    with (diverged / "razor.jsonl").open("a") as log:
        log.write('{"step": 12, "forec')  # killed there
    assert len(pick(diverged).candidates) == 2


def test_what_is_damaged_or_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="There is no folder"):
        pick(tmp_path / "nowhere")
    with pytest.raises(RazorError, match="has no checkpoint-N folder"):
        pick(tmp_path)
    run = write_run(tmp_path / "run", "custom", {5: 0.5}, {5: (0.0, 0.0, 0.1)})
    with pytest.raises(RazorError, match=r"name one by its metric\. Logged: custom"):
        pick(run)
    with pytest.raises(RazorError, match=r"other was not logged\. Logged: custom"):
        pick(run, score=NewScore("other"))
    assert taken(pick(run, score=NewScore("custom"))).step == 5
    (run / "razor.jsonl").write_text('{"step": 5, "forecast": null}\n')
    with pytest.raises(RazorError, match="uncalibrated"):
        pick(run, score=NewScore("custom"))
    (run / "razor.jsonl").write_text('{"forecast": {"drop": 0.1}}\n')
    with pytest.raises(RazorError, match=r"damaged.*'step'"):
        pick(run, score=NewScore("custom"))
    (run / "razor.jsonl").write_text("{\n")
    with pytest.raises(RazorError, match="damaged"):
        pick(run, score=NewScore("custom"))
    (run / "razor.jsonl").unlink()
    with pytest.raises(RazorError, match="watch` measure the run, or measure"):
        pick(run, score=NewScore("custom"))
    found = pick(
        run, score=NewScore("custom"), measure=lambda path, step: Forgetting(step, DropEstimate(0.1, 0.0, 0.2))
    )
    assert taken(found).at("drop", upper=True) == 0.2
    (run / "checkpoint-5" / "trainer_state.json").write_text("{")
    with pytest.raises(RazorError, match=r"trainer_state\.json is damaged"):
        pick(run, score=NewScore("custom"))


# --- without a law, and what is within a budget

KLS = {5: (0.2, 0.02, 1.0), 10: (0.5, 0.1, 0.8), 15: (0.4, 0.1, 2.0), 20: (1.5, None, 0.9)}


def write_unforecast(folder: Path, metric: str = "reward", log: str = "razor.jsonl") -> Path:
    """A run that was watched without a law: KL on the new task's prompts, its error, and KL on the generic probe."""
    write_run(folder, metric, {5: 0.5, 10: 0.6, 15: 0.7, 20: 0.9}, {}, "a")
    lines = [
        {"run": "a", "step": step, "kl_forward": kl, "kl_forward_stderr": error, "kl_probe": probe,
         "kl_probe_stderr": 0.01, "forecast": None, "level": None}
        for step, (kl, error, probe) in KLS.items()
    ]  # fmt: skip
    (folder / "razor.jsonl").unlink()
    (folder / log).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_log_that_says_nothing_of_forgetting_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "reward", {5: 0.5}, {})
    (run / "razor.jsonl").write_text('{"step": 5, "forecast": null}\n')
    said = "has neither KL nor a forecast (the run was uncalibrated): measure the checkpoints here, with --base and"
    with pytest.raises(RazorError, match=re.escape(said)):
        pick(run)


def test_without_a_law_there_are_frontiers_against_kl(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_unforecast(tmp_path)
    assert main(["pick", str(run)]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert (
        "No checkpoint is recommended. On the frontier of reward against KL on the new task's prompts checkpoint-5, "
        "checkpoint-15, checkpoint-20, against KL on the generic probe checkpoint-10, checkpoint-20." in out
    )
    assert "--kl-budget NATS (KL on the new task's prompts) or --kl-budget-probe NATS" in out
    assert "Without a law of the base nothing is known of the prior scores" in out
    assert "0.500 ± 0.100" in out
    assert main(["pick", str(run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["frontiers"] == {
        "kl_forward": ["checkpoint-5", "checkpoint-15", "checkpoint-20"],
        "kl_probe": ["checkpoint-10", "checkpoint-20"],
    }
    assert (found["recommended"], found["verdict"], found["exit_code"]) == (None, None, 0)
    assert found["candidates"][3]["kl"]["kl_forward"] == {"mean": 1.5, "stderr": None}
    # Of a metric that is no fraction as well: nothing is weighed.
    assert pick(write_unforecast(tmp_path / "loss", "loss")).advice.recommended is None


def test_an_interval_beyond_what_the_law_was_fitted_to_lets_nothing_pass(tmp_path: Path) -> None:
    run = write_run(tmp_path, "reward", {5: 0.5, 10: 0.9}, {5: (0.01, 0.0, 0.015), 10: (0.012, 0.0, 0.018)})
    rows = [json.loads(line) for line in (run / "razor.jsonl").read_text().splitlines()]
    rows[1]["forecast"]["extrapolated"] = True
    (run / "razor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pick(run, Limits(0.02))
    assert (taken(found).step, found.advice.verdict) == (10, Verdict.UNCERTAIN)
    assert "beyond what the law was fitted to, and its interval is of smaller ones" in str(found.advice.doubt)
    assert pick(run, Limits(0.02, accept_uncertain=True)).advice.verdict is Verdict.WITHIN
    cautious = pick(run, Limits(0.02, cautious=True))
    assert (taken(cautious).step, cautious.advice.verdict) == (5, Verdict.WITHIN)
    assert taken(pick(run, Limits(cautious=True))).step == 10  # nothing is judged: .9 less .018 is the most


def test_a_kl_of_two_prompts_has_the_interval_of_two(tmp_path: Path) -> None:
    """.2 with an error of .02 on 2 prompts: Student's t of 1 degree of freedom is 12.7, not 2."""
    run = write_unforecast(tmp_path)
    rows = [json.loads(line) for line in (run / "razor.jsonl").read_text().splitlines()]
    for count, budget, verdict in ((2, 0.45, "UNCERTAIN"), (2, 0.46, "WITHIN"), (60, 0.25, "WITHIN")):
        lines = [json.dumps({**row, "prompts": {"kl_forward": count}}) + "\n" for row in rows[:1]]
        (run / "razor.jsonl").write_text("".join(lines))
        assert pick(run, Limits(kl=budget)).advice.verdict is Verdict[verdict]


def limits_of(options: dict[str, Any]) -> Limits:
    """Of the options of the command."""
    names = {"budget": "drop", "kl_budget": "kl", "kl_budget_probe": "kl_probe"}
    return Limits(**{names.get(name, name): value for name, value in options.items()})


@pytest.mark.parametrize(
    ("options", "step", "code"),
    [
        # By the estimate: .4 and .5 are within .5; .4 + 2 x .1 is not, .2 + 2 x .02 is.
        ({"kl_budget": 0.5}, 15, 3),
        ({"kl_budget": 0.5, "cautious": True}, 5, 0),
        ({"kl_budget": 0.5, "accept_uncertain": True}, 15, 0),
        ({"kl_budget": 0.7}, 15, 0),
        ({"kl_budget": 0.1}, None, 1),
        ({"kl_budget_probe": 1.5}, 20, 0),
        ({"kl_budget_probe": 1.5, "kl_budget": 0.8}, 10, 0),
        ({"kl_budget_probe": 0.85, "kl_budget": 0.3}, None, 1),
        # Without a standard error KL may be three times as large.
        ({"kl_budget": 4.4}, 20, 3),
        ({"kl_budget": 4.6}, 20, 0),
        # No law may judge points.
        ({"budget": 0.5}, None, 3),
        ({"budget": 0.5, "accept_uncertain": True}, None, 3),
        ({"budget": 0.5, "kl_budget": 0.7}, 15, 3),
        ({"budget": 0.5, "kl_budget": 0.1}, None, 1),
    ],
)
def test_kl_budgets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any], step: int | None, code: int
) -> None:
    run = write_unforecast(tmp_path)
    found = pick(run, limits_of(options))
    assert (found.advice.recommended.step if found.advice.recommended else None) == step
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()]
    assert main(["pick", str(run), *flags]) == code
    out = capfd.readouterr().out
    assert all(f"checkpoint-{step}" in out for step in KLS)
    assert ("Take" in out) == (step is not None)
    assert ("cannot be told." in " ".join(out.split())) == (code == 3 and "budget" in options)
    assert main(["pick", str(run), *flags, "--json"]) == code
    assert json.loads(capfd.readouterr().out)["exit_code"] == code


@pytest.mark.parametrize(
    ("budget", "flags", "step", "code"),
    [
        (0.05, [], 20, 3), (0.05, ["--cautious"], 10, 0), (0.05, ["--accept-uncertain"], 20, 0),
        (0.12, [], 20, 0), (0.001, [], None, 1), (0.001, ["--cautious"], None, 1),
        (0.001, ["--accept-uncertain"], None, 1), (0.015, [], 5, 0),
    ],
)  # fmt: skip
def test_a_forecast_whose_interval_holds_the_budget_does_not_pass(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], budget: float, flags: list[str], step: int | None, code: int
) -> None:
    drops: Drops = {5: (0.01, 0.0, 0.015), 10: (0.02, 0.01, 0.03), 20: (0.04, 0.01, 0.1)}
    run = write_run(tmp_path, "reward", {5: 0.5, 10: 0.6, 20: 0.9}, drops)
    command = ["pick", str(run), "--budget", str(budget), *flags]
    assert main([*command, "--json"]) == code
    found = json.loads(capfd.readouterr().out)
    assert (found["recommended"] or {"step": None})["step"] == step
    assert len(found["candidates"]) == 3
    assert main(command) == code
    out = " ".join(capfd.readouterr().out.split())
    assert "checkpoint-20 0.9 4.0 [1.0, 10.0]" in out
    if code == 1:
        assert "No checkpoint is within the budget of 0.1 points: the least that any drops" in out
    if code == 3:
        assert (
            "Whether checkpoint-20 is within the budget cannot be told: its interval of 1.0 to 10.0 points holds the "
            "budget of 5.0. By their whole intervals there are checkpoint-5, checkpoint-10, the best of which "
            "--cautious takes; --accept-uncertain goes by the estimates alone." in out
        )


def test_a_law_that_was_not_to_be_relied_on_recommends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_unforecast(tmp_path)
    log = run / "razor.jsonl"
    forecast = {"forecast": {"drop": 0.01, "low": 0.0, "high": 0.02}, "law_useful": False}
    log.write_text(
        "".join(json.dumps({**json.loads(line), **forecast}) + "\n" for line in log.read_text().splitlines())
    )
    assert main(["pick", str(run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["recommended"] is None
    assert list(found["frontiers"]) == ["kl_forward", "kl_probe"]
    assert found["notes"] == ["The law was no better than guessing, or fitted to noise: do not rely on it."]
    assert main(["pick", str(run), "--budget", "0.5"]) == 3
    out = " ".join(capfd.readouterr().out.split())
    assert "within the budget of 50.0 points cannot be told. The law was no better than guessing" in out
    assert "on the frontier" in out
    assert " within " not in out.split("No checkpoint is recommended")[0]
    log.write_text(log.read_text().replace('"law_useful": false', '"law_useful": false, "law_objection": "Noise."'))
    assert pick(run).notes == ["Noise."]


def test_another_monitors_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_unforecast(tmp_path, log="other[1].jsonl")
    assert main(["pick", str(run)]) == 2
    assert "There are no rows of the run a" in " ".join(capfd.readouterr().err.split())
    other = run / "other[1].jsonl"
    lines = other.read_text().splitlines(keepends=True)
    (run / "other[1]-of-earlier-run-1.jsonl").write_text("".join(lines[:2]))
    other.write_text("".join(lines[2:]))
    assert main(["pick", str(run), "--log", str(other), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["candidates"]) == 4
    assert main(["pick", str(run), "--log", str(run / "none.jsonl")]) == 2
    assert "none.jsonl, which --log names" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(RazorError, match="Either a log says"):
        pick(run, log=other, measure=lambda path, step: Forgetting(step, DropEstimate(0.1, 0.0, 0.2)))


@pytest.mark.parametrize("bad", ["nan", "-1", "inf"])
def test_budgets_that_make_no_sense_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], bad: str) -> None:
    run = write_unforecast(tmp_path)
    for option in ("--budget", "--kl-budget", "--kl-budget-probe"):
        assert main(["pick", str(run), f"{option}={bad}"]) == 2
        assert f"{option} must be " in capfd.readouterr().err
        with pytest.raises(RazorError, match=r"budget\w* must be "):
            pick(run, limits_of({option[2:].replace("-", "_"): float(bad)}))
    without = write_run(tmp_path / "old", "reward", {5: 0.5}, {5: (0.0, 0.0, 0.1)})
    with pytest.raises(RazorError, match="KL on the generic probe was not measured"):
        pick(without, Limits(kl_probe=1.0))
    with pytest.raises(RazorError, match="not both"):
        pick(run, Limits(cautious=True, accept_uncertain=True))


@pytest.mark.parametrize(
    "change",
    [
        {"kl_forward": float("nan")}, {"kl_forward": "0.1"}, {"kl_forward": True}, {"kl_forward_stderr": float("inf")},
        {"kl_forward": 10**400}, {"forecast": {"drop": "0.1", "low": 0, "high": 1}}, {"forecast": {"drop": 0.1}},
        {"forecast": {"drop": 0.1, "low": 0, "high": 1}, "level": "0.9"}, {"forecast": [1]}, {"step": None},
    ],
)  # fmt: skip
def test_a_row_that_is_no_measurement_is_damage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    log = write_unforecast(tmp_path) / "razor.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]) + "\n")
    assert main(["pick", str(tmp_path), "--kl-budget", "1"]) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert "razor.jsonl" in err
    assert "easure the checkpoints anew" in err


def test_what_needs_no_model_is_said_before_one_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", "loss", LOSSES, {})
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "records.parquet").write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text("a")
    law_of(tiny_llama()).save(tmp_path / "law.json")
    measure = ["--base", "there-is-no-such/model", "--prompts", str(tmp_path / "prompts.txt")]
    law = ["--law", str(tmp_path / "law.json")]
    for folder, more, message in (
        (run, ["--metric", "other"], "other was not logged. Logged: loss."),
        (run, law, "loss is not a fraction of 1, so it cannot be weighed"),
        (run, ["--kl-budget", "-1"], "--kl-budget must be at least 0, not -1."),
        (run, ["--log", str(run / "razor.jsonl")], "give one of them"),
        (sweep, [], "is of a sweep, whose scores were measured"),
    ):
        assert main(["pick", str(folder), *measure, *more]) == 2
        assert message in " ".join(capfd.readouterr().err.split())


def test_the_figure_has_a_panel_for_each_frontier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda figure, folder: drawn.append(figure))
    run = write_unforecast(tmp_path / "run")
    assert main(["pick", str(run), "--kl-budget", "0.7", "--figure", str(tmp_path)]) == 0
    forecast = write_run(tmp_path / "forecast", "reward", {5: 0.5}, {5: (0.0, 0.0, 0.1)})
    assert main(["pick", str(forecast), "--figure", str(tmp_path)]) == 0
    assert [[panel.y.label for panel in figure.panels] for figure in drawn] == [
        ["KL on the new task's prompts, nats", "KL on the generic probe, nats"],
        ["forecast drop of the prior score, points"],
    ]
    star = drawn[0].panels[1].layers[-1]
    assert (list(star.x), list(star.y)) == ([0.7], [2.0])
    assert isinstance(star, Points)
    assert star.interval
    assert star.interval.high == pytest.approx([2.02])


def test_a_reason_that_is_that_of_all_checkpoints_is_said_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, {})

    def measure(path: Path, step: int) -> Forgetting:
        if step > 4:
            raise RazorError("the same.")
        return Forgetting(step, DropEstimate(0.01, 0.0, 0.02))

    assert pick(run, Limits(0.5), measure=measure).notes == ["checkpoint-8, checkpoint-12 are left out: the same."]


def test_adapters_without_peft_are_one_sentence_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, "loss", LOSSES, {})
    for step in LOSSES:
        (run / f"checkpoint-{step}" / "model.safetensors").rename(
            run / f"checkpoint-{step}" / "adapter_model.safetensors"
        )
        (run / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("a")
    monkeypatch.setattr("rlrazor.extras._is_installed", lambda package: package != "peft")
    assert main(["pick", str(run), "--base", "none", "--prompts", str(tmp_path / "prompts.txt")]) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert err.count("An adapter needs the package peft") == 1
    assert "left out" not in err


# --- folders that hold more than one whole run


LOSSES = {4: 3.0, 8: 2.0, 12: 1.5}
DROPS = {4: (0.01, 0.0, 0.02), 8: (0.02, 0.0, 0.03), 12: (0.03, 0.0, 0.04)}


@pytest.mark.parametrize("labels", [(None, None), ("a", "b"), (None, "b")])
def test_a_later_shorter_run_does_not_take_the_rest_of_an_earlier_one(
    tmp_path: Path, labels: tuple[str | None, str | None]
) -> None:
    write_run(tmp_path, "loss", {4: 9.0, 8: 8.0, 12: 7.0, 16: 0.1}, {4: (0.5, 0.4, 0.6)}, labels[0])
    age(tmp_path, 100)
    (tmp_path / "razor.jsonl").rename(tmp_path / "razor-of-earlier-run-1.jsonl")
    for step in (4, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    write_run(tmp_path, "loss", {4: 3.0, 8: 2.0}, {4: DROPS[4], 8: DROPS[8]}, labels[1])
    found = pick(tmp_path, Limits(0.5))
    assert [(one.step, one.new, one.at("drop")) for one in found.candidates] == [(4, 3.0, 0.01), (8, 2.0, 0.02)]
    assert taken(found).step == 8
    assert len(found.notes) == 1
    assert "Left out: checkpoint-12, checkpoint-16" in found.notes[0]
    measured = pick(tmp_path, Limits(0.5), measure=lambda path, step: Forgetting(step, DropEstimate(0.1, 0.0, 0.2)))
    assert names(measured) == ["checkpoint-4", "checkpoint-8"]
    if labels[0]:
        assert "--run a takes that run" in found.notes[0]
        older = pick(tmp_path, Limits(0.9), run="a")
        assert [(one.step, one.new, one.at("drop")) for one in older.candidates] == [(12, 7.0, 0.5), (16, 0.1, 0.5)]
        with pytest.raises(RazorError, match=r"is of the run c\. There are a, b"):
            pick(tmp_path, run="c")


def test_runs_of_a_real_trainer_are_told_apart_by_their_own_logs(tmp_path: Path) -> None:
    """A run of six steps; one of two in the same folder, which is then taken to four."""
    data = Dataset.from_list(
        [{"input_ids": ids, "labels": ids} for ids in char_tokenizer()(["a0:b;", "c1:d;"] * 8).input_ids]
    )

    def train(seed: int, steps: int, resume: bool = False) -> None:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, use_cpu=True, report_to="none", save_steps=2, logging_steps=2,
            disable_tqdm=True, per_device_train_batch_size=4, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(tiny_llama(seed=seed), args, train_dataset=data, processing_class=char_tokenizer())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)

    def logged(step: int) -> list[float]:
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def found() -> list[tuple[int, float]]:
        measured = pick(
            tmp_path,
            Limits(0.5),
            NewScore("loss"),
            measure=lambda path, step: Forgetting(step, DropEstimate(0.1, 0.0, 0.2)),
        )
        return [(one.step, one.new) for one in measured.candidates]

    train(0, 6)
    assert found() == [(2, logged(2)[-1]), (4, logged(4)[-1]), (6, logged(6)[-1])]
    first = logged(6)
    train(1, 2)
    assert logged(2)[0] != first[0]
    assert found() == [(2, logged(2)[0])]
    train(1, 4, resume=True)
    assert found() == list(zip((2, 4), logged(4), strict=True))
    assert logged(6) == first


def test_an_earlier_longer_run_that_logged_nothing_yet_is_left_out(tmp_path: Path) -> None:
    """Nothing tells the runs' logs apart: their order does."""
    last = [{"step": 8, "loss": 2.0}]
    write_checkpoint(tmp_path / "checkpoint-12", 12, last, save_steps=4)
    write_checkpoint(tmp_path / "checkpoint-16", 16, last, save_steps=4)
    age(tmp_path, 100)
    write_checkpoint(tmp_path / "checkpoint-4", 4, [], save_steps=4)
    (tmp_path / "razor.jsonl").write_text(rows(DROPS))
    with pytest.raises(RazorError, match="loss was not logged"):
        pick(tmp_path, score=NewScore("loss"))
    # In one run, in which nothing was logged at first, they follow each other.
    write_checkpoint(tmp_path / "checkpoint-8", 8, last, save_steps=4)
    found = pick(tmp_path, Limits(0.5), NewScore("loss"))
    assert names(found) == ["checkpoint-8", "checkpoint-12", "checkpoint-16"]
    assert any("Written before checkpoint-8: checkpoint-12, checkpoint-16" in note for note in found.notes)
    # Of another schedule, they do not.
    write_checkpoint(tmp_path / "checkpoint-8", 8, last, save_steps=8)
    assert names(pick(tmp_path, Limits(0.5), NewScore("loss"))) == ["checkpoint-8"]


def test_what_is_logged_after_a_checkpoint_at_its_step_counts(tmp_path: Path) -> None:
    """An evaluation of the checkpoints as they are saved is in the log of the next."""
    first = [{"step": 4, "loss": 3.0}]
    second = [*first, {"step": 4, "eval_accuracy": 0.5}, {"step": 8, "loss": float("nan")}]
    write_checkpoint(tmp_path / "checkpoint-4", 4, first)
    write_checkpoint(tmp_path / "checkpoint-8", 8, second)
    write_checkpoint(tmp_path / "checkpoint-12", 12, [*second, {"step": 8, "eval_accuracy": 0.7}])
    (tmp_path / "razor.jsonl").write_text(rows(DROPS))
    found = pick(tmp_path)
    assert [(one.step, one.new) for one in found.candidates] == [(4, 0.5), (8, 0.7), (12, 0.7)]
    assert found.notes == ["checkpoint-12: eval_accuracy is that of step 8."]


def test_two_writers_of_one_log_are_told_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, {}, "mine")
    others = dict.fromkeys(LOSSES, (0.9, 0.9, 0.9))
    lines = zip(rows(DROPS, "mine").splitlines(), rows(others, "other").splitlines(), strict=True)
    (run / "razor.jsonl").write_text("".join(f"{mine}\n{other}\n" for mine, other in lines))
    found = pick(run, Limits(0.5))
    assert [one.at("drop") for one in found.candidates] == [0.01, 0.02, 0.03]
    assert found.notes == []
    # Checkpoints that do not say: the last to write, with a note.
    for path in run.glob("checkpoint-*/razor.json"):
        path.unlink()
    found = pick(run, Limits(0.95))
    assert [one.at("drop") for one in found.candidates] == [0.9] * 3
    assert found.notes == [
        "No checkpoint says which run it is of: the rows of the run other, the last of 2 runs in it, are taken from "
        "razor.jsonl."
    ]
    assert [one.at("drop") for one in pick(run, Limits(0.5), run="mine").candidates] == [0.01, 0.02, 0.03]
    with pytest.raises(RazorError, match=r"no rows of the run none: .* has those of other, mine"):
        pick(run, run="none")
    # Without ids nothing can be told.
    (run / "razor.jsonl").write_text("".join(rows({step: DROPS[step]}) * 2 for step in DROPS))
    with pytest.raises(RazorError, match="rows of several runs, which cannot be told apart"):
        pick(run)
    two = [{**json.loads(line), "prompts_hash": str(at)} for at, line in enumerate(rows(DROPS).splitlines())]
    (run / "razor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in two))
    with pytest.raises(RazorError, match="rows of several monitors"):
        pick(run)


def test_forecasts_are_not_given_to_checkpoints_of_a_run_that_nobody_watched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, "loss", LOSSES, DROPS, "watched")
    age(run, 100)
    # A second run writes over two of the three, and leaves the label there.
    unwatched = [{"step": step, "loss": step / 1.0} for step in (4, 8)]
    write_checkpoint(run / "checkpoint-4", 4, unwatched[:1])
    write_checkpoint(run / "checkpoint-8", 8, unwatched)
    with pytest.raises(RazorError, match=r"checkpoint-8 is of a run that no monitor watched.*--run watched takes"):
        pick(run)
    assert names(pick(run, Limits(0.5), run="watched")) == ["checkpoint-12"]
    measured = pick(run, Limits(0.5), measure=lambda path, step: Forgetting(step, DropEstimate(0.1, 0.0, 0.2)))
    assert [(one.step, one.new) for one in measured.candidates] == [(4, 4.0), (8, 8.0)]
    assert main(["pick", str(run), "--run", "watched", "--budget", "0.5"]) == 0
    assert "Take checkpoint-12" in capfd.readouterr().out


def test_where_times_do_not_tell_which_run_is_the_later_it_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, DROPS)
    write_checkpoint(run / "checkpoint-16", 16, [{"step": 4, "loss": 5.0}])
    for path in run.glob("*/*"):
        os.utime(path, (1e9, 1e9))
    with pytest.raises(RazorError, match=r"checkpoint-16 and checkpoint-\d+ are of two runs"):
        pick(run, Limits(0.5))
    shutil.rmtree(run / "checkpoint-16")
    assert pick(run, Limits(0.5)).notes == []
    os.utime(run / "razor.jsonl", (9e8, 9e8))  # the last of its rows was there before checkpoint-4
    assert "razor.jsonl is older than the checkpoints" in pick(run, Limits(0.5)).notes[0]
    # Of runs with ids the log does: an earlier run's rows have been moved away.
    shutil.rmtree(run)
    write_run(run, "loss", LOSSES, {}, "earlier")
    shutil.rmtree(run / "checkpoint-4")
    age(run, -100)
    write_run(run, "loss", {4: 5.0}, DROPS, "later")
    assert names(pick(run, Limits(0.5))) == ["checkpoint-4"]


def test_a_run_that_went_on_unwatched_from_a_watched_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, DROPS, "watched")
    age(run, 100)
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    write_checkpoint(run / "checkpoint-8", 8, [*history, {"step": 8, "loss": 1.9}])
    found = pick(run, Limits(0.5))
    assert names(found) == ["checkpoint-4"]
    assert "checkpoint-8 is left out: a run that no monitor watched has written over it" in " ".join(found.notes)
    assert "Left out: checkpoint-12, whose own logs are not those of the run of checkpoint-8" in " ".join(found.notes)
    shutil.rmtree(run / "checkpoint-8")
    write_checkpoint(run / "checkpoint-8", 8, [*history, {"step": 8, "loss": 1.9}])
    assert "Without a monitor's razor.json: checkpoint-8" in " ".join(pick(run, Limits(0.5)).notes)
    # Copied, the order of times says nothing.
    shutil.rmtree(run)
    write_run(run, "loss", LOSSES, DROPS, "watched")
    files = sorted(run.glob("*/*"), key=lambda path: (path.parent.name, path.name != "razor.json"))
    for at, path in enumerate(files):
        os.utime(path, (at / 100, at / 100))
    assert names(pick(run, Limits(0.5))) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


def test_where_measuring_ended_nothing_later_has_a_forecast(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, {4: DROPS[4]}, "a")
    with (run / "razor.jsonl").open("a") as log:
        log.write(json.dumps({"run": "a", "step": 8, "error": "Traceback ...\nValueError: no luck"}) + "\n")
    found = pick(run, Limits(0.5))
    assert names(found) == ["checkpoint-4"]
    assert found.notes == [
        "Measuring ended at step 8: ValueError: no luck",
        "checkpoint-8, checkpoint-12 are left out: measuring had ended at step 8.",
    ]


# --- checkpoints that are not whole


def test_a_checkpoint_that_cannot_be_taken_is_left_out_with_the_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "loss", {step: 1 / step for step in range(1, 12)}, {1: DROPS[4]})
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    (run / "checkpoint-3" / "trainer_state.json").write_text('{"log_history": [{"st')
    weights = run / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for step in range(5, 11):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    (run / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    (run / "checkpoint-6" / "pytorch_model_fsdp_0").mkdir()
    (run / "checkpoint-7" / "global_step7").mkdir()
    (run / "checkpoint-8" / "pytorch_model.bin").write_bytes(b"x")
    shutil.copy(run / "checkpoint-1" / "model.safetensors", run / "checkpoint-9" / "optimizer.safetensors")
    index = {"metadata": {}, "weight_map": {"weight": "model-00001-of-00002.safetensors"}}
    (run / "checkpoint-10" / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "checkpoint-13").mkdir()
    (run / "checkpoint-14").symlink_to(run / "nowhere")
    (run / "checkpoint-15.zip").write_bytes(b"x")
    found = pick(run, Limits(0.5))
    assert names(found) == ["checkpoint-1", "checkpoint-11"]
    told = {note.split(" is left out: ")[0]: note for note in found.notes if " is left out: " in note}
    for step, reason in {
        2: "no trainer_state.json", 3: "trainer_state.json is damaged", 4: "not a whole safetensors file",
        5: "it has no model.safetensors file.", 6: "FSDP's shards", 7: "DeepSpeed's shards", 8: "Pickled",
        9: "optimizer.safetensors, which transformers does not load", 10: "lacks model-00001-of-00002.safetensors",
        13: "no trainer_state.json", 14: "no trainer_state.json",
    }.items():  # fmt: skip
        assert reason in told.pop(f"checkpoint-{step}")
    assert told == {}
    for step in (1, 11):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(RazorError, match=r"No checkpoint of .* can be taken\. .*checkpoint-6 is left out"):
        pick(run, Limits(0.5))


def test_a_checkpoint_that_cannot_be_measured_is_left_out_with_the_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, {})

    def measure(path: Path, step: int) -> Forgetting:
        if step in failing:
            raise RazorError(f"its weights are damaged at {step}.")
        return Forgetting(step, DropEstimate(0.01, 0.0, 0.02))

    failing = [8]
    found = pick(run, Limits(0.5), measure=measure)
    assert names(found) == ["checkpoint-4", "checkpoint-12"]
    assert found.notes == ["checkpoint-8 is left out: its weights are damaged at 8."]
    failing = list(LOSSES)
    with pytest.raises(RazorError, match=r"damaged at 4\. .*damaged at 8\. .*damaged at 12\."):
        pick(run, Limits(0.5), measure=measure)


def test_steps_are_those_of_the_state_whatever_a_folder_is_called(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", {9: 3.0, 10: 2.0, 100: 1.0}, {9: DROPS[4], 10: DROPS[8], 100: DROPS[12]})
    (run / "checkpoint-100").rename(run / "checkpoint-7")
    shutil.copytree(run / "checkpoint-10", run / "checkpoint-best")
    (run / "checkpoint-latest").symlink_to("checkpoint-7")
    found = pick(run, Limits(0.5))
    assert [(one.name, one.step, one.at("drop")) for one in found.candidates] == [
        ("checkpoint-9", 9, 0.01), ("checkpoint-10", 10, 0.02), ("checkpoint-best", 10, 0.02),
        ("checkpoint-7", 100, 0.03),
    ]  # fmt: skip
    assert found.notes == ["checkpoint-7 is of step 100, by its trainer_state.json."]
    (run / "checkpoint-10").rename(tmp_path.parent / "elsewhere")
    (run / "checkpoint-10").symlink_to(tmp_path.parent / "elsewhere")
    assert "checkpoint-10" in names(pick(run, Limits(0.5)))


def test_weights_that_are_much_newer_than_the_state_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loss", LOSSES, DROPS)
    at = (run / "checkpoint-8" / "trainer_state.json").stat().st_mtime + 1000
    os.utime(run / "checkpoint-8" / "model.safetensors", (at, at))
    found = pick(run, Limits(0.5))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("Weights newer than the trainer_state.json beside them: checkpoint-8.")


def test_a_sweeps_table_has_measured_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "method": "base",
            "run_id": "b",
            "trajectory": "b",
            "lr": None,
            "seed": 0,
            "step": 0,
            "new": 0.1,
            "forgetting": 0.0,
        }
    ]
    for step, (new, drop) in enumerate([(0.5, 0.01), (0.8, 0.05), (0.7, 0.06)], 1):
        rows.append({**rows[0], "method": "sft", "run_id": "r", "trajectory": "t", "lr": 1e-4, "step": step} | {
            "new": new, "forgetting": drop
        })  # fmt: skip
    pl.DataFrame(rows).with_columns(prior_stderr=0.01).write_parquet(tmp_path / "records.parquet")
    assert main(["pick", str(tmp_path), "--budget", "0.02", "--json"]) == 3
    found = json.loads(capfd.readouterr().out)
    assert found["recommended"]["high"] == pytest.approx(0.01 + 1.96 * 0.01 * 2**0.5)
    assert (found["level"], found["notes"]) == (0.95, [])
    pl.DataFrame(rows).with_columns(stage=1).write_parquet(tmp_path / "records.parquet")
    assert main(["pick", str(tmp_path)]) == 2
    assert "is of tasks in sequence" in capfd.readouterr().err
    pl.DataFrame(rows).write_parquet(tmp_path / "records.parquet")
    assert main(["pick", str(tmp_path), "--budget", "0.02", "--json", "--accept-uncertain"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["recommended"]["step"] == 1
    assert [one["step"] for one in found["frontier"]] == [1, 2]
    assert found["recommended"]["measured"] is True
    assert main(["pick", str(tmp_path), "--figure", str(tmp_path)]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "Take sft lr 0.0001 seed 0 step 2 (r): new minus measured drop is highest: 80.0 - 5.0 points" in out
    assert (tmp_path / "pick.png").stat().st_size > 1000
    assert main(["pick", str(tmp_path), "--metric", "eval_reward"]) == 2
    assert "own measured scores are used" in capfd.readouterr().err
    (tmp_path / "records.parquet").write_text("x")
    assert main(["pick", str(tmp_path)]) == 2
    assert "damaged" in capfd.readouterr().err


def test_a_sweeps_drop_is_paired_where_it_is_known_what_became_of_its_items(tmp_path: Path) -> None:
    base = {"method": "base", "run_id": "b", "trajectory": "b", "lr": None, "seed": 0, "step": 0}
    own = {"method": "sft", "run_id": "r", "trajectory": "t", "lr": 1e-4, "seed": 0, "step": 3}
    n, lost, gained = 4000, 90, 30
    drop = (lost - gained) / n
    scores = [{"new": 0.1, "forgetting": 0.0, "prior_a": 0.5}, {"new": 0.8, "forgetting": drop, "prior_a": 0.5 - drop}]
    table = pl.DataFrame([{**base, **scores[0]}, {**own, **scores[1]}]).with_columns(prior_stderr=0.008)
    table.write_parquet(tmp_path / "records.parquet")
    independent = pick(tmp_path).candidates[0].interval("drop")
    before = np.array([1.0] * lost + [0.0] * gained + [float(at % 2) for at in range(n - lost - gained)])
    after = np.array([0.0] * lost + [1.0] * gained + [*before[lost + gained :]])
    rows = [
        {"step": 3, "prior": "a", "task": "a", "item": str(at), "base": before[at], "tuned": after[at]}
        for at in range(n)
    ]
    (tmp_path / "runs" / "r").mkdir(parents=True)
    outcomes = tmp_path / "runs" / "r" / "items.parquet"
    pl.DataFrame(rows, schema=items.SCHEMA).write_parquet(outcomes)
    paired = pick(tmp_path).candidates[0].interval("drop")
    # The score interval of McNemar's paired difference is about Wald's, by the differences' own spread.
    half = 1.96 * stats.sem(before - after)
    assert paired == pytest.approx((drop, drop - half, drop + half), abs=0.0006)
    assert independent == pytest.approx((drop, drop - 1.96 * 0.008 * 2**0.5, drop + 1.96 * 0.008 * 2**0.5))
    # Items that do not make up the drop say nothing of it; a damaged file is said to be one.
    pl.DataFrame(rows[1:], schema=items.SCHEMA).write_parquet(outcomes)
    assert pick(tmp_path).candidates[0].interval("drop") == independent
    outcomes.write_bytes(b"x")
    with pytest.raises(RazorError, match="damaged"):
        pick(tmp_path)


def test_what_has_no_standard_error_cannot_be_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even where the estimate is far within the budget: an error that is not known is not 0."""
    base = {"method": "base", "run_id": "b", "trajectory": "b", "lr": None, "seed": 0, "step": 0}
    own = {"method": "sft", "run_id": "r", "trajectory": "t", "lr": 1e-4, "seed": 0}
    rows: list[dict[str, Any]] = [
        {**base, "new": 0.1, "forgetting": 0.0, "kl_forward": None},
        {**own, "step": 1, "new": 0.5, "forgetting": 0.01, "kl_forward": 0.1},
        {**own, "step": 2, "new": 0.8, "forgetting": 0.05, "kl_forward": 0.2},
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "records.parquet")
    for budget in (["--budget", "0.9"], ["--kl-budget", "9"]):
        verdicts = {}
        for flags in ([], ["--accept-uncertain"], ["--cautious"]):
            code = main(["pick", str(tmp_path), *budget, "--json", *flags])
            found = json.loads(capfd.readouterr().out)
            assert found["exit_code"] == code
            verdicts[code] = found["recommended"] and found["recommended"]["step"]
        assert verdicts == {3: 2, 0: 2, 1: None}
        assert (found["candidates"][0]["low"], found["candidates"][0]["high"]) == (None, None)
        assert "the standard errors are not known. By the estimate alone there are" in found["why"]
        assert main(["pick", str(tmp_path), *budget, "--figure", str(tmp_path)]) == 3
        out = " ".join(capfd.readouterr().out.split())
        assert "cannot be told: the standard error of its" in out
        assert "inf" not in out.replace("uninf", "")
    assert pick(tmp_path, Limits(cautious=True)).advice.recommended is None
    # A table may have some of them.
    some = pl.DataFrame(rows).with_columns(prior_stderr=pl.Series([0.001, 0.001, None]))
    some.write_parquet(tmp_path / "records.parquet")
    found_some = pick(tmp_path, Limits(0.9, cautious=True))
    assert (taken(found_some).step, found_some.advice.verdict) == (1, Verdict.WITHIN)
    assert "1 of the 2 measured drops have no standard error" in found_some.notes[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a real trainer: three checkpoints, watched without a law; its base and law beside it."""
    root = tmp_path_factory.mktemp("trained")
    base = tiny_llama()
    saved(root / "base", base, char_tokenizer())
    law_of(base, scale=20.0).save(root / "law.json")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "text.txt").write_text("\n".join(GENERIC.texts))
    config = SFTConfig(
        output_dir=str(root / "run"), max_steps=6, per_device_train_batch_size=8, learning_rate=3e-3, bf16=False,
        report_to="none", logging_steps=2, save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"prompt": f"{a}{b}=", "completion": f"{b}{a};"} for a in "abcdefgh" for b in "0123456789"]
    watching = ForgettingMonitor(PROMPTS, settings=SETTINGS, generic=GENERIC, every=2, cache_dir=root / "cache")
    trainer = SFTTrainer(
        base, config, train_dataset=Dataset.from_list(rows), processing_class=char_tokenizer(), callbacks=[watching]
    )
    trainer.train()
    return root


def test_a_real_trainers_folder_with_a_law_or_measured_anew(
    trained: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pick", str(trained / "run"), "--metric", "mean_token_accuracy"]
    assert main([*command, "--json"]) == 0
    unforecast = json.loads(capfd.readouterr().out)
    law = ["--law", str(trained / "law.json")]
    assert main([*command, *law, "--json"]) == 0
    logged = json.loads(capfd.readouterr().out)["candidates"]
    assert [one["step"] for one in logged] == [2, 4, 6]
    measure = ["--base", str(trained / "base"), "--prompts", str(trained / "prompts.txt")]
    assert main([*command, *law, *measure, "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)["candidates"]
    base = load(trained / "base")
    text = kl.Probe(base.model, probes.of_generic(base.model, base.tokenizer, GENERIC, SETTINGS))
    for one, other in zip(logged, measured, strict=True):
        assert other["new"] == one["new"]
        assert other["drop"] == pytest.approx(one["drop"], rel=1e-3)
        tuned = load(trained / "run" / one["name"])
        expected = kl.forward_kl(text, tuned.model).per_completion.mean
        forecast = law_of(base.model, scale=20.0).forecaster.forecast({"kl_probe": expected})
        assert other["drop"] == pytest.approx(forecast.drop, rel=1e-3)
        assert other["kl"]["kl_probe"]["mean"] == pytest.approx(expected, rel=1e-6)
    # Without a law there are the same KLs, logged or measured here.
    settings = ["--max-new-tokens", str(SETTINGS.max_new_tokens), "--no-chat", "--generic", str(trained / "text.txt")]
    assert main([*command, *measure, *settings, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for of in ("kl_forward", "kl_probe"):
        means = [one["kl"][of]["mean"] for one in unforecast["candidates"]]
        for some in (logged, measured, found["candidates"]):
            assert [one["kl"][of]["mean"] for one in some] == pytest.approx(means, rel=1e-3)
    assert [one["drop"] for one in (*unforecast["candidates"], *found["candidates"])] == [None] * 6
    assert (found["recommended"], found["exit_code"]) == (None, 0)
    assert main([*command, *measure, *law, "--samples", "2"]) == 2
    assert "the law's own probe and settings are used" in capfd.readouterr().err
    assert main([*command, *law, "--samples", "2"]) == 2
    assert "--samples is about measuring here, which takes --base and --prompts" in capfd.readouterr().err
    # Checkpoints of a Trainer without processing_class have no tokenizer: the base's is theirs.
    shutil.copytree(trained / "run", tmp_path / "bare")
    for file in [*tmp_path.glob("bare/checkpoint-*/*token*"), *tmp_path.glob("bare/*token*")]:
        file.unlink()
    assert main([command[0], str(tmp_path / "bare"), *command[2:], *law, *measure, "--json"]) == 0
    bare = json.loads(capfd.readouterr().out)
    assert [one["drop"] for one in bare["candidates"]] == [one["drop"] for one in measured]
    assert bare["notes"].count("Checkpoints that have no tokenizer are measured with the base's.") == 1
    short = tmp_path / "short.txt"
    short.write_text("\n".join([*PROMPTS[:3], "a" * 70]))
    again = ["--base", str(trained / "base"), "--prompts", str(short)]
    assert main([*command, *law, *again]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "1 of the 4 prompts are left out" in out
    assert "3 prompts are few" in out
    for error, message in (
        (torch.OutOfMemoryError("CUDA out of memory"), "Out of memory: --dtype bfloat16"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Out of memory: --dtype bfloat16"),
        (NotFiniteError("logits"), "NaN or infinite"),
    ):
        for name in ("of", "measure"):
            with monkeypatch.context() as patched:
                patched.setattr(BaseSide, name, Mock(side_effect=error))
                assert main([*command, *law, *measure]) == 2
            err = capfd.readouterr().err
            assert message in err
            assert "Traceback" not in err
    few = law_of(base.model, runs=4, scale=20.0)
    few.save(tmp_path / "few.json")
    assert main([*command, "--law", str(tmp_path / "few.json")]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "(80% interval)" in out
    assert "4 runs allow intervals of 80%, not of 90%" in out
    assert main([*command, *measure[:2]]) == 2
    assert "give both --base and --prompts" in capfd.readouterr().err
    # By a law that may not judge nothing is recommended, and no budget is kept; by KL there may be.
    useless = law_of(base.model, scale=20.0)
    changed(useless, choice__guess=0.0).save(tmp_path / "useless.json")
    by_it = [*command, "--law", str(tmp_path / "useless.json")]
    assert main(by_it) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "No checkpoint is recommended. On the frontier of mean_token_accuracy against KL on the new task's" in out
    assert "No KL forecast better than guessing the mean: do not rely on this law." in out
    assert "Take" not in out
    for more in ([], ["--accept-uncertain"], ["--cautious"]):
        assert main([*by_it, "--budget", "0.9", *more]) == 3
        out = " ".join(capfd.readouterr().out.split())
        assert "within the budget of 90.0 points cannot be told. No KL forecast better than guessing" in out
        assert "Take" not in out
    assert main([*by_it, *measure, "--kl-budget", "1000", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recommended"] is not None
    law_of(tiny_llama(seed=3)).save(tmp_path / "other.json")
    assert main([*command, "--law", str(tmp_path / "other.json")]) == 2
    assert "a law belongs to its base" in capfd.readouterr().err


def test_kls_measured_otherwise_are_not_given_to_a_law(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    log = tmp_path / "run" / "razor.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**row, "probe": "other"}) + "\n" for row in rows))
    law = law_of(load(trained / "base").model)
    with pytest.raises(RazorError, match="another probe or other settings"):
        pick(tmp_path / "run", score=NewScore("mean_token_accuracy"), law=law)


def test_checkpoints_that_cannot_be_measured_do_not_end_it(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    weights = load_file(run / "checkpoint-2" / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, run / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    tiny_llama(vocab=50).save_pretrained(run / "checkpoint-4")
    command = ["pick", str(run), "--metric", "mean_token_accuracy", "--law", str(trained / "law.json")]
    command += ["--base", str(trained / "base"), "--prompts", str(trained / "prompts.txt")]
    assert main(command) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "checkpoint-2 is left out: The weights of" in out
    assert "checkpoint-4 is left out:" in out
    assert "different vocabularies (50 and" in out
    assert "Take checkpoint-6" in out
    shutil.copy(run / "checkpoint-2" / "model.safetensors", run / "checkpoint-6")
    assert main(command) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert "No checkpoint of" in err
    assert "model.norm.weight is NaN" in err
