"""What sections share: thresholds that arms reach together, means over seeds, how numbers are written."""

import polars as pl
import pytest

from rlrazor.analysis.statistics import (
    Estimate,
    by_group,
    in_all_seeds,
    seed_means,
    shared_threshold,
    with_params,
)
from rlrazor.report import figures, layers
from rlrazor.report.text import how_many, nats, number, percent, signed, written
from study_tables import BASE_NEW, mean_and_half, plus_minus, run, study_of

LEVELS = (0.97, 0.96, 0.95)


def study_to(tops: dict[tuple[str, int], float]) -> pl.DataFrame:
    """(method, seed) -> the highest new accuracy of its run."""
    rows = [row for (method, seed), top in tops.items() for row in run(method, seed, news=(0.93, top), prior=0.6)]
    return study_of("toy", rows).points


def bases(*news: float) -> pl.DataFrame:
    return pl.DataFrame({"new": news})


def test_shared_threshold_is_the_highest_that_all_comparable_groups_reach() -> None:
    tops = {("a", 0): 0.98, ("a", 1): 0.975, ("b", 0): 0.965, ("b", 1): 0.98}
    assert shared_threshold(study_to(tops), bases(0.9), ["method"], LEVELS) == 0.96
    # A group that never gets there in some seed holds nobody back.
    assert shared_threshold(study_to({**tops, ("c", 0): 0.94, ("c", 1): 0.98}), bases(0.9), ["method"], LEVELS) == 0.96
    # Where a base is as good already, it takes a higher one.
    assert shared_threshold(study_to(tops), bases(0.9, 0.955), ["method"], LEVELS) == 0.96
    assert shared_threshold(study_to(tops), bases(0.96), ["method"], LEVELS) == 0.97
    assert shared_threshold(study_to(tops), bases(0.98), ["method"], LEVELS) is None
    assert shared_threshold(study_to({("a", 0): 0.94}), bases(0.9), ["method"], LEVELS) is None


def test_in_all_seeds_counts_the_seeds_of_the_study() -> None:
    """A group whose runs of a seed are missing is not there in all seeds, though all of its own get there."""
    points = study_to({("a", 0): 0.98, ("a", 1): 0.98, ("b", 0): 0.98})
    assert in_all_seeds(points, ["method"], 0.95) == 1
    assert in_all_seeds(points.filter(seed=0), ["method"], 0.95) == 2


def test_seed_means_weigh_seeds_not_checkpoints() -> None:
    rows = [*run("a", 0, news=(0.9,), prior=0.5), *run("a", 1, prior=0.6), *run("a", 2, prior=0.7, news=(0.9, 0.92))]
    points = study_of("toy", rows).points
    found = by_group(seed_means(points, ["method"], ["prior", "kl_forward"]), "method", "prior")
    values = [points.filter(pl.col("seed") == seed)["prior"].mean() for seed in range(3)]
    assert list(found) == ["a"]
    assert found["a"]
    assert (found["a"].mean, found["a"].half) == pytest.approx(mean_and_half(values))  # type: ignore[arg-type]
    assert written(found["a"]) == plus_minus(values)  # type: ignore[arg-type]


def test_negative_numbers_have_a_minus_and_nothing_has_no_sign() -> None:
    assert (percent(-0.021), number(-0.07), nats(-1.5)) == ("−2.1", "−0.07", "−1.50")
    assert (percent(-0.0001), number(-0.004), nats(-0.001)) == ("0.0", "0.00", "0.00")
    assert (number(0.996), number(-0.996), percent(None), number(None)) == ("0.996", "−0.996", "—", "—")


def test_words() -> None:
    assert signed(Estimate(0.061, 0.02, 3)) == "+6.1 ± 2.0"
    assert signed(Estimate(-0.03, None, 1)) == "−3.0"
    assert signed(Estimate(-0.0001, 0.02, 3)) == "0.0 ± 2.0"
    assert signed(None) == written(None) == "—"
    assert [how_many(count, "seed") for count in (1, 3)] == ["1 seed", "3 seeds"]
    assert how_many(1200, "checkpoint") == "1,200 checkpoints"


def test_with_params_fills_what_runs_leave_out() -> None:
    table = pl.DataFrame({"precision": [None, "bfloat16"], "kl_coef": [None, 1]})
    filled = with_params(table, precision="float32", kl_coef=0.0, optimizer="adamw")
    assert filled.to_dicts() == [
        {"precision": "float32", "kl_coef": 0.0, "optimizer": "adamw"},
        {"precision": "bfloat16", "kl_coef": 1.0, "optimizer": "adamw"},
    ]
    assert (
        with_params(pl.DataFrame({"precision": [None, None]}), precision="float32")["precision"].to_list()
        == ["float32"] * 2
    )


def test_staircase_is_the_pareto_set_and_the_range_starts_below_the_base() -> None:
    study = study_of("toy", run("grpo", 0, news=(0.95, 0.93, 0.97)))
    points = study.points.with_columns(prior=pl.Series([0.7, 0.6, 0.5]))
    steps = figures.staircase("GRPO", points, "#000000")
    assert steps.steps
    assert list(zip(steps.x, steps.y, strict=True)) == [(0.95, 0.7), (0.97, 0.5)]
    low, high = layers.learnt(study)
    assert low < BASE_NEW < 0.97 < high
