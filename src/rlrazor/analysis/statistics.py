"""Scores at equal new-task accuracy, differences between arms, one verdict on them, correlations; all with intervals.

Tables have a row per checkpoint, with `seed`, `new` and `prior` (fractions of 1). Groups are the values of the columns
`by` and come in order of first appearance. Intervals of means are 95 % t-intervals over seeds, null for one seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import polars as pl
from scipy import stats

from rlrazor.analysis import frontier, law
from rlrazor.analysis.law import Floats, finite
from rlrazor.errors import RazorError

HALF_POINT = 0.005
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half its 95 % t-interval, None for a single seed."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per seed."""
        mean, (_, high) = float(np.mean(values)), frontier.t_interval(values)
        return cls(mean, None if high is None else high - mean, len(values))

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(factor * self.mean, None if self.half is None else factor * self.half, self.seeds)


def over(values: Iterable[float]) -> Estimate | None:
    """The estimate from one value per seed; None for none."""
    found = list(values)
    return Estimate.over(found) if found else None


def mean_of(rows: pl.DataFrame, column: str) -> Estimate | None:
    """The mean of a column of rows, one per seed; None without any that has a number there."""
    return over(rows.sort("seed")[column].cast(pl.Float64).drop_nulls().drop_nans().to_list())


def mean_or(estimate: Estimate | None, other: T) -> float | T:
    """The mean, or `other` where there is none."""
    return estimate.mean if estimate else other


class Standing(StrEnum):
    """How one arm stands against another, by the verdict on their difference."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "cannot be told"
    APART = "not comparable"


def verdict(gap: Estimate | None, seeds: int, *, lower_is_better: bool = False) -> Standing:
    """The one rule: better or worse where the 95 % interval of a paired difference over `seeds` seeds excludes 0.

    Where it holds 0, or with one seed, which has no interval, it cannot be told. Where not all of the study's `seeds`
    allow the difference (None: none does) the two are not comparable: the seeds left would be the lucky ones.
    """
    if gap is None or gap.seeds < seeds:
        return Standing.APART
    if gap.half is None or not abs(gap.mean) > gap.half:
        return Standing.OPEN
    return Standing.BETTER if (gap.mean > 0) != lower_is_better else Standing.WORSE


def floats(table: pl.DataFrame, column: str) -> Floats:
    """A column as numbers; null becomes NaN."""
    return table[column].cast(pl.Float64).to_numpy()


def by_group(per_seed: pl.DataFrame, by: str, column: str) -> dict[Any, Estimate | None]:
    """By value of the column `by`, the mean of a column of rows, one per seed."""
    groups = per_seed.group_by([by], maintain_order=True)
    return {value: mean_of(rows, column) for (value,), rows in groups}


def near_accuracy(
    points: pl.DataFrame, by: Sequence[str], target: float, columns: Sequence[str], margin: float = HALF_POINT
) -> pl.DataFrame:
    """Per group and seed the mean of `columns` over the checkpoints whose new is within `margin` of `target`.

    A row for each group and seed that has such checkpoints. Those without a finite value in `columns` do not count.
    """
    # Accuracies are counts over a test set: the last term is for those at exactly the margin.
    near = finite(points, ["new"]).filter((pl.col("new") - target).abs() <= margin + 1e-9)
    return seed_means(near, by, columns)


def seed_means(points: pl.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Per group and seed the mean of `columns`; rows without a finite value in one do not count."""
    groups = finite(points, columns).group_by([*by, "seed"], maintain_order=True)
    return groups.agg(pl.col(columns).cast(pl.Float64).mean())


def shared_threshold(
    points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], thresholds: Sequence[float]
) -> float | None:
    """The highest of `thresholds` that all groups reach, in all seeds of `points`, which so reach the lowest of them.

    Those that a base of `bases` reaches do not count: there, a checkpoint that learnt nothing would be the best. None
    where no group reaches any.
    """
    above = sorted(at for at in thresholds if at > max(bases["new"], default=0.0))
    groups = [in_all_seeds(points, by, at) for at in above]
    return max((at for at, count in zip(above, groups, strict=True) if 0 < count == groups[0]), default=None)


def threshold_most_reach(
    points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], thresholds: Sequence[float]
) -> float | None:
    """The highest of `thresholds` that most of the groups' seeds reach: nine in ten of those that reach the lowest.

    Unlike `shared_threshold` it lets a few groups fall by the wayside. Those that a base reaches do not count. None
    where no seed reaches any.
    """
    best = floats(finite(points, ["new"]).group_by([*by, "seed"]).agg(pl.max("new")), "new")
    above = sorted(at for at in thresholds if at > max(bases["new"], default=0.0))
    counts = [int((best >= at).sum()) for at in above]
    return max((at for at, count in zip(above, counts, strict=True) if 0 < count >= 0.9 * counts[0]), default=None)


def in_all_seeds(points: pl.DataFrame, by: Sequence[str], threshold: float) -> int:
    """How many groups get to a new-task accuracy in all seeds of `points`."""
    reached = finite(points, ["new", "prior"]).filter(pl.col("new") >= threshold)
    seeds = reached.unique([*by, "seed"]).group_by(by).len()
    return seeds.filter(pl.col("len") == points["seed"].n_unique()).height


def difference(first: pl.DataFrame, second: pl.DataFrame, column: str) -> Estimate | None:
    """`first` minus `second`, each with a row per seed, over the seeds that both have; None where they share none.

    Seeds are paired, since methods start from the same base: what a base is worth cancels. A seed without a finite
    value on both sides is none that both have.
    """
    both = first.select("seed", column).join(second.select("seed", other=column), on="seed").sort("seed")
    pairs = finite(both, [column, "other"])
    gaps = (floats(pairs, column) - floats(pairs, "other")).tolist()
    return Estimate.over(gaps) if gaps else None


def with_params(table: pl.DataFrame, **defaults: bool | float | str) -> pl.DataFrame:
    """The table with these params as columns, whether its runs name them or not: what a run leaves out is the default.

    Columns take the defaults' types.
    """
    return table.with_columns(
        (pl.col(name) if name in table.columns else pl.lit(None))
        .cast(pl.DataType.from_python(type(default)))
        .fill_null(default)
        .alias(name)
        for name, default in defaults.items()
    )


@dataclass(frozen=True)
class Correlation:
    """Between two columns, over `points` checkpoints; intervals are None for fewer than 5 groups."""

    pearson: float
    pearson_interval: tuple[float, float] | None
    spearman: float
    spearman_interval: tuple[float, float] | None
    points: int


def correlation(
    table: pl.DataFrame, x: str, y: str, by: str = "trajectory", *, samples: int = 200
) -> Correlation | None:
    """Pearson's and Spearman's correlation of two columns, with 95 % bootstrap intervals drawing whole groups of `by`.

    None for fewer than 3 finite pairs, or where one of the two does not vary. `samples` are the bootstrap's.
    """
    pairs = finite(table, [x, y]).select(x=pl.col(x).cast(pl.Float64), y=pl.col(y).cast(pl.Float64), group=by)
    try:
        pearson, spearman = _pearson(pairs), _spearman(pairs)
    except RazorError:
        return None
    return Correlation(
        pearson,
        law.bootstrap(_pearson, pairs, "group", samples=samples),
        spearman,
        law.bootstrap(_spearman, pairs, "group", samples=samples),
        len(pairs),
    )


def _pearson(pairs: pl.DataFrame) -> float:
    return float(np.corrcoef(*_varied(pairs))[0, 1])


def _spearman(pairs: pl.DataFrame) -> float:
    return float(stats.spearmanr(*_varied(pairs)).statistic)


def _varied(pairs: pl.DataFrame) -> tuple[Floats, Floats]:
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise RazorError("A correlation needs at least 3 points that differ in both.")
    return x, y
