"""Calibration: the law that a table gives, what is said of it, and the whole command on a small model."""

import html
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from laws import GENERIC, PROMPTS, SETTINGS, TRUE, changed, made_up
from rlrazor.analysis import forecast
from rlrazor.analysis.paired import tango
from rlrazor.cli import law_page, main
from rlrazor.cli.calibrate import DEFAULTS
from rlrazor.errors import RazorError
from rlrazor.experiments.language import cost, world
from rlrazor.guard import calibrate
from rlrazor.guard.law_file import LawFile, Made
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import kl, probes
from rlrazor.lm.models import load
from rlrazor.lm.prior_prompts import PriorPrompts
from rlrazor.lm.probes import GenericText
from rlrazor.lm.task_names import DEFAULT_TASKS, RUNS_MODEL_CODE
from rlrazor.report import drawing
from rlrazor.report.drawing import Curve, Points
from rlrazor.runs import items
from tiny_models import char_tokenizer, saved, tiny_llama

DIGEST = "float32 1.0e+00 2.0e+00 -1.0000 -2.0000"
BASE = calibrate.CalibratedBase("base", DIGEST, "0" * 16, MeasuredOn(PROMPTS, GENERIC, SETTINGS))


def table_of(runs: pl.DataFrame) -> pl.DataFrame:
    """As `records.to_table` has it."""
    tuned = runs.rename({"run": "trajectory"}).with_columns(
        run_id=pl.col("trajectory"), seed=0, lr=1e-4, new=0.5, prior=0.9 - pl.col("forgetting"), prior_a=0.1
    )
    row = {"method": "base", "trajectory": "base", "run_id": "base", "seed": 0, "step": 0, "new": 0.2, "prior": 0.9}
    base = pl.DataFrame([{**row, "prior_a": 0.9, "prior_stderr": 0.01, "prior_loss": 3.0, "forgetting": 0.0}])
    return pl.concat([base, tuned], how="diagonal_relaxed")


def test_a_law_is_of_the_runs_and_keeps_their_data() -> None:
    table = table_of(made_up(10))
    law = calibrate.fit(table, BASE, made=Made({"x": "1"}, "razor calibrate"))
    assert law.forecaster.columns == ("kl_probe",)
    assert law.prior.scores == {"a": 0.9}
    assert law.forecaster.base_score == pytest.approx(0.9)
    assert (law.base.digest, law.probe.prompts_hash) == (BASE.digest, probes.content_hash(PROMPTS))
    assert len(law.data) == 50
    assert law.data[0].model_fields_set >= {"run", "method", "step", "kl_forward", "kl_probe", "forgetting"}
    at = np.array([0.1, 0.4, 0.8])
    assert law.forecaster.predict(at[:, None])[0] == pytest.approx(TRUE.predict(at), abs=0.05)
    assert calibrate.warnings_of(law, table) == []
    assert law.prior.noise == pytest.approx(0.01 * 2**0.5)
    # A checkpoint that could not be measured is not among them, and changes nothing.
    lost = {"method": "m0", "trajectory": "run 0", "run_id": "run 0", "seed": 0, "step": 9, "prior": 0.5}
    beside = pl.concat([table, pl.DataFrame([{**lost, "forgetting": 0.4}])], how="diagonal_relaxed")
    assert calibrate.fit(beside, BASE, made=Made({"x": "1"}, "razor calibrate")) == law
    # The data that it keeps give the law again.
    again = pl.DataFrame([row.model_dump() for row in law.data]).rename({"run": "trajectory"})
    assert forecast.fit_forecaster(again, ("kl_probe",), 0.9) == law.forecaster


def test_the_noise_of_scores_is_that_of_all_tasks_or_not_known() -> None:
    table = table_of(made_up(10))

    def noise(**base: float | None) -> float | None:
        columns = {name: pl.when(pl.col("method") == "base").then(pl.lit(value)) for name, value in base.items()}
        return calibrate.fit(table.with_columns(prior_b=pl.lit(0.9), **columns), BASE).prior.noise

    assert noise(prior_stderr=0.05, prior_a_stderr=0.06, prior_b_stderr=0.08) == pytest.approx(0.05 * 2**0.5)
    # Where nothing has a standard error, or a table of an earlier version counts a task that has none as exact.
    assert noise(prior_stderr=None) is None
    assert noise(prior_stderr=0.03, prior_a_stderr=0.06) is None
    assert noise(prior_stderr=0.0) is None
    assert noise(prior_stderr=0.0, prior_a_stderr=0.0, prior_b_stderr=0.0) == 0
    unknown = calibrate.fit(table.drop("prior_stderr"), BASE)
    assert unknown.prior.noise is None
    assert any("noise of the prior scores is not known" in one for one in calibrate.warnings_of(unknown, table))


def outcomes_of(worst: dict[str, Any], more: int, less: int, n: int) -> pl.DataFrame:
    """Of n items of a group of two tasks at that step: `more` lost, `less` gained, of the rest every other right."""
    base = [1.0] * more + [0.0] * less + [float(at % 2) for at in range(n - more - less)]
    tuned = [0.0] * more + [1.0] * less + base[more + less :]
    names = {"prior": "a", "category": None, "choices": None, "right": None}
    return pl.DataFrame(
        [
            {"step": worst["step"], "task": f"a_{at % 2}", "item": str(at), "base": one, "tuned": other, **names}
            for at, (one, other) in enumerate(zip(base, tuned, strict=True))
        ],
        schema=items.SCHEMA,
    )


def test_the_noise_is_of_the_items_of_the_worst_checkpoint_paired_with_the_bases() -> None:
    table = table_of(made_up(10))
    worst = table.filter(pl.col("method") != "base").sort("forgetting", descending=True).row(0, named=True)

    def noise(own: pl.DataFrame | None) -> float | None:
        asked: list[str] = []

        def outcomes(run_id: str) -> pl.DataFrame | None:
            asked.append(run_id)
            return own

        scored = table if own is None else scored_as(own)
        found = calibrate.fit(scored, BASE, outcomes=outcomes).prior.noise
        assert asked == [worst["run_id"]]
        return found

    def scored_as(own: pl.DataFrame) -> pl.DataFrame:
        """The table with the scores that the items make up."""
        is_base = pl.col("method") == "base"
        return table.with_columns(
            pl.when(is_base).then(pl.lit(own["base"].mean())).otherwise(pl.lit(own["tuned"].mean())).alias(name)
            for name in ("prior", "prior_a")
        )

    unpaired = 0.01 * 2**0.5
    own = outcomes_of(worst, more=60, less=20, n=2000)
    assert noise(own) == pytest.approx(stats.sem(own["base"].to_numpy() - own["tuned"].to_numpy()), rel=0.02)
    assert 0 < (noise(outcomes_of(worst, more=0, less=0, n=2000)) or 0) < 0.001  # where none differs it is not 0
    # Where it is not known what became of an item, or the items do not make up the scores: as before.
    assert noise(None) == pytest.approx(unpaired)
    assert noise(own.with_columns(base=pl.when(pl.col("item") != "7").then(pl.col("base")))) == pytest.approx(unpaired)
    assert noise(own.with_columns(step=pl.lit(worst["step"] + 1, pl.Int64))) == pytest.approx(unpaired)
    assert noise(own.with_columns(prior=pl.lit("b"))) == pytest.approx(unpaired)
    halved = scored_as(own).with_columns(pl.col("prior", "prior_a") / 2)
    assert calibrate.fit(halved, BASE, outcomes=lambda run_id: own).prior.noise == pytest.approx(unpaired)


def test_the_noise_of_a_group_is_as_the_group_weighs_its_tasks() -> None:
    table = table_of(made_up(10))
    worst = table.filter(pl.col("method") != "base").sort("forgetting", descending=True).row(0, named=True)
    own = outcomes_of(worst, more=60, less=20, n=2000)
    kept = own.filter((pl.col("task") == "a_0") | (pl.col("item").cast(pl.Int64) < 100))  # 1000 items, and 50
    by_task = kept.group_by("task").agg(pl.col("base", "tuned").mean()).mean()
    base, tuned = by_task["base"][0], by_task["tuned"][0]
    is_base = pl.col("method") == "base"
    weighed = table.with_columns(
        pl.when(is_base).then(base).otherwise(tuned).alias(name) for name in ("prior", "prior_a")
    )
    found = calibrate.fit(weighed, BASE, outcomes=lambda run_id: kept).prior.noise
    errors = [stats.sem(part["base"].to_numpy() - part["tuned"].to_numpy()) for part in kept.partition_by("task")]
    assert found == pytest.approx(math.hypot(*errors) / 2, rel=0.05)


def test_what_a_law_is_not_worth_is_said() -> None:
    few = table_of(made_up(4).with_columns(method=pl.lit("sft")))
    said = calibrate.warnings_of(calibrate.fit(few, BASE), few)
    assert any("4 runs allow intervals of 80%, not of 90%. For those make 9 runs." in one for one in said)
    assert any("All runs are of one method, sft" in one for one in said)
    assert not any("did not carry over" in one for one in said)
    # Of the prior tasks' own prompts the law is of the KL on these, though another forecasts runs of one method better.
    better = few.with_columns(kl_forward=pl.col("forgetting"))
    assert "kl_forward" in calibrate.fit(better, BASE).forecaster.columns
    asked = GenericText(prompts=("a",), prior=PriorPrompts(("p",)))
    of_prior = replace(BASE, on=replace(BASE.on, generic=asked))
    assert calibrate.fit(better, of_prior).forecaster.columns == ("kl_probe",)
    assert (
        "kl_forward"
        in calibrate.fit(better.with_columns(kl_probe=1 - pl.col("forgetting")), of_prior).forecaster.columns
    )
    several = better.with_columns(method=pl.col("trajectory").str.replace("run ", "m"))
    assert "kl_forward" in calibrate.fit(several, of_prior).forecaster.columns
    new_alone = calibrate.fit(few, BASE, candidates=[("kl_forward",)])
    assert any(
        "new task's KL alone, as this one, did not carry over" in one for one in calibrate.warnings_of(new_alone, few)
    )
    rng = np.random.default_rng(0)
    noise = table_of(made_up(10).with_columns(forgetting=pl.Series(rng.uniform(0, 0.5, 50))))
    assert any("better than guessing" in one for one in calibrate.warnings_of(calibrate.fit(noise, BASE), noise))
    still = table_of(made_up(10).with_columns(forgetting=pl.Series(rng.uniform(0, 0.01, 50))))
    assert any(
        "No run of the calibration forgot more than" in one
        for one in calibrate.warnings_of(calibrate.fit(still, BASE), still)
    )
    with pytest.raises(RazorError, match="no row of the base"):
        calibrate.fit(few.filter(pl.col("method") != "base"), BASE)
    with pytest.raises(RazorError, match="at least 3 runs"):
        calibrate.fit(table_of(made_up(2)), BASE)
    still = made_up(5).with_columns(kl_forward=pl.lit(0.0), kl_probe=pl.lit(0.0))
    with pytest.raises(RazorError, match=r"No law can be fitted to these runs.*raise the learning rates"):
        calibrate.fit(table_of(still), BASE)
    alone = replace(BASE, on=replace(BASE.on, prompts=PROMPTS[:3]))
    assert any("measured on 3 prompts" in one for one in calibrate.warnings_of(calibrate.fit(few, alone), few))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_makes_a_law_of_a_users_own_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with completions, without a verifier; text of the user's; one prior task from a mirror."""
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    world.last_world.clear()
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"
    base = saved(tmp_path / "base", tiny_llama(len(tokenizer), max_position_embeddings=256), tokenizer)
    rows: list[dict[str, Any]] = [{"prompt": f"{a}{n}=", "completion": a} for n, a in enumerate("abcdefghij" * 4)]
    rows += [rows[0]] * 10  # a prompt that comes again is measured as often, and named once
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("\n".join(GENERIC.texts))
    (tmp_path / "mirror").mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(6)]
    (tmp_path / "mirror" / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "lr[1e-3] $x"  # which is no pattern, no markup and no formula
    command = [
        *("calibrate", str(base), "--prompts", str(tmp_path / "own.jsonl"), "--generic", str(tmp_path / "text.txt")),
        *("--prior", "winogrande", "--data-mirror", str(tmp_path / "mirror"), "--test-prompts", "6"),
        *("--max-new-tokens", "4", "--lrs", "1e-3,1e-2", "--seeds", "0,1", "--max-steps", "4", "--batch-sizes", "4"),
        *("--checkpoints-per-epoch", "2", "--warmup-steps", "0", "--precision", "float32", "--out", str(out)),
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    law = LawFile.load(out / "law.json")
    assert len(law.forecaster.left_out) == 4
    law.check(load(base).model, tokenizer)
    # Two answers of six items: by the items of the run that forgot most, which differ or do not.
    worst = max(law.data, key=lambda row: row.forgetting)
    table = pl.read_parquet((out / "records.parquet").read_bytes())
    (run_id,) = table.filter(pl.col("trajectory") == worst.run)["run_id"].unique()
    own = items.read(out / "runs" / run_id / "items.parquet").filter(pl.col("step") == worst.step)
    assert set(own["choices"]) == {2}
    gone = int((own["base"] > own["tuned"]).sum()), int((own["base"] < own["tuned"]).sum())
    low, high = tango(*gone, 6, 0.6826894921)
    assert law.prior.noise == pytest.approx((high - low) / 2, rel=1e-6)
    assert law.generic.texts == GENERIC.texts
    assert law.settings == probes.ProbeSettings(4, 1, (), True, "float32")
    prompts = probes.read_prompts(out / "prompts.jsonl")
    assert law.probe.prompts_count == len(prompts) == 6
    assert law.probe.prompts_hash == probes.content_hash(prompts)
    assert set(prompts) < {f"{a}{n}=" for n, a in enumerate("abcdefghij" * 4)}
    trained_on = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    # In turns, as the base has a chat template.
    assert {row["prompt"][0]["role"] + row["completion"][0]["role"] for row in trained_on} == {"userassistant"}
    assert all(row["completion"][0]["content"] == row["prompt"][0]["content"][0] for row in trained_on)
    assert not {row["prompt"][0]["content"] for row in trained_on} & set(prompts)
    assert any("4 runs allow" in warning for warning in found["warnings"])
    # What calibration measured is what a monitor would: KL of a run's last checkpoint, measured by the law's probe.
    assert {row.method for row in law.data} == {"sft"}
    model = load(base)
    text = probes.of_generic(model.model, model.tokenizer, law.generic, law.settings)
    assert text == kl.Sequences.texts([tokenizer.encode(line) for line in GENERIC.texts])
    # The same command again trains nothing; a table for people.
    assert main(command) == 0
    printed = capfd.readouterr()
    assert "0 runs trained, 6 kept" in printed.err
    assert "guessing the mean" in printed.out
    assert "Law: " in printed.out
    assert not list(out.glob("*-of-earlier-run-*"))
    # The report says of the law what the law says of itself, first, and ranks no KL by anything else.
    page = html.unescape((out / "report.html").read_text())
    assert page.index("4 runs allow") < page.index("A policy that can do both")
    assert law.describe() in page
    assert "Mean error on a run left out, by what was forecast, points" in page
    for other in ("Which KL forecasts forgetting?", "Which drift measure predicts", "Over all methods together"):
        assert other not in page
    useless = changed(law, choice__guess=0.0)
    useless.save(out / "law.json")
    assert main(["report", str(out)]) == 0
    page = html.unescape((out / "report.html").read_text())
    assert page.index("do not rely on this law") < page.index("A policy that can do both")
    assert "no better than guessing" in " ".join(capfd.readouterr().out.split())
    law.save(out / "law.json")
    # Another law than was there is not written over it, nor are other prompts.
    changed(law, interval__level=0.5).save(out / "law.json")
    (out / "prompts.jsonl").write_text("mine")
    assert main(command) == 2
    assert (out / "prompts.jsonl").read_text() == "mine"
    assert "prompts.jsonl is there already, and was not written by this command" in capfd.readouterr().err
    (out / "prompts.jsonl").write_text(rows_of_mine := '{"prompt": "another"}\n')
    assert main(command) == 0
    assert "law.json is an earlier run's: it is in law-of-earlier-run-1.json now" in capfd.readouterr().err
    assert LawFile.load(out / "law-of-earlier-run-1.json").interval.level == 0.5
    assert (out / "prompts-of-earlier-run-1.jsonl").read_text() == rows_of_mine
    assert changed(LawFile.load(out / "law.json"), command=law.command) == law
    assert len(list(out.glob("*-of-earlier-run-*"))) == 2
    # However few the rows, the runs have the updates that were asked for.
    monkeypatch.setattr(cost, "is_at_hand", lambda base: False)  # timed elsewhere
    some = [*command[: command.index("--max-steps")], *command[command.index("--batch-sizes") :]]
    for more, updates in (([], 100), (["--max-steps", "37"], 37), (["--epochs", "1"], len(trained_on) // 4)):
        assert main([*some, *more, "--dry-run", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["estimate"]["steps"] == 4 * updates
    # In half precision it is another law, of other runs, for models that compute so.
    with pytest.raises(RazorError, match="to be measured in float32, and the model's weights are bfloat16"):
        law.check(load(base, dtype="bfloat16").model, tokenizer)
    in_half = [*command, "--dtype", "bfloat16", "--lora-rank", "2", "--out", str(tmp_path / "half")]
    assert main(in_half) == 0
    of_half = LawFile.load(tmp_path / "half" / "law.json")
    assert of_half.settings.precision == "bfloat16"
    assert len(of_half.forecaster.left_out) == 4
    for dtype in ("bfloat16", "float32"):
        of_half.check(load(base, dtype=dtype).model, tokenizer)


def test_the_figure_shows_the_law_and_what_it_is_worth() -> None:
    rows = made_up(6).with_columns(kl_forward=10 * pl.col("kl_probe"))
    both = calibrate.fit(table_of(rows), BASE, candidates=[("kl_forward", "kl_probe")])
    panel, left_out = law_page.figure(both).panels
    weights = np.array(both.forecaster.law.weights)
    lead = int(np.argmax(weights > 0))
    (curve,) = (layer for layer in panel.layers if isinstance(layer, Curve))
    along = np.zeros((len(curve.x), 2))
    along[:, lead] = curve.x
    assert curve.y == pytest.approx(100 * both.forecaster.law.predict(along))
    # Between its points the law is nowhere far from the chord, near the base neither, where it may be steep.
    steep = changed(both, law__a=0.6, law__b=2.0, law__c=0.3)
    (drawn,) = (layer for layer in law_page.figure(steep).panels[0].layers if isinstance(layer, Curve))
    between = np.geomspace(drawn.x[1], drawn.x[-1], 5000)
    along = np.zeros((len(between), 2))
    along[:, lead] = between
    assert np.interp(between, drawn.x, drawn.y) == pytest.approx(100 * steep.forecaster.law.predict(along), abs=0.1)
    points = [layer for layer in panel.layers if isinstance(layer, Points)]
    assert sorted(np.concatenate([one.y for one in points])) == pytest.approx(sorted(100 * rows["forgetting"]))
    assert max(one.x.max() for one in points) == pytest.approx(curve.x[-1])
    # The law's curve goes through the points; a law without a run misses that run by the residuals of the interval.
    assert np.abs(np.concatenate([one.y - np.interp(one.x, curve.x, curve.y) for one in points])).max() < 6
    for layer, run in zip(left_out.layers, both.forecaster.left_out, strict=False):
        assert isinstance(layer, Points)
        missed = np.abs(layer.y - layer.x) / (1 + np.maximum(layer.x, 0))
        assert missed == pytest.approx(np.array(run.residuals))


def test_a_law_that_may_not_judge_is_not_shown_as_one_that_may() -> None:
    """In its figure, its tables and its section of the report alike."""
    law = calibrate.fit(table_of(made_up(6)), BASE)
    useless = changed(law, choice__guess=0.0)
    noise = changed(law, prior__noise=1.0)
    titles = [law_page.figure(one).panels[0].title for one in (law, useless, noise)]
    assert titles == [
        "The law",
        *(f"Not to be relied on: no {of}" for of in ("better than guessing", "more than noise")),
    ]
    for one, mark in ((law, "chosen"), (useless, "the best of them, no better than guessing")):
        assert [row[2] for row in law_page.candidates_table(one).rows].count(mark) == 1
    section = law_page.law_section(useless, useless.cautions())
    assert section.warning.startswith("No KL forecast better than guessing the mean: do not rely on this law.")
    assert "no better than guessing" in section.finding
    assert "fitted to what noise could be" in law_page.law_section(noise, []).finding
    rows = law_page.ranges_table(law).rows
    assert [row[0] for row in rows] == ["0 to 5", "5 to 20", "over 20"]
    assert sum(int(row[3]) for row in rows) == len(law.data)
    assert rows[0][1:] == ["—", "—", "0", "0"]
    assert [one.high for one in law.by_range] == [0.05, 0.2, math.inf]


def test_the_default_prior_tasks_are_the_ones_that_help_names() -> None:
    assert DEFAULTS["prior"].split(", ") == [name for name in DEFAULT_TASKS if name != RUNS_MODEL_CODE]


def test_rows_to_train_on_are_text_without_a_template_and_prompts_without_an_answer() -> None:
    from rlrazor.cli.calibrate import _row

    assert _row("a", "b", chat=False) == {"prompt": "a", "completion": "b"}
    assert _row("a", None, chat=True) == {"prompt": [{"role": "user", "content": "a"}]}


def test_calibration_that_makes_no_sense_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n}="}) for n in range(40)))
    for options, message in (
        (["tiny"], "Name the new task"),
        (["tiny", "--task", "letters", "--prompts", str(rows)], "Name the new task"),
        (["tiny", "--task", "letters", "--seeds", "0,1"], "a base of its own"),
        (["tiny", "--task", "letters", "--level", "2"], "fraction of 1"),
        (["tiny", "--task", "letters", "--jobs", "0"], "at least 1"),
        (["tiny", "--task", "letters", "--dtype", "bfloat16"], "has float32 weights"),
        (["hub/model", "--task", "letters", "--dtype", "float8"], "Unknown dtype 'float8'"),
        (["tiny", "--prompts", str(rows)], "line 1: it has no completion"),
    ):
        assert main(["calibrate", *options, "--out", str(tmp_path / "out")]) == 2
        assert message in capfd.readouterr().err
