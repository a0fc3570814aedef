"""Paired differences: the score interval against a published one, its definition and simulation; t against scipy."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from rlrazor.analysis.paired import Independent, Mean, Means, Proportions, paired, tango, times_needed


def statistic(more: int, less: int, n: int, difference: float) -> float:
    """The score statistic at a difference, the likelihood under it maximised by search."""
    agree = n - more - less

    def unlikely(rarer: float) -> float:
        kinds = ((more, rarer + difference), (less, rarer), (agree, 1 - 2 * rarer - difference))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in kinds if count)

    ends = max(0.0, -difference), (1 - difference) / 2
    rarer = optimize.minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    variance = 2 * rarer + difference - difference**2
    return ((more - less) / n - difference) / math.sqrt(variance / n)


def test_the_score_interval_is_the_published_one() -> None:
    # Bentur et al. 2009 in Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2850-2875 (2014).
    assert tango(1, 7, 21, 0.95) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("more", "less", "n"), [(1, 7, 21), (40, 20, 160), (0, 3, 50), (5, 5, 12), (7, 0, 7)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_score_interval_ends_where_the_statistic_is_z(more: int, less: int, n: int, level: float) -> None:
    z = special.ndtri((1 + level) / 2)
    low, high = tango(more, less, n, level)
    assert low < (more - less) / n <= high
    assert statistic(more, less, n, low) == pytest.approx(z, rel=1e-3)
    if more < n:
        assert statistic(more, less, n, high) == pytest.approx(-z, rel=1e-3)
    assert tango(less, more, n, level) == pytest.approx((-high, -low))


def test_where_no_item_differs_the_interval_is_not_empty() -> None:
    z = special.ndtri(0.95)
    for n in (1, 20, 500):
        same = paired(np.ones(n), np.ones(n), bounded=True)
        low, high = same.interval(0.9)
        assert same == Proportions(0, 0, n)
        assert high == pytest.approx(z**2 / (n + z**2))
        assert low == pytest.approx(-high)
    assert tango(0, 7, 7, 0.9)[0] == -1
    # Of outcomes between 0 and 1 neither, however alike.
    alike = paired(np.full(20, 0.5), np.full(20, 0.5), bounded=True)
    assert alike.interval(0.9) == pytest.approx(tango(0, 0, 20, 0.9))
    assert paired([0.5], [0.5], bounded=True).interval(0.9) == (-1, 1)


@pytest.mark.parametrize(("more", "less"), [(0.0, 0.0), (0.02, 0.02), (0.05, 0.0), (0.15, 0.05)])
def test_a_score_interval_holds_the_truth_as_often_as_it_says(more: float, less: float) -> None:
    rng, n, level = np.random.default_rng(0), 100, 0.9
    drawn = rng.multinomial(n, [more, less, 1 - more - less], size=2000)
    counts, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    ends = np.array([tango(only, other, n, level) for only, other in counts])
    held = (ends[:, 0] <= more - less) & (more - less <= ends[:, 1])
    assert times[held].sum() / times.sum() > level - 0.03


def test_pairing_is_narrower_than_two_independent_scores() -> None:
    rng = np.random.default_rng(1)
    ability = rng.random(400) < 0.6
    tuned = np.where(rng.random(400) < 0.05, ~ability, ability)
    found = paired(ability, tuned, bounded=True)
    assert isinstance(found, Proportions)
    apart = ability.astype(float) - tuned
    assert found.mean == pytest.approx(apart.mean())
    assert found.stderr == pytest.approx(stats.sem(apart))
    independent = Independent(found.mean, math.hypot(stats.sem(ability), stats.sem(tuned)), 400)
    assert np.ptp(found.interval(0.9)) < 0.5 * np.ptp(independent.interval(0.9))
    assert independent.interval(0.9)[1] == pytest.approx(found.mean + 1.6449 * independent.stderr, rel=1e-4)


def test_other_outcomes_have_students_interval() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(5, 2, 30), rng.normal(4, 2, 30)
    found = paired(first, second, bounded=False)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert found.interval(0.9) == pytest.approx((expected.low, expected.high))
    assert found.stderr == pytest.approx(stats.sem(first - second))
    assert found.n == 30
    assert np.isnan(paired([3.0], [4.0], bounded=False).interval(0.9)).all()
    # Two items of forty tell little of what the others might do.
    half = np.array([0.5, 0.5, *np.zeros(38)])
    few = paired(half, np.zeros(40), bounded=True)
    assert isinstance(few, Means)
    assert few.changed == 2
    assert few.interval(0.9)[1] - few.mean == pytest.approx(tango(0, 0, 40, 0.9)[1])
    # Nor do six that differ by the same: their spread is no evidence that the next will.
    alike = paired(np.full(6, 0.3), np.full(6, 0.29), bounded=True)
    assert alike.interval(0.9)[1] - alike.mean == pytest.approx(tango(0, 0, 6, 0.9)[1])
    with pytest.raises(ValueError, match="not of the same"):
        paired([1.0], [1.0, 0.0], bounded=True)


def test_a_mean_of_differences_has_the_usual_error_and_an_interval_that_does_not_collapse() -> None:
    normal = [Independent(0.1, 0.03, 9), Independent(0.3, 0.04, 9)]
    both = Mean(normal)
    assert (both.mean, both.stderr) == pytest.approx((0.2, 0.025))
    assert both.n == 18
    z = special.ndtri(0.95)
    assert both.interval(0.9) == pytest.approx((0.2 - z * 0.025, 0.2 + z * 0.025))
    same = Mean([Proportions(0, 0, 50)] * 4)
    assert same.interval(0.9)[1] == pytest.approx(tango(0, 0, 50, 0.9)[1] / 2)
    # Two scores of all or nothing, whose items are not known, are no certainty either.
    assert Independent(1.0, 0.0, 7, bounded=True).interval(0.9)[0] == pytest.approx(1 - tango(0, 0, 7, 0.9)[1])
    assert all(map(math.isnan, Mean([*normal, Independent(0.1, math.nan, 9)]).interval(0.9)))


def test_a_mean_over_tasks_holds_the_truth_as_often_as_it_says() -> None:
    rng, level = np.random.default_rng(3), 0.9
    rates = [(0.1, 0.05, 40), (0.02, 0.0, 80), (0.3, 0.1, 60)]
    truth = np.mean([more - less for more, less, _ in rates])
    held = 0.0
    for _ in range(400):
        drawn = [rng.multinomial(n, [more, less, 1 - more - less]) for more, less, n in rates]
        low, high = Mean(
            [Proportions(int(more), int(less), int(more + less + same)) for more, less, same in drawn]
        ).interval(level)
        held += float(low <= truth <= high)
    assert held / 400 > level - 0.04


def test_how_many_more_items_it_takes() -> None:
    limit, level = 0.02, 0.9
    z2 = special.ndtri(0.95) ** 2
    same = Proportions(0, 0, 20)
    times = times_needed(same, limit, level)
    assert times is not None
    assert times * 20 == pytest.approx(z2 * (1 - limit) / limit, rel=2e-3)  # z^2 / (n + z^2) is the limit
    for found in (Proportions(2, 2, 20), Proportions(5, 1, 100), Independent(0.0, 0.1, 50), Mean([same, same])):
        times = times_needed(found, limit, level)
        assert times is not None
        for factor, told in ((0.95, False), (1.01, True)):
            low, high = found.interval(level, factor * times)
            assert (high <= limit or low > limit) is told
    assert times_needed(Proportions(1, 0, 50), limit, level) is None  # the drop is the limit
    assert times_needed(Independent(0.0, math.nan, 50), limit, level) is None
