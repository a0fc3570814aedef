"""Is the forecast true? The section against trials by hand, on tables whose laws are known."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from rlrazor.analysis import forecast, law
from rlrazor.analysis.outcomes import BASELINES, PREDICTORS, Outcome, examine
from rlrazor.analysis.statistics import Standing
from rlrazor.report.sections import build, forecasts
from rlrazor.report.study import Study

DESCRIPTION = {"labels": {}, "seeds": [0, 1], "config": {}}


def study(*, exception: str | None = None, tasks: int = 2, methods: int = 3) -> Study:
    """Two seeds; forgetting is a law of the KL on the probe, whatever the task or method; of `exception`, double."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in (0, 1):
        for task in range(tasks):
            rows.append({"method": "base", "trajectory": f"base {seed} {task}", "step": 0, "prior": 0.9, "new": 0.1})
            rows[-1] |= {"forgetting": 0.0, "seed": seed, "task": f"task {task}", "family": "tiny"}
            for method in range(methods):
                for lr in range(3):
                    for step in range(1, 5):
                        probe = (lr + 1) * step / 12 * rng.uniform(0.8, 1)
                        drop = 0.4 * (1 - np.exp(-3 * probe)) * (1 + 0.02 * rng.normal())
                        drop *= 2 if f"method {method}" == exception else 1
                        rows.append(
                            {
                                "method": f"method {method}" if method else "sft 0",
                                "trajectory": f"{seed} {task} {method} {lr}",
                                "step": step,
                                "prior": 0.9 - drop, "new": 0.5, "forgetting": drop, "seed": seed, "lr": 1e-4,
                                "task": f"task {task}", "family": "tiny", "kl_probe": probe,
                                "kl_forward": rng.uniform(0, 5), "kl_reverse": rng.uniform(0, 5),
                                "loss": rng.normal(), "weight_l2": probe + rng.uniform(0, 0.1),
                            }
                        )  # fmt: skip
    table = pl.DataFrame(rows, infer_schema_length=None)
    return Study("forecasts", DESCRIPTION, table, law.distinct(table), table.filter(pl.col("method") == "base"))


def examined(of: Study) -> list[Outcome]:
    return examine(of.points, of.bases)


@pytest.fixture(scope="module")
def plain() -> list[Outcome]:
    return examined(study())


def test_every_unit_is_a_trial_of_its_own_base(plain: list[Outcome]) -> None:
    tested = study()
    outcomes = {(one.left_out, one.predictor): one for one in plain}
    assert len(outcomes) == 3 * len(PREDICTORS)
    for name in ("kl_probe", "guess", "loss"):
        own = tested.points.filter(pl.col("seed") == 1, pl.col("task") == "task 0")
        by_hand = forecast.trial(own, PREDICTORS[name], "method", 0.9, 0.9)
        found = [unit.trial for unit in outcomes["method", name].units if (unit.seed, unit.within) == (1, "task 0")]
        assert found == by_hand
        assert len(outcomes["method", name].units) == 2 * 2 * 3
        by_hand = forecast.trial(tested.points.filter(pl.col("seed") == 0), PREDICTORS[name], "task", 0.9, 0.9)
        assert [unit.trial for unit in outcomes["task", name].units if unit.seed == 0] == by_hand
        assert len(outcomes["task", name].units) == 2 * 2
        by_hand = forecast.trial(own, PREDICTORS[name], "method", 0.9, 0.9, fitted_to=["sft 0"])
        found = [unit.trial for unit in outcomes["beyond", name].units if (unit.seed, unit.within) == (1, "task 0")]
        assert found == by_hand
        assert [trial.unit for trial in found] == ["method 1", "method 2"]


def test_the_best_beats_guessing_and_where_it_fails_is_told(plain: list[Outcome]) -> None:
    groups = forecasts.groups_of(plain)
    best = {group.left_out: group.best for group in groups}
    assert {one.predictor for one in best.values() if one} == {"kl_probe"}
    assert all(one.holds and not one.failed for one in best.values() if one)
    numbers = forecasts.best_table(groups).numbers
    for left_out in ("method", "task", "beyond"):
        assert numbers[f"tiny.{left_out}.best.verdict"] == "better"
        assert numbers[f"tiny.{left_out}.best.interval"] == "holds"
    section = build(study(exception="method 2"))
    assert section.figure.name == "forecasts"
    named = [[name for _, name in panel.y.ticks or ()] for panel in section.figure.panels]
    names = [forecasts.NAMES[name] for name in reversed(list(PREDICTORS))]
    assert named == [names, [""] * len(names), [""] * len(names)]
    failures = section.tables[-1]
    assert failures.title == "Where it fails"
    assert {row[2] for row in failures.rows if row[0] == "KL on the generic probe"} >= {
        "method 2 on task 0",
        "method 2 on task 1",
    }
    assert "Intervals too narrow: tiny language model / " in section.finding


def test_gains_are_taken_unit_by_unit(plain: list[Outcome]) -> None:
    outcomes = {(one.left_out, one.predictor): one for one in plain}
    probe, guess = outcomes["method", "kl_probe"], outcomes["method", "guess"]
    gaps = [two.trial.error - one.trial.error for one, two in zip(probe.units, guess.units, strict=True)]
    t_eleven = 2.200985  # of the t-distribution with eleven degrees of freedom, from a printed table
    gain = probe.gain
    assert gain
    assert gain.seeds == 12
    assert gain.mean == pytest.approx(np.mean(gaps))
    assert gain.half == pytest.approx(t_eleven * np.std(gaps, ddof=1) / 12**0.5, rel=1e-6)
    assert probe.verdict == Standing.BETTER
    assert outcomes["method", "kl_reverse"].verdict != Standing.BETTER
    assert guess.gain is None
    assert replace(guess, guess=outcomes["task", "guess"]).gain is None  # they share no unit


def test_the_level_is_the_one_that_the_runs_allow(plain: list[Outcome]) -> None:
    """Two methods of three runs each are left to fit to: six runs, so 6/7."""
    assert {round(one.level, 6) for one in plain if one.left_out == "method"} == {round(6 / 7, 6)}
    titles = [table.title for table in build(study()).tables]
    assert "tiny language model, a method left out, intervals of 85.7 %, as there are few runs" in titles
    assert "tiny language model, a task left out" in titles  # nine runs


def test_coverage_is_near_its_level_where_units_are_alike() -> None:
    outcomes = examined(study(tasks=3, methods=4))
    for one in outcomes:
        coverage = one.mean("coverage")
        assert coverage is not None
        if one.predictor == "kl_probe":
            assert coverage.mean > 0.85
            error, guess = one.mean("error"), next(
                other.mean("error")
                for other in outcomes
                if other.left_out == one.left_out and other.predictor == BASELINES[0]
            )  # fmt: skip
            assert error is not None
            assert guess is not None
            assert error.mean < guess.mean / 4


def test_too_few_to_leave_out_is_said() -> None:
    alone = study(tasks=1, methods=1)
    assert forecasts.finding(forecasts.groups_of(examined(alone))) == (
        "There are too few methods and tasks to leave one out."
    )
    section = build(alone)
    assert [table.title for table in section.tables] == ["The best of the KLs", "Where it fails"]
    some = examined(study(tasks=1, methods=3))
    assert {one.left_out for one in some if one.units} == {"method", "beyond"}


def test_predictors_that_were_not_measured_are_left_out() -> None:
    tested = study()
    without = Study("forecasts", DESCRIPTION, tested.table, tested.points.drop("loss"), tested.bases)
    assert "loss" not in {one.predictor for one in examined(without)}
    with pytest.raises(KeyError):
        examined(Study("forecasts", DESCRIPTION, tested.table, tested.points, tested.bases.clear()))
