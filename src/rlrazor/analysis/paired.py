"""By how much two policies differ on the same items, with intervals that hold where hardly an item differs.

Scored on the same items, two policies share what makes an item easy or hard: only the items on which they differ say
anything, and the error of the difference is that of the mean of the items' differences, often a third of what two
independent scores would give.

Of outcomes that are 0 or 1 the interval is Tango's, which inverts the score test of paired proportions (Statistics in
Medicine 17, 891-908, 1998). Where no item of n differs it is still z^2 / (n + z^2) to each side: none has been seen is
not there is none. Of other outcomes it is Student's t of the differences. A mean of several differences, such as over
tasks, gets its interval from theirs by the method of variance estimates recovery (Zou and Donner, Statistics in
Medicine 27, 1693-1702, 2008), which gives back the usual one where they are symmetric.

`level` is two-sided everywhere: at 0.9, five in a hundred lie above the upper end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

FEW_CHANGED = 5  # items that differ; with fewer, a t-interval rests on almost nothing
MOST_TIMES = 1e4
BESIDE = 1e-12  # an estimate, in its unit

Interval = tuple[float, float]


class Difference(Protocol):
    """A difference of two scores on `n` items; `stderr` is NaN, for unknown, where there is none."""

    @property
    def mean(self) -> float:
        """The difference."""

    @property
    def stderr(self) -> float:
        """Its standard error."""

    @property
    def n(self) -> int:
        """Items."""

    def interval(self, level: float, times: float = 1.0) -> Interval:
        """Its ends; with `times`, what they would be on so many times the items, if these differed alike."""


@dataclass(frozen=True)
class Proportions:
    """Of `n` items with outcomes 0 and 1, those that only the first policy got (`more`), and only the second."""

    more: int
    less: int
    n: int

    @property
    def mean(self) -> float:
        """The difference of the two shares of 1."""
        return (self.more - self.less) / self.n

    @property
    def stderr(self) -> float:
        """By the differences' own spread: 0 where all items agree, which the interval does not take at its word."""
        if self.n < 2:
            return math.nan
        return math.sqrt((self.more + self.less - self.n * self.mean**2) / (self.n - 1) / self.n)

    def interval(self, level: float, times: float = 1.0) -> Interval:
        """Tango's."""
        return tango(self.more * times, self.less * times, self.n * times, level)


@dataclass(frozen=True)
class Means:
    """Differences of any size: their mean, standard deviation and count, and how many are not 0.

    `bounded`: outcomes lie between 0 and 1, so that what an unseen item may bring is known.
    """

    mean: float
    deviation: float
    n: int
    changed: int
    bounded: bool

    @property
    def stderr(self) -> float:
        """NaN for a single item."""
        return self.deviation / math.sqrt(self.n)

    def interval(self, level: float, times: float = 1.0) -> Interval:
        """Student's t; of bounded outcomes, where few items differ, or all alike, no narrower than of 0 and 1."""
        n = self.n * times
        half = float(stdtrit(n - 1, (1 + level) / 2)) * self.deviation / math.sqrt(n) if n > 1 else math.nan
        if not self.bounded:
            return self.mean - half, self.mean + half
        if math.isnan(half):
            half = 1.0
        elif self.changed * times < FEW_CHANGED or self.deviation < BESIDE:
            half = max(half, tango(0, 0, n, level)[1])
        return max(self.mean - half, -1.0), min(self.mean + half, 1.0)


@dataclass(frozen=True)
class Independent:
    """Two scores of which the items' outcomes are not known: `stderr` takes them to be of different items.

    `bounded` as in `Means`.
    """

    mean: float
    stderr: float
    n: int
    bounded: bool = False

    def interval(self, level: float, times: float = 1.0) -> Interval:
        """By the normal distribution; NaN where the standard error is.

        Where that is 0, as all items came out alike, bounded outcomes tell no more than if none had differed.
        """
        half = float(ndtri((1 + level) / 2)) * self.stderr / math.sqrt(times)
        if self.bounded and not half:
            half = tango(0, 0, self.n * times, level)[1]
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Mean:
    """The mean of differences on different items, each of which counts the same, as of several tasks."""

    parts: Sequence[Difference]

    @property
    def mean(self) -> float:
        """Of the parts' means."""
        return math.fsum(part.mean for part in self.parts) / len(self.parts)

    @property
    def stderr(self) -> float:
        """NaN where a part's is."""
        return math.hypot(*(part.stderr for part in self.parts)) / len(self.parts)

    @property
    def n(self) -> int:
        """The items of all parts."""
        return sum(part.n for part in self.parts)

    def interval(self, level: float, times: float = 1.0) -> Interval:
        """See `around_mean`."""
        return around_mean([(part.mean, part.interval(level, times)) for part in self.parts])


def around_mean(parts: Sequence[tuple[float, Interval]]) -> Interval:
    """Of the mean of independent estimates: their distances to their own ends, added as standard errors are."""
    mean = math.fsum(one for one, _ in parts) / len(parts)
    below = math.hypot(*(one - low for one, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - one for one, (_, high) in parts)) / len(parts)
    return mean - below, mean + above


def paired(first_N: ArrayLike, second_N: ArrayLike, *, bounded: bool) -> Difference:
    """First minus second, of the outcomes of the same N items in the same order. `bounded` as in `Means`."""
    first, second = np.asarray(first_N, float), np.asarray(second_N, float)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"outcomes of {first.shape} and {second.shape} items are not of the same ones")
    if all(np.isin(outcomes, (0.0, 1.0)).all() for outcomes in (first, second)):
        return Proportions(int((first > second).sum()), int((first < second).sum()), len(first))
    apart = first - second
    deviation = float(apart.std(ddof=1)) if len(apart) > 1 else math.nan
    inside = bool(((first >= 0) & (first <= 1) & (second >= 0) & (second <= 1)).all())
    return Means(float(apart.mean()), deviation, len(apart), int((apart != 0).sum()), bounded and inside)


def tango(more: float, less: float, n: float, level: float) -> Interval:
    """The score interval for (more - less) / n, of n pairs of outcomes 0 and 1, `more` and `less` of which differ.

    Where the score statistic is z to each side: below the estimate it falls from positive to negative, above likewise.
    """
    z = float(ndtri((1 + level) / 2))
    estimate = (more - less) / n

    def beyond(difference: float, side: float) -> float:
        """The numerator of the statistic, less `side` z of its denominators."""
        linear = (2 * n - more + less) * difference - more - less
        constant = -less * difference * (1 - difference)
        # How likely a pair of the rarer kind is, by maximum likelihood, if that is the difference.
        likely = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * likely + difference * (1 - difference))
        return more - less - n * difference - side * z * math.sqrt(max(variance, 0.0))

    # At the estimate itself the statistic is 0 / 0 where no pair differs, or where all do in one way.
    low = -1.0 if less >= n else float(brentq(beyond, -1.0, estimate - BESIDE, args=(1.0,)))
    high = 1.0 if more >= n else float(brentq(beyond, estimate + BESIDE, 1.0, args=(-1.0,)))
    return low, high


def times_needed(difference: Difference, limit: float, level: float) -> float | None:
    """How many times as many items, which differ alike, it takes until the interval does not hold `limit`.

    None where even MOST_TIMES as many would not do, as the difference is the limit itself, or has no error.
    """

    def holds(times: float) -> bool:
        low, high = difference.interval(level, times)
        return not (high <= limit or low > limit)

    if holds(MOST_TIMES):
        return None
    low, high = 1.0, 1.0
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
