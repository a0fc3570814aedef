"""Statistics at equal new-task accuracy, computed again by loops; the one verdict against scipy's paired t-test."""

import math
import warnings
from collections.abc import Sequence
from itertools import product

import numpy as np
import polars as pl
import pytest
from scipy import stats

from rlrazor.analysis import law
from rlrazor.analysis.statistics import (
    Estimate,
    Standing,
    correlation,
    difference,
    mean_of,
    near_accuracy,
    verdict,
)

T_THREE_SEEDS = 4.302653  # of the t-distribution with two degrees of freedom, from a printed table


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_verdict_is_that_of_a_paired_t_test(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    found = set()
    for _ in range(300):
        first, second = rng.normal(size=seeds), rng.normal(rng.choice([-2, 0, 2]), 0.5, size=seeds)
        test = stats.ttest_rel(first, second)
        expected = Standing.OPEN if test.pvalue >= 0.05 else Standing.BETTER if test.statistic > 0 else Standing.WORSE
        gap = Estimate.over((first - second).tolist())
        assert verdict(gap, seeds) is expected
        opposite = {Standing.BETTER: Standing.WORSE, Standing.WORSE: Standing.BETTER}
        assert verdict(gap, seeds, lower_is_better=True) is opposite.get(expected, expected)
        found.add(expected)
    assert len(found) == 3


def test_one_seed_and_seeds_that_are_missing() -> None:
    assert verdict(Estimate.over([0.5]), 1) is Standing.OPEN
    assert verdict(Estimate.over([0.5, 0.5]), 3) is Standing.APART
    assert verdict(None, 3) is Standing.APART
    assert verdict(Estimate.over([0.0, 0.0, 0.0]), 3) is Standing.OPEN
    assert verdict(Estimate.over([0.5, 0.5, 0.5]), 3) is Standing.BETTER


@pytest.fixture(scope="module")
def scattered() -> pl.DataFrame:
    """Three seeds of two methods with two settings; the second setting of b never learns."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "method": method,
            "setting": setting,
            "seed": seed,
            "trajectory": f"{method}{setting}{seed}{run}",
            "new": 0.9 if (method, setting) == ("b", 2) else 0.93 + 0.05 * round(float(rng.random()), 3),
            "prior": float(rng.random()),
            "drift": float(rng.random()) if run else None,
        }
        for method in "ba"
        for setting in (2, 1)
        for seed in range(3)
        for run in range(4)
        for _ in range(10)
    ]
    return pl.DataFrame(rows)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), T_THREE_SEEDS * float(np.std(values, ddof=1)) / math.sqrt(3)


def test_the_mean_near_an_accuracy_is_brute_force(scattered: pl.DataFrame) -> None:
    for target, method in product((0.95, 0.96), "ab"):
        means = []
        for seed in range(3):
            near = [
                point["prior"]
                for point in scattered.to_dicts()
                if point["method"] == method and point["seed"] == seed and abs(point["new"] - target) < 0.005 + 1e-8
            ]
            means.append(sum(near) / len(near))
        found = near_accuracy(scattered, ["method"], target, ["prior"]).filter(method=method)
        estimate = mean_of(found, "prior")
        assert estimate
        assert (estimate.mean, estimate.half) == pytest.approx(mean_and_half(means))
    assert mean_of(found.clear(), "prior") is None


def test_a_seed_that_is_infinite_leaves_a_mean_without_an_interval() -> None:
    with warnings.catch_warnings(action="error"):
        found = Estimate.over([1.0, math.inf])
    assert (found.mean, found.half) == (math.inf, None)


def test_seeds_without_a_number_are_left_out_of_a_mean() -> None:
    rows = pl.DataFrame({"seed": [2, 0, 1, 3], "x": [0.4, None, 0.2, math.nan]})
    found = mean_of(rows, "x")
    assert found
    assert found.mean == pytest.approx(0.3)
    assert found.seeds == 2
    assert mean_of(rows.filter(pl.col("seed") == 0), "x") is None


def test_difference_pairs_the_seeds(scattered: pl.DataFrame) -> None:
    near = near_accuracy(scattered, ["method"], 0.95, ["prior"])
    a, b = (near.filter(pl.col("method") == method) for method in "ab")
    found = difference(a, b.sort("seed", descending=True), "prior")
    gaps = [
        a.filter(pl.col("seed") == seed)["prior"].item() - b.filter(pl.col("seed") == seed)["prior"].item()
        for seed in range(3)
    ]
    assert found
    assert (found.mean, found.half, found.seeds) == pytest.approx((*mean_and_half(gaps), 3))
    assert difference(a, b.clear(), "prior") is None


def test_correlation_is_scipys(scattered: pl.DataFrame) -> None:
    table = scattered.with_columns(y=pl.col("prior") ** 3 + 0.1 * pl.col("new"))
    found = correlation(table, "prior", "y", samples=50)
    x, y = table["prior"].to_numpy(), table["y"].to_numpy()
    assert found
    assert (found.pearson, found.spearman, found.points) == pytest.approx(
        (stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic, len(x))
    )
    assert found.pearson_interval == pytest.approx(
        law.bootstrap(lambda rows: float(stats.pearsonr(rows["prior"], rows["y"]).statistic), table, samples=50)
    )
    low, high = found.spearman_interval or (1, 0)
    assert low < found.spearman < high
    assert correlation(table.with_columns(y=pl.lit(1.0)), "prior", "y") is None
    few = correlation(table.filter(pl.col("trajectory") == "a100"), "prior", "y")
    assert few
    assert few.pearson_interval is None


def test_a_seed_without_a_finite_value_leaves_two_arms_not_comparable() -> None:
    first = pl.DataFrame({"seed": [0, 1, 2], "kl": [1.0, math.nan, 3.0]})
    second = pl.DataFrame({"seed": [0, 1, 2], "kl": [0.5, 0.5, 2.5]})
    gap = difference(first, second, "kl")
    assert gap == Estimate(0.5, 0.0, 2)
    assert verdict(gap, 3) is Standing.APART
