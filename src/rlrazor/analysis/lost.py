"""What was lost and what was gained, item by item, where outcomes are right (1) or wrong (0).

Forgetting one fact is not made up for by recalling another, which a difference of two means takes for granted. So the
items that were right before and are wrong now are counted (lost), those the other way round (gained), and the net drop
is their difference.

Where a model chooses one of k answers it may be right by luck. The response model is that of "Mapping Post-Training
Forgetting" (arXiv:2510.17776): it knows an answer, or guesses among the k, each as likely. Of items that it knows
neither before nor after, (k-1)^2/k^2 are wrong both times, and (k-1)/k^2 each seem lost and seem gained. Only those are
wrong both times; so of the n00 items that are follows how many of the others luck explains: n00/(k-1) of the lost, and
as many of the gained. The adjusted share is (n10 - n00/(k-1))/n. Of the items that were known and are guessed now it
counts those whose guess came out wrong, (k-1)/k of them. The paper takes for n00/n the product of the two error rates,
(1-a1)(1-a2), as if before and after were independent; here it is counted.

The model takes guesses to be drawn anew. A tuned model that is much like its base guesses as the base did, and fewer
are lost by luck than that. Then the adjusted share is too small, often below 0: luck could explain as many and more.
What was lost lies between the adjusted share and the plain one. The adjusted one is kept as it is; `shown` is 0 then.

Intervals: of a plain share Wilson's; of an adjusted one from Wilson's of both counts, by the method of variance
estimates recovery for correlated estimates (Zou, Psychological Methods 12, 399-413, 2007); of the net drop Tango's
(`paired`). Items of one subject may be lost together. Where clusters are given, and enough of them, each interval is as
wide as that of a bootstrap of whole clusters (percentiles, a fixed seed), and never narrower than without.

Several runs of one method were asked the same items, and do not answer independently: an item that one run lost is
likely to be lost by the next. All shares are then means over the runs, and an interval is of the same runs on other
items of the kind. N items in R runs are worth N independent answers where all runs answer alike, R N where they have
nothing in common; how many, the spread of the items' means over the runs tells (`worth`). How much another seed would
differ, no interval here says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri

from rlrazor.analysis.law import Floats
from rlrazor.analysis.paired import FEW_CHANGED, Interval, around_mean, tango

DRAWS, SEED = 4000, 0
FEW_CLUSTERS = 8  # with fewer, a bootstrap of clusters is far too narrow, and none is made
SHOWN = 10  # items that were lost most surely
WITHIN_LUCK = "within luck"
T = TypeVar("T")


@dataclass(frozen=True)
class Moved:
    """Items lost, or gained: how many in all runs, as a share with its interval, and adjusted for chance.

    `adjusted` may lie below 0; None where the model does not choose among answers.
    """

    count: int
    share: float
    interval: Interval
    adjusted: float | None = None
    adjusted_interval: Interval | None = None

    @property
    def shown(self) -> tuple[float, Interval] | None:
        """The adjusted share and its interval, cut at 0; None where there is none."""
        if self.adjusted is None or self.adjusted_interval is None:
            return None
        low, high = self.adjusted_interval
        return max(self.adjusted, 0.0), (max(low, 0.0), max(high, 0.0))

    @property
    def within_luck(self) -> bool:
        """Whether luck could explain as many and more: cut at 0 nothing is left, which yet is not known for certain."""
        return self.adjusted_interval is not None and self.adjusted_interval[1] <= 0


@dataclass(frozen=True)
class Transitions:
    """Of `n` items, each in all `runs`: lost, gained, the net drop with its interval, and McNemar's exact p, two-sided.

    `p` is of items that fell and items that rose, on average over the runs; None of a mean over tasks. `clusters`: how
    many the intervals are clustered by; None where they take the items for independent.
    """

    n: int
    lost: Moved
    gained: Moved
    interval: Interval
    p: float | None
    level: float
    clusters: int | None = None
    runs: int = 1

    @property
    def drop(self) -> float:
        """Lost less gained: the drop of the mean, a fraction of 1."""
        return self.lost.share - self.gained.share


def transitions(
    base_N: ArrayLike,
    tuned_N: ArrayLike,
    level: float,
    *,
    choices_N: Sequence[int | None] | None = None,
    clusters_N: Sequence[Hashable] | None = None,
) -> Transitions | None:
    """Of the outcomes of the same N items in the same order; None where they are not all 0 or 1, or there are none.

    Of several runs the outcomes are (R, N). `choices_N`: among how many answers each chooses; nothing is adjusted
    unless all choose among two at least.
    """
    base, tuned = (np.atleast_2d(np.asarray(outcomes, float)) for outcomes in (base_N, tuned_N))
    if base.shape != tuned.shape:
        raise ValueError(f"outcomes of {base.shape} and {tuned.shape} runs and items are not of the same ones")
    if not base.size or not all(np.isin(outcomes, (0.0, 1.0)).all() for outcomes in (base, tuned)):
        return None
    runs, n = base.shape
    lost, gained, wrong = base > tuned, base < tuned, (base + tuned) == 0
    choices = _choices(choices_N)
    luck = None if choices is None else wrong / (choices - 1)
    groups = None if clusters_N is None else clusters_of(clusters_N)

    def interval(values_RN: Floats, own: Interval) -> Interval:
        return widened(own, values_RN.mean(axis=0), groups, level)

    def flow(moved_RN: NDArray[np.bool_]) -> Moved:
        count = int(moved_RN.sum())
        share, answers = count / (runs * n), worth(moved_RN)
        plain = interval(moved_RN.astype(float), wilson(count * answers / (runs * n), answers, level))
        if luck is None or choices is None:
            return Moved(count, share, plain)
        beyond = moved_RN - luck
        adjusted = interval(beyond, _adjusted_interval(moved_RN, wrong, choices, level))
        return Moved(count, share, plain, float(beyond.mean()), adjusted)

    apart = base - tuned
    answers, of_items = worth(apart), apart.mean(axis=0)
    more, less = (int(moved.sum()) * answers / (runs * n) for moved in (lost, gained))
    p = mcnemar(int((of_items > 0).sum()), int((of_items < 0).sum()))
    number = None if groups is None else int(groups.max()) + 1
    drop = interval(apart, tango(more, less, answers, level))
    return Transitions(n, flow(lost), flow(gained), drop, p, level, number, runs)


def worth(values_RN: Floats | NDArray[np.bool_]) -> float:
    """How many independent answers those of R runs to the same N items are worth: N for a single run, R N at most.

    By how much smaller the spread of the items' means is than that of single answers. Where hardly an item differs from
    the others that cannot be told, and it is N.
    """
    runs, n = values_RN.shape
    differing = min(int((values_RN != one).any(axis=0).sum()) for one in (0, 1))
    if runs == 1 or differing < FEW_CHANGED:
        return float(n)
    single, mean = float(values_RN.var()), float(values_RN.mean(axis=0).var())
    return float(runs * n) if mean * runs <= single else n * single / mean


def over_tasks(tasks: Sequence[Transitions]) -> Transitions:
    """The mean over tasks, each of which counts the same, as in a prior score; the tasks' items are other ones."""
    lost, gained = _mean_flow([one.lost for one in tasks]), _mean_flow([one.gained for one in tasks])
    drop = around_mean([(one.drop, one.interval) for one in tasks])
    p = tasks[0].p if len(tasks) == 1 else None
    clusters = tasks[0].clusters if len(tasks) == 1 else None
    return Transitions(sum(one.n for one in tasks), lost, gained, drop, p, tasks[0].level, clusters, tasks[0].runs)


def _mean_flow(flows: Sequence[Moved]) -> Moved:
    count, share = sum(one.count for one in flows), math.fsum(one.share for one in flows) / len(flows)
    plain = around_mean([(one.share, one.interval) for one in flows])
    known = [
        (one.adjusted, one.adjusted_interval)
        for one in flows
        if one.adjusted is not None and one.adjusted_interval is not None
    ]
    if len(known) < len(flows):
        return Moved(count, share, plain)
    return Moved(count, share, plain, math.fsum(one for one, _ in known) / len(known), around_mean(known))


def guessed_among(choices: int | None, right: Sequence[int] | None) -> int | None:
    """Among how many answers one alone is right, so that a guess may be; None where that is not how it is scored.

    `choices`: how many there are; `right`: the places of the right ones; None without any.
    """
    return choices if right is not None and len(right) == 1 else None


def _choices(choices_N: Sequence[int | None] | None) -> Floats | None:
    if choices_N is None or any(one is None or one < 2 for one in choices_N):
        return None
    return np.asarray(choices_N, float)


def clusters_of(clusters_N: Sequence[Hashable]) -> NDArray[np.int64] | None:
    """The clusters by number, from 0 up; None for too few."""
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(one, len(numbers)) for one in clusters_N])
    return found if len(numbers) >= FEW_CLUSTERS else None


def mcnemar(more: int, less: int) -> float:
    """How likely so uneven a split of the items that differ is, or a more uneven one, where both ways are as likely."""
    return min(1.0, 2 * float(bdtr(min(more, less), more + less, 0.5))) if more + less else 1.0


def wilson(count: float, n: float, level: float) -> Interval:
    """The score interval of a share."""
    z2 = float(ndtri((1 + level) / 2)) ** 2
    middle = (count + z2 / 2) / (n + z2)
    half = math.sqrt(z2) / (n + z2) * math.sqrt(count * (n - count) / n + z2 / 4)
    return (0.0 if count == 0 else middle - half), (1.0 if count == n else middle + half)


def _adjusted_interval(
    moved_RN: NDArray[np.bool_], wrong_RN: NDArray[np.bool_], choices_N: Floats, level: float
) -> Interval:
    """Of the mean of moved - wrong / (k - 1); items with another k are other items, and so independent."""
    mean, below, above = 0.0, 0.0, 0.0
    for k in np.unique(choices_N):
        own = choices_N == k
        weight, moved, wrong = float(own.mean()), moved_RN[:, own], wrong_RN[:, own]
        answers = min(worth(moved), worth(wrong))
        each = answers / moved.size
        counts = int(moved.sum()) * each, int(wrong.sum()) * each
        one, low, high = _adjusted(*counts, answers, 1 / (float(k) - 1), level)
        mean += weight * one
        below, above = math.hypot(below, weight * (one - low)), math.hypot(above, weight * (high - one))
    return mean - below, mean + above


def _adjusted(moved: float, wrong: float, n: float, times: float, level: float) -> tuple[float, float, float]:
    """(moved - times wrong) / n and its ends: no item is both, so the two shares are correlated."""
    first, second = moved / n, times * wrong / n
    (low, high), (less, more) = wilson(moved, n, level), wilson(wrong, n, level)
    spread = math.sqrt(moved * (n - moved) * wrong * (n - wrong))
    correlation = -moved * wrong / spread if spread else 0.0

    def end(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * correlation * own * other + other**2, 0.0))

    estimate = first - second
    below = end(first - low, times * more - second)
    return estimate, estimate - below, estimate + end(high - first, second - times * less)


def widened(own: Interval, values_N: Floats, clusters_N: NDArray[np.int64] | None, level: float) -> Interval:
    """Of a mean of values the interval, as wide as the clusters make it; `clusters_N` None: as it is."""
    if clusters_N is None:
        return own
    low, high = cluster_bootstrap(values_N, clusters_N, level)
    return min(low, own[0]), max(high, own[1])


def cluster_bootstrap(values_N: Floats, clusters_N: NDArray[np.int64], level: float) -> Interval:
    """Percentiles of the mean over the items of as many clusters drawn with replacement; `clusters_N` from 0 up."""
    count = int(clusters_N.max()) + 1
    sums_C = np.bincount(clusters_N, values_N, count)
    sizes_C = np.bincount(clusters_N, minlength=count)
    drawn_DC = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    means_D = (drawn_DC @ sums_C) / (drawn_DC @ sizes_C)
    low, high = np.quantile(means_D, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Likelihoods:
    """Of an item's answers in one model, as the task's metric compares them, and the places of the right ones."""

    logprobs: Sequence[float]
    right: Sequence[int]

    @property
    def likeliest(self) -> int | None:
        """The place of the model's answer; None without any."""
        return int(np.argmax(self.logprobs)) if len(self.logprobs) else None

    @property
    def margin(self) -> float | None:
        """The likeliest right answer's less the likeliest wrong one's; None where there are not both."""
        right = [one for place, one in enumerate(self.logprobs) if place in self.right]
        wrong = [one for place, one in enumerate(self.logprobs) if place not in self.right]
        return max(right) - max(wrong) if right and wrong else None


def fall(base: Likelihoods, tuned: Likelihoods) -> float | None:
    """How much an item's margin fell; None where one of the two has none."""
    before, after = base.margin, tuned.margin
    return None if before is None or after is None else before - after


def surest(lost: Sequence[T], fall_of: Callable[[T], float | None], count: int = SHOWN) -> list[T]:
    """Of items that were lost those whose margin fell most; those without a margin come after, in their order."""
    falls = [(one, fall_of(one)) for one in lost]
    ranked = sorted((pair for pair in falls if pair[1] is not None), key=lambda pair: -float(pair[1] or 0))
    return [one for one, _ in [*ranked, *(pair for pair in falls if pair[1] is None)]][:count]
