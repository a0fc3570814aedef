"""Lost and gained, against the response model simulated, scipy, and a bootstrap written out."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.stats import binomtest  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.analysis.lost import (
    FEW_CLUSTERS,
    Likelihoods,
    Moved,
    cluster_bootstrap,
    fall,
    mcnemar,
    surest,
    transitions,
    wilson,
)
from rlrazor.analysis.paired import tango

KEPT, LOST, GAINED = 0.5, 0.12, 0.04  # of the items: known both times, before only, after only; the rest never
Bools = NDArray[np.bool_]


def answered(rng: np.random.Generator, n: int, k: int) -> tuple[Bools, Bools]:
    """The response model: an item is known before, and after; what is not known is guessed, anew each time."""
    kind = rng.choice(4, n, p=[KEPT, LOST, GAINED, 1 - KEPT - LOST - GAINED])
    before, after = (kind == 0) | (kind == 1), (kind == 0) | (kind == 2)
    return before | (rng.random(n) < 1 / k), after | (rng.random(n) < 1 / k)


def found(*arguments: Any, **named: Any) -> Any:
    one = transitions(*arguments, **named)
    assert one is not None
    return one


@pytest.mark.parametrize("k", [2, 4, 10])
def test_what_luck_explains_is_taken_off(k: int) -> None:
    rng, n = np.random.default_rng(k), 400_000
    base, tuned = answered(rng, n, k)
    seen = found(base, tuned, 0.9, choices_N=[k] * n)
    wrong_guess = (k - 1) / k
    assert seen.lost.adjusted == pytest.approx(LOST * wrong_guess, abs=0.005)
    assert seen.gained.adjusted == pytest.approx(GAINED * wrong_guess, abs=0.005)
    assert seen.lost.share > seen.lost.adjusted + 0.01  # unadjusted there is luck in it
    # Luck takes as much off both.
    assert seen.lost.adjusted - seen.gained.adjusted == pytest.approx(seen.drop)


@pytest.mark.parametrize(("n", "k"), [(60, 4), (300, 2), (300, 10)])
def test_an_adjusted_interval_holds_the_truth_as_often_as_it_says(n: int, k: int) -> None:
    rng, level, tries = np.random.default_rng(n + k), 0.9, 1500
    held = 0
    for _ in range(tries):
        low, high = found(*answered(rng, n, k), level, choices_N=[k] * n).lost.adjusted_interval
        held += low <= LOST * (k - 1) / k <= high
    assert held / tries == pytest.approx(level, abs=0.03)


def test_guesses_that_stay_the_same_are_taken_for_more_luck_than_there_is() -> None:
    """As the docstring warns: the adjusted share is then below 0, is kept so, and is shown as 0."""
    base = np.arange(100) < 40
    seen = found(base, base, 0.9, choices_N=[4] * 100)
    assert seen.lost.adjusted == pytest.approx(-60 / 3 / 100)
    assert seen.lost.shown[0] == 0
    assert 0 <= seen.lost.shown[1][0] <= seen.lost.shown[1][1]
    assert Moved(1, 0.1, (0.0, 0.2)).shown is None


def test_without_choices_nothing_is_adjusted() -> None:
    base, tuned = answered(np.random.default_rng(0), 50, 4)
    for choices in (None, [None] * 50, [4] * 49 + [1], [4] * 49 + [None]):
        seen = found(base, tuned, 0.9, choices_N=choices)
        assert (seen.lost.adjusted, seen.gained.adjusted_interval) == (None, None)
        assert seen.lost.count == int((base & ~tuned).sum())


def test_items_with_other_numbers_of_choices_are_adjusted_each_by_its_own() -> None:
    rng = np.random.default_rng(3)
    choices = rng.choice([2, 4, 5], 500)
    base, tuned = rng.random(500) < 0.6, rng.random(500) < 0.5
    seen = found(base, tuned, 0.9, choices_N=choices.tolist())
    one_by_one = [
        (before and not after) - (not before and not after) / (k - 1)
        for before, after, k in zip(base, tuned, choices, strict=True)
    ]
    assert seen.lost.adjusted == pytest.approx(np.mean(one_by_one))
    low, high = seen.lost.adjusted_interval
    half = 1.645 * stats.sem(one_by_one)  # with many items
    assert (low, high) == pytest.approx((np.mean(one_by_one) - half, np.mean(one_by_one) + half), abs=0.01)


@pytest.mark.parametrize(("more", "less"), [(0, 0), (7, 0), (3, 9), (20, 20), (11, 12)])
def test_mcnemars_p_is_the_binomial_tests(more: int, less: int) -> None:
    expected = binomtest(more, more + less).pvalue if more + less else 1.0
    assert mcnemar(more, less) == pytest.approx(expected)
    assert mcnemar(less, more) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "n"), [(0, 10), (10, 10), (3, 40), (1, 1)])
def test_the_interval_of_a_share_is_scipys(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(0.9, method="wilson")
    assert wilson(count, n, 0.9) == pytest.approx((expected.low, expected.high))


def test_the_counts_are_those_of_the_items() -> None:
    seen = found([1, 1, 1, 0, 0], [0, 0, 1, 1, 0], 0.8)
    assert (seen.n, seen.lost.count, seen.gained.count, seen.drop) == (5, 2, 1, pytest.approx(0.2))
    assert seen.interval == pytest.approx(tango(2, 1, 5, 0.8))
    assert (seen.clusters, seen.level, seen.p) == (None, 0.8, 1.0)


def test_what_is_not_right_or_wrong_is_not_counted() -> None:
    assert transitions([0.5, 1.0], [1.0, 1.0], 0.9) is None
    assert transitions([], [], 0.9) is None
    with pytest.raises(ValueError, match="not of the same ones"):
        transitions([1.0], [1.0, 0.0], 0.9)


# --- clusters


def by_subject(rng: np.random.Generator, subjects: int, each: int) -> tuple[Bools, Bools, list[int]]:
    """Subjects that forget much, or nothing."""
    subject = np.repeat(np.arange(subjects), each)
    lost = rng.random(subjects * each) < np.where(rng.random(subjects) < 0.5, 0.4, 0.0)[subject]
    return np.ones(subjects * each, bool), ~lost, subject.tolist()


def test_a_bootstrap_of_clusters_is_the_one_written_out() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(5, 40, 12)
    clusters = np.repeat(np.arange(12), sizes)
    values = rng.random(sizes.sum()) + 0.5 * np.repeat(rng.random(12), sizes)
    means = []
    for _ in range(4000):
        parts = [values[clusters == one] for one in rng.integers(0, 12, 12)]
        means.append(np.concatenate(parts).mean())
    assert cluster_bootstrap(values, clusters, 0.9) == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.01)
    assert cluster_bootstrap(values, clusters, 0.9) == cluster_bootstrap(values, clusters, 0.9)  # a fixed seed


def test_subjects_that_are_lost_together_widen_the_intervals() -> None:
    base, tuned, subject = by_subject(np.random.default_rng(1), 40, 25)
    alone, together = found(base, tuned, 0.9), found(base, tuned, 0.9, clusters_N=subject)
    assert together.clusters == 40
    for one, other in ((alone.interval, together.interval), (alone.lost.interval, together.lost.interval)):
        assert np.ptp(other) > 2 * np.ptp(one)
    assert (together.drop, together.p) == (alone.drop, alone.p)


def test_an_interval_by_subject_holds_the_truth_nearly_as_often_as_it_says() -> None:
    rng, tries = np.random.default_rng(2), 200
    ends = []
    for _ in range(tries):
        base, tuned, subject = by_subject(rng, 40, 25)
        ends.append((found(base, tuned, 0.9, clusters_N=subject).interval, found(base, tuned, 0.9).interval))
    held = [np.mean([one[which][0] <= 0.2 <= one[which][1] for one in ends]) for which in (0, 1)]
    assert held[0] > 0.85
    assert held[1] < 0.6  # what ignoring the subjects would give


def test_an_interval_is_never_narrower_for_its_clusters_and_few_do_not_count() -> None:
    same = np.ones(200)
    seen = found(same, same, 0.9, clusters_N=[at % 20 for at in range(200)])
    assert seen.interval == pytest.approx(tango(0, 0, 200, 0.9))  # a bootstrap's would be of no width
    few = found(same, same, 0.9, clusters_N=[at % (FEW_CLUSTERS - 1) for at in range(200)])
    assert few.clusters is None


# --- what was lost most surely


def test_an_item_is_lost_the_more_surely_the_more_its_margin_fell() -> None:
    sure = Likelihoods((-1.0, -9.0, -5.0), (0,)), Likelihoods((-6.0, -2.0, -7.0), (0,))  # 4 nats, then -4
    close = Likelihoods((-1.0, -1.1, -3.0), (0,)), Likelihoods((-1.1, -1.0, -3.0), (0,))
    assert fall(*sure) == pytest.approx(8.0)
    assert fall(*close) == pytest.approx(0.2)
    assert (sure[0].likeliest, sure[1].likeliest) == (0, 1)
    several = Likelihoods((-1.0, -2.0, -3.0), (0, 1))
    assert several.margin == pytest.approx(2.0)  # its likeliest right answer over the likeliest wrong one
    unknown = Likelihoods((), ()), Likelihoods((), ())
    assert fall(*unknown) is None
    assert unknown[0].likeliest is None
    assert Likelihoods((-1.0,), (0,)).margin is None
    items = {"b": close, "a": unknown, "c": sure, "d": unknown}
    assert surest(list(items), lambda name: fall(*items[name])) == ["c", "b", "a", "d"]
    assert surest(list(items), lambda name: fall(*items[name]), 1) == ["c"]
    assert math.isfinite(fall(*close) or 0.0)
