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
    over_tasks,
    surest,
    transitions,
    wilson,
    worth,
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


# --- several runs, which answer the same items


def of_runs(rng: np.random.Generator, runs: int, n: int, spread: float = 1.0) -> Bools:
    """Whether each run lost each item: items are lost with probabilities of mean LOST, far apart for a small spread."""
    likely_N = rng.beta(LOST * spread, (1 - LOST) * spread, n)
    return rng.random((runs, n)) < likely_N


def test_a_single_run_and_as_many_copies_of_it_tell_the_same() -> None:
    rng = np.random.default_rng(7)
    base, tuned = answered(rng, 120, 4)
    subject = [at % 12 for at in range(120)]
    alone = found(base, tuned, 0.9, choices_N=[4] * 120, clusters_N=subject)
    for runs in (1, 3):
        copies = found([base] * runs, [tuned] * runs, 0.9, choices_N=[4] * 120, clusters_N=subject)
        assert (copies.n, copies.runs, copies.clusters, copies.p) == (120, runs, 12, alone.p)
        assert copies.interval == pytest.approx(alone.interval)
        for one, other in ((copies.lost, alone.lost), (copies.gained, alone.gained)):
            assert one.count == runs * other.count
            assert (one.share, *one.interval) == pytest.approx((other.share, *other.interval))
            assert (one.adjusted, *one.adjusted_interval) == pytest.approx((other.adjusted, *other.adjusted_interval))


def test_what_runs_are_worth_is_told_by_the_spread_of_the_items_means() -> None:
    rng, runs, n = np.random.default_rng(8), 4, 300
    values = of_runs(rng, runs, n)
    single = sum((float(one) - values.mean()) ** 2 for one in values.ravel()) / (runs * n)
    means = [sum(values[run, at] for run in range(runs)) / runs for at in range(n)]
    between = sum((one - values.mean()) ** 2 for one in means) / n
    assert worth(values) == pytest.approx(n * single / between)
    assert n < worth(values) < runs * n
    assert worth(np.tile(values[0], (runs, 1))) == pytest.approx(n)
    assert worth(rng.random((runs, 20_000)) < 0.3) == pytest.approx(runs * 20_000, rel=0.03)
    once_each = np.zeros((runs, n), bool)  # four items, each lost by another run
    once_each[range(4), range(4)] = True
    assert worth(once_each) == n


def test_shares_of_several_runs_are_means_over_them_and_p_is_that_of_items() -> None:
    base = np.array([[1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1]])
    tuned = np.array([[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]])
    seen = found(base, tuned, 0.9)
    assert (seen.lost.count, seen.gained.count, seen.lost.share, seen.drop) == (4, 1, 4 / 12, pytest.approx(3 / 12))
    assert seen.p == pytest.approx(binomtest(3, 4).pvalue)  # three items fell on average, one rose
    assert seen.interval == pytest.approx(tango(2.0, 0.5, 6, 0.9))  # few differ: as many answers as items


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_an_interval_over_items_holds_the_truth_as_often_as_it_says_whatever_the_runs_share(spread: float) -> None:
    rng, runs, n, tries = np.random.default_rng(9), 5, 150, 500
    held, naive = np.zeros(2), 0
    for _ in range(tries):
        lost = of_runs(rng, runs, n, spread)
        seen = found(np.ones((runs, n)), ~lost, 0.9)
        for at, (low, high) in enumerate((seen.interval, seen.lost.interval)):
            held[at] += low <= LOST <= high
        low, high = wilson(lost.sum(), lost.size, 0.9)
        naive += low <= LOST <= high
    assert (held / tries).tolist() == pytest.approx([0.9, 0.9], abs=0.05)
    assert naive / tries < (0.8 if spread < 1 else 0.9)  # as if all answers were independent


def test_a_mean_over_tasks_counts_each_the_same() -> None:
    rng = np.random.default_rng(10)
    parts = [found(*answered(rng, n, 4), 0.9, choices_N=[4] * n) for n in (60, 200, 31)]
    whole = over_tasks(parts)
    assert (whole.n, whole.p, whole.clusters) == (291, None, None)
    assert whole.lost.count == sum(one.lost.count for one in parts)
    assert whole.drop == pytest.approx(np.mean([one.drop for one in parts]))
    assert whole.lost.adjusted == pytest.approx(np.mean([one.lost.adjusted for one in parts]))
    for name in ("drop", "gained"):
        ends = [
            (one.drop, *one.interval) if name == "drop" else (one.gained.share, *one.gained.interval)
            for one in (whole, *parts)
        ]
        (mean, low, high), *of_parts = ends
        assert mean - low == pytest.approx(sum((one - end) ** 2 for one, end, _ in of_parts) ** 0.5 / 3)
        assert high - mean == pytest.approx(sum((end - one) ** 2 for one, _, end in of_parts) ** 0.5 / 3)
    assert over_tasks(parts[:1]) == parts[0]
    assert over_tasks([*parts, found([1.0], [0.0], 0.9)]).lost.adjusted is None
