from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from rlrazor.analysis import frontier
from rlrazor.errors import RazorError

Floats = NDArray[np.float64]


def clouds() -> list[tuple[Floats, Floats]]:
    """Random points: spread out; on a coarse grid, so with ties and copies; and tiny sets."""
    rng = np.random.default_rng(0)
    spread = [rng.uniform(0, 1, (2, 40)) for _ in range(10)]
    gridded = [rng.integers(0, 6, (2, 40)) / 8 for _ in range(20)]
    tiny = [rng.integers(0, 3, (2, n)) / 2 for n in (1, 1, 2, 2, 3, 3)]
    return [(points[0], points[1]) for points in (*spread, *gridded, *tiny)]


@pytest.mark.parametrize(("new", "prior"), clouds())
def test_pareto_set_is_what_no_point_dominates(new: Floats, prior: Floats) -> None:
    def dominated(i: int) -> bool:
        as_good = (new >= new[i]) & (prior >= prior[i])
        better = (new > new[i]) | (prior > prior[i])
        return bool((as_good & better).any())

    assert frontier.pareto_set(new, prior).tolist() == [not dominated(i) for i in range(len(new))]


@pytest.mark.parametrize(("new", "prior"), clouds())
@pytest.mark.parametrize("within", [0.0, 0.02, 0.125])
def test_near_frontier_is_the_vertical_distance_to_the_staircase(new: Floats, prior: Floats, within: float) -> None:
    expected = [prior[i] >= prior[new >= new[i]].max() - within for i in range(len(new))]
    kept = frontier.near_frontier(new, prior, within)
    assert kept.tolist() == expected
    assert kept[frontier.pareto_set(new, prior)].all()


@pytest.mark.parametrize(("new", "prior"), clouds()[10:])
@pytest.mark.parametrize("reference", [(0.0, 0.0), (0.25, 0.5)])
def test_hypervolume_is_the_dominated_share_of_a_grid(
    new: Floats, prior: Floats, reference: tuple[float, float]
) -> None:
    centres = (np.arange(8) + 0.5) / 8  # the points lie on corners of these cells, so the count is exact
    cells = [(x, y) for x in centres for y in centres if x > reference[0] and y > reference[1]]
    covered = sum(bool(((new > x) & (prior > y)).any()) for x, y in cells)
    assert frontier.hypervolume(new, prior, reference) == pytest.approx(covered / 64)


def test_hypervolume_of_two_points_is_inclusion_and_exclusion() -> None:
    assert frontier.hypervolume([0.9, 0.5], [0.3, 0.7]) == pytest.approx(0.9 * 0.3 + 0.5 * 0.7 - 0.5 * 0.3)
    assert frontier.hypervolume([], []) == 0


def test_copies_of_a_frontier_point_all_stay() -> None:
    assert frontier.pareto_set([0.9, 0.5, 0.9, 0.9], [0.3, 0.7, 0.3, 0.2]).tolist() == [True, True, True, False]
    assert frontier.pareto_set([], []).tolist() == []


def test_masks_do_not_depend_on_the_order_of_points() -> None:
    rng = np.random.default_rng(1)
    new, prior = rng.integers(0, 9, (2, 200)) / 9
    order = rng.permutation(200)
    for mask in (frontier.pareto_set, frontier.near_frontier):
        np.testing.assert_array_equal(mask(new, prior)[order], mask(new[order], prior[order]))


# --- the curve


def test_exponential_recovers_its_parameters() -> None:
    truth = frontier.Exponential(level=0.8, change=-0.3, rate=20.0, anchor=0.98)
    new = np.linspace(0.5, 0.98, 60)
    fit = frontier.fit_exponential(new, truth.predict(new) + np.random.default_rng(0).normal(0, 0.002, 60))
    assert fit is not None
    assert (fit.level, fit.change, fit.rate, fit.anchor) == pytest.approx((0.8, -0.3, 20.0, 0.98), rel=0.05)


def test_exponential_follows_what_is_lost_at_once() -> None:
    truth = frontier.Exponential(level=0.2, change=0.6, rate=-40.0, anchor=0.91)
    new = np.linspace(0.91, 0.98, 60)
    fit = frontier.fit_exponential(new, truth.predict(new) + np.random.default_rng(0).normal(0, 0.002, 60))
    assert fit is not None
    assert (fit.level, fit.change, fit.rate, fit.anchor) == pytest.approx((0.2, 0.6, -40.0, 0.91), rel=0.05)


def test_exponential_is_the_least_squares_optimum() -> None:
    rng = np.random.default_rng(1)
    new = rng.uniform(0.4, 1, 50)
    prior = 0.7 - 0.25 * np.exp(12 * (new - 1)) + rng.normal(0, 0.02, 50)
    fit = frontier.fit_exponential(new, prior)
    assert fit is not None
    best, _ = optimize.curve_fit(
        lambda x, a, b, c: a + b * np.exp(c * (x - fit.anchor)), new, prior, p0=(0.7, -0.2, 10)
    )
    assert (fit.level, fit.change, fit.rate) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("shape", ["cliff", "line", "rising", "flat"])
def test_exponential_never_rises(shape: str) -> None:
    new = np.linspace(0.2, 0.9, 30)
    prior = {"cliff": 0.8 - 0.5 * (new > 0.89), "line": 1 - new, "rising": new, "flat": 0 * new + 0.6}[shape]
    fit = frontier.fit_exponential(new, prior)
    assert fit is not None
    predicted = fit.predict(new)
    assert np.all(np.diff(predicted) <= 0)
    if shape == "rising":
        np.testing.assert_allclose(predicted, 0.55)  # the best curve that does not rise is the mean
    else:
        np.testing.assert_allclose(predicted, prior, atol=0.01)


def test_exponential_needs_three_different_accuracies() -> None:
    assert frontier.fit_exponential([], []) is None
    assert frontier.fit_exponential([0.5, 0.6, 0.6], [0.9, 0.8, 0.7]) is None
    assert frontier.fit_exponential([0.5, 0.6, 0.7], [0.9, 0.8, 0.6]) is not None


def test_trade_off_curve_is_fitted_to_what_it_kept() -> None:
    rng = np.random.default_rng(2)
    new, prior = rng.uniform(0, 1, (2, 100))
    result = frontier.trade_off_curve(new, prior, within=0.1)
    np.testing.assert_array_equal(result.pareto, frontier.pareto_set(new, prior))
    np.testing.assert_array_equal(result.kept, frontier.near_frontier(new, prior, 0.1))
    assert 3 < result.kept.sum() < 100
    assert result.curve == frontier.fit_exponential(new[result.kept], prior[result.kept])


@pytest.mark.parametrize(
    "function",
    [
        frontier.pareto_set,
        frontier.near_frontier,
        frontier.hypervolume,
        frontier.fit_exponential,
        frontier.trade_off_curve,
    ],
)
def test_bad_points_are_refused(function: Any) -> None:
    with pytest.raises(RazorError, match="NaN"):
        function([0.5, np.nan], [0.5, 0.5])
    with pytest.raises(RazorError, match="one length"):
        function([0.5, 0.6], [0.5])


# --- retention


def table() -> pl.DataFrame:
    nan = float("nan")
    rows = [
        ("base", 0, 0.50, 0.80),
        ("base", 1, 0.50, 0.84),
        ("base", 2, 0.50, 0.88),
        ("sft", 0, 0.96, 0.60),
        ("sft", 0, 0.95, 0.70),  # a later checkpoint, which keeps more
        ("sft", 0, 0.94, 0.79),  # better prior, but below it
        ("sft", 1, 0.97, 0.64),
        ("grpo", 2, 0.97, 0.86),
        ("grpo", 0, 0.96, 0.78),
        ("grpo", 1, 0.95, 0.80),  # exactly at the threshold counts
        ("grpo", 1, nan, 0.99),  # diverged: polars ranks NaN above every number
        ("weak", 0, 0.70, 0.80),
    ]
    return pl.DataFrame(rows, schema=["method", "seed", "new", "prior"], orient="row")


def test_retention_by_hand() -> None:
    result = frontier.retention(table(), thresholds=(0.95, 0.97))
    assert result["method"].to_list() == ["sft", "sft", "grpo", "grpo", "weak", "weak"]
    assert result["threshold"].to_list() == [0.95, 0.97] * 3
    assert result["mean"].to_list() == pytest.approx([0.62, 0.64, (0.86 + 0.78 + 0.80) / 3, 0.86, None, None])
    assert result["n_seeds"].to_list() == [2, 1, 3, 1, 0, 0]
    assert result["seeds_total"].to_list() == [2, 2, 3, 3, 1, 1]
    assert result["best_new"].to_list() == [0.97, 0.97, 0.97, 0.97, 0.70, 0.70]
    assert result["base_prior"].to_list() == pytest.approx([0.82, 0.82, 0.84, 0.84, 0.80, 0.80])

    assert result["low"].is_null().to_list() == [False, True, False, True, True, True]
    for row, best in ((0, [0.60, 0.64]), (2, [0.86, 0.78, 0.80])):
        expected = stats.ttest_1samp(best, 0).confidence_interval(0.95)
        assert (result["low"][row], result["high"][row]) == pytest.approx(tuple(expected))


def test_retention_without_base_or_without_anything() -> None:
    tuned = table().filter(pl.col("method") != "base")
    assert frontier.retention(tuned)["base_prior"].null_count() == 9
    empty = frontier.retention(tuned.clear())
    assert empty.is_empty()
    assert empty.schema == frontier.retention(tuned).schema


def test_retention_does_not_count_copies_of_a_checkpoint() -> None:
    assert frontier.retention(pl.concat([table(), table()])).equals(frontier.retention(table()))
