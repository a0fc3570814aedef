"""Picking a checkpoint: the frontier against brute force, folders of a real Trainer, measured ones, and bad input."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from laws import GENERIC, PROMPTS, SETTINGS, law_of
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import ForgettingMonitor
from rlrazor.guard.base_side import BaseSide
from rlrazor.guard.pick import Candidate, Drop, frontier, pick
from rlrazor.lm import kl, probes
from rlrazor.lm.models import load
from rlrazor.lm.sampling import NotFiniteError
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def candidate(step: int, new: float, drop: float, spread: float = 0.0) -> Candidate:
    return Candidate(f"checkpoint-{step}", step, new, drop, drop - spread, drop + spread, False)


@pytest.mark.parametrize("lower", [False, True])
def test_the_frontier_is_what_nothing_beats(lower: bool) -> None:
    rng = np.random.default_rng(0)
    sign = -1 if lower else 1
    for _ in range(50):
        many = [candidate(step, *rng.integers(0, 6, 2) / 5) for step in range(12)]
        front = frontier(many, lower_is_better=lower)
        beaten = [
            any(
                sign * other.new >= sign * one.new
                and other.drop <= one.drop
                and (sign * other.new > sign * one.new or other.drop < one.drop)
                for other in many
            )
            for one in many
        ]
        unbeaten = {(one.new, one.drop) for one, is_beaten in zip(many, beaten, strict=True) if not is_beaten}
        assert {(one.new, one.drop) for one in front} == unbeaten
        assert len(front) == len(unbeaten)  # of equals, the earliest
        for one in front:
            assert one.step == min(other.step for other in many if (other.new, other.drop) == (one.new, one.drop))


def write_run(
    folder: Path, metric: str, values: dict[int, float], drops: dict[int, tuple[float, float, float]]
) -> Path:
    """Checkpoints of a Trainer and the log of a monitor."""
    history = [{"step": step, "epoch": step / 10, metric: value} for step, value in values.items()]
    for step in values:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        own = [entry for entry in history if entry["step"] <= step]
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": own}))
    rows = [
        {"step": step, "forecast": {"drop": drop, "low": low, "high": high}}
        for step, (drop, low, high) in drops.items()
    ]
    (folder / "razor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
    assert found.recommended.step == 20  # .9 - .2 against .6 - .01
    assert "eval_accuracy minus forecast drop is highest: 90.0 - 20.0 points" in found.why
    assert pick(run, budget=0.02).recommended.step == 10
    assert pick(run, budget=0.02, cautious=True).recommended.step == 5
    assert pick(run, cautious=True).recommended.step == 20
    # Judged by upper ends, the best may be off the frontier, which is the forecast's.
    surer = write_run(
        tmp_path / "surer", "eval_accuracy", {5: 0.5, 10: 0.6}, {5: (0.01, 0.0, 0.015), 10: (0.005, 0.0, 0.3)}
    )
    assert [one.step for one in pick(surer).frontier] == [10]
    found = pick(surer, budget=0.02, cautious=True)
    assert found.recommended.step == 5
    assert "it is off the frontier" in found.why
    assert pick(surer, cautious=True).recommended.step == 5
    with pytest.raises(RazorError, match=r"within the budget of 0\.5 points: the least .* is 1\.0 \(checkpoint-5\)"):
        pick(run, budget=0.005, cautious=True)
    with pytest.raises(RazorError, match="fraction of 1"):
        pick(run, budget=20)
    loss = write_run(tmp_path / "loss", "eval_loss", {5: 3.0, 10: 2.0}, {5: (0.0, 0.0, 0.1), 10: (0.01, 0.0, 0.1)})
    assert pick(loss, budget=0.02).recommended.step == 10
    with pytest.raises(RazorError, match="eval_loss is not a fraction of 1"):
        pick(loss)


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
    assert pick(run, metric=metric, budget=0.1).recommended.step == best
    assert pick(run, metric=metric, budget=0.1, lower_is_better=not lower).recommended.step == worst
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
        "checkpoint-5 is left out: nothing was forecast up to its step.",
        "checkpoint-10: the drop is that of step 7.",
    ]
    diverged = write_run(
        tmp_path / "diverged", "reward", {5: 0.5, 10: float("nan")}, {5: (0.01, 0.0, 0.1), 10: (0.02, 0.0, 0.1)}
    )
    assert [(one.step, one.new) for one in pick(diverged).candidates] == [(5, 0.5), (10, 0.5)]
    with (diverged / "razor.jsonl").open("a") as log:
        log.write('{"step": 12, "forec')  # killed there
    assert len(pick(diverged).candidates) == 2
    (run / "checkpoint-12").mkdir()  # half-written: no state
    assert [one.step for one in pick(run).candidates] == [10]


def test_what_is_damaged_or_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="There is no folder"):
        pick(tmp_path / "nowhere")
    with pytest.raises(RazorError, match="has no checkpoint-N folder"):
        pick(tmp_path)
    run = write_run(tmp_path / "run", "custom", {5: 0.5}, {5: (0.0, 0.0, 0.1)})
    with pytest.raises(RazorError, match=r"name one by its metric\. Logged: custom"):
        pick(run)
    with pytest.raises(RazorError, match=r"other was not logged\. Logged: custom"):
        pick(run, metric="other")
    assert pick(run, metric="custom").recommended.step == 5
    (run / "razor.jsonl").write_text('{"step": 5, "forecast": null}\n')
    with pytest.raises(RazorError, match="uncalibrated"):
        pick(run, metric="custom")
    (run / "razor.jsonl").write_text('{"forecast": {"drop": 0.1}}\n')
    with pytest.raises(RazorError, match=r"damaged .*'step'"):
        pick(run, metric="custom")
    (run / "razor.jsonl").write_text("{\n")
    with pytest.raises(RazorError, match="damaged"):
        pick(run, metric="custom")
    (run / "razor.jsonl").unlink()
    with pytest.raises(RazorError, match="train with a ForgettingMonitor, or measure"):
        pick(run, metric="custom")
    found = pick(run, metric="custom", measure=lambda path, step: Drop(step, 0.1, 0.0, 0.2))
    assert found.recommended.high == 0.2
    (run / "checkpoint-5" / "trainer_state.json").write_text("{")
    with pytest.raises(RazorError, match=r"trainer_state\.json is damaged"):
        pick(run, metric="custom")


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
    pl.DataFrame(rows).write_parquet(tmp_path / "records.parquet")
    assert main(["pick", str(tmp_path), "--budget", "0.02", "--json"]) == 0
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a real trainer: three checkpoints, watched without a law; its base and law beside it."""
    root = tmp_path_factory.mktemp("trained")
    base = tiny_llama()
    saved(root / "base", base, char_tokenizer())
    law_of(base, scale=20.0).save(root / "law.json")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
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
    assert main(command) == 2
    assert "uncalibrated" in capfd.readouterr().err
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
    assert main([*command, *measure]) == 2
    assert "give all of --base, --prompts and --law" in capfd.readouterr().err
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
        pick(tmp_path / "run", metric="mean_token_accuracy", law=law)
