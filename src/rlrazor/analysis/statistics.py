"""Scores at equal new-task accuracy, differences between arms, one verdict on them, correlations; all with intervals.

Tables have a row per checkpoint, with `seed`, `new` and `prior` (fractions of 1). Groups are the values of the columns
`by` and come in order of first appearance. Intervals of means are 95 % t-intervals over seeds, null for one seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import polars as pl
from scipy import stats

from rlrazor.analysis import frontier, law
from rlrazor.analysis.frontier import Floats
from rlrazor.errors import RazorError

HALF_POINT = 0.005


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

    @classmethod
    def of_interval(cls, mean: float | None, high: float | None, seeds: int) -> Estimate | None:
        """The estimate of a table's row, which has the interval's end; None where no seed got there."""
        return None if mean is None else cls(mean, None if high is None else high - mean, seeds)


def over(values: Iterable[float]) -> Estimate | None:
    """The estimate from one value per seed; None for none."""
    found = list(values)
    return Estimate.over(found) if found else None


def mean_of(rows: pl.DataFrame, column: str) -> Estimate | None:
    """The mean of a column of rows, one per seed; None without rows."""
    return over(rows.sort("seed")[column].to_list())


class Verdict(StrEnum):
    """What a difference between two arms shows."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "cannot be told"
    APART = "not comparable"


def verdict(gap: Estimate | None, seeds: int, *, lower_is_better: bool = False) -> Verdict:
    """The one rule: better or worse where the 95 % interval of a paired difference over `seeds` seeds excludes 0.

    Where it holds 0, or with one seed, which has no interval, it cannot be told. Where not all of the study's `seeds`
    allow the difference (None: none does) the two are not comparable: the seeds left would be the lucky ones.
    """
    if gap is None or gap.seeds < seeds:
        return Verdict.APART
    if gap.half is None or not abs(gap.mean) > gap.half:
        return Verdict.OPEN
    return Verdict.BETTER if (gap.mean > 0) != lower_is_better else Verdict.WORSE


def floats(table: pl.DataFrame, column: str) -> Floats:
    """A column as numbers; null becomes NaN."""
    return table[column].cast(pl.Float64).to_numpy()


def at_accuracy(
    points: pl.DataFrame,
    by: Sequence[str],
    threshold: float,
    columns: Sequence[str] = ("prior",),
    *,
    best: Literal["max", "min"] = "max",
    of: str = "prior",
) -> pl.DataFrame:
    """Each group's best checkpoint that has learnt the new task: per seed chosen, over seeds averaged.

    Chosen as `best_checkpoints` says. A row per group: `by`, then for each of `columns` its mean over seeds under the
    column's own name, and its interval as `COLUMN_low`, `COLUMN_high`; `n_seeds` that reached the threshold, of
    `seeds_total` in the group. Means are null where no seed did. Checkpoints without a finite value in a column used do
    not count.
    """
    chosen = best_checkpoints(_finite(points, columns), by, threshold, best=best, of=of)
    return _over_seeds(points, chosen, by, columns)


def best_checkpoints(
    points: pl.DataFrame,
    by: Sequence[str],
    threshold: float,
    *,
    best: Literal["max", "min"] = "max",
    of: str = "prior",
) -> pl.DataFrame:
    """Per group and seed, of the checkpoints with new >= `threshold` the first with the highest `of`.

    With `best="min"`, the lowest. Whole rows; none for a seed that does not reach the threshold. With `of="prior"`, the
    default, the best is chosen on the test score that is shown, which flatters, all groups alike, and most those with
    most checkpoints.
    """
    reached = _finite(points, ["new", of]).filter(pl.col("new") >= threshold)
    ranked = reached.sort(of, descending=best == "max", maintain_order=True)
    return ranked.unique([*by, "seed"], keep="first", maintain_order=True)


def near_accuracy(
    points: pl.DataFrame, by: Sequence[str], target: float, columns: Sequence[str], margin: float = HALF_POINT
) -> pl.DataFrame:
    """Per group and seed the mean of `columns` over the checkpoints whose new is within `margin` of `target`.

    A row for each group and seed that has such checkpoints. Those without a finite value in `columns` do not count.
    """
    # Accuracies are counts over a test set: the last term is for those at exactly the margin.
    near = _finite(points, ["new", *columns]).filter((pl.col("new") - target).abs() <= margin + 1e-9)
    return near.group_by([*by, "seed"], maintain_order=True).agg(pl.col(columns).cast(pl.Float64).mean())


def seed_means(points: pl.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Each group's mean of `columns`, whatever the accuracy: per seed, then over seeds. Rows as of `at_accuracy`."""
    per_seed = _finite(points, columns).group_by([*by, "seed"], maintain_order=True)
    return _over_seeds(points, per_seed.agg(pl.col(columns).cast(pl.Float64).mean()), by, columns)


def shared_threshold(
    points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], thresholds: Sequence[float]
) -> float | None:
    """The highest of `thresholds` that all groups reach, in all seeds of `points`, which so reach the lowest of them.

    Those that a base of `bases` reaches do not count: there, a checkpoint that learnt nothing would be the best. None
    where no group reaches any.
    """
    above = sorted(at for at in thresholds if at > max(bases["new"], default=0.0))
    groups = [len(in_all_seeds(at_accuracy(points, by, at), points)) for at in above]
    return max((at for at, count in zip(above, groups, strict=True) if 0 < count == groups[0]), default=None)


def threshold_most_reach(
    points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], thresholds: Sequence[float]
) -> float | None:
    """The highest of `thresholds` that most of the groups' seeds reach: nine in ten of those that reach the lowest.

    Unlike `shared_threshold` it lets a few groups fall by the wayside. Those that a base reaches do not count. None
    where no seed reaches any.
    """
    best = floats(_finite(points, ["new"]).group_by([*by, "seed"]).agg(pl.max("new")), "new")
    above = sorted(at for at in thresholds if at > max(bases["new"], default=0.0))
    counts = [int((best >= at).sum()) for at in above]
    return max((at for at, count in zip(above, counts, strict=True) if 0 < count >= 0.9 * counts[0]), default=None)


def in_all_seeds(cells: pl.DataFrame, points: pl.DataFrame) -> pl.DataFrame:
    """The rows of `at_accuracy` that all seeds of `points` got to."""
    return cells.filter(pl.col("n_seeds") == points["seed"].n_unique())


def difference(first: pl.DataFrame, second: pl.DataFrame, column: str) -> Estimate | None:
    """`first` minus `second`, each with a row per seed, over the seeds that both have; None where they share none.

    Seeds are paired, since methods start from the same base: what a base is worth cancels. A seed without a finite
    value on both sides is none that both have.
    """
    both = first.select("seed", column).join(second.select("seed", other=column), on="seed").sort("seed")
    pairs = _finite(both, [column, "other"])
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


def estimate_of(row: Mapping[str, Any], column: str) -> Estimate | None:
    """A mean and its interval out of a row of `at_accuracy`; None where no seed got there."""
    return Estimate.of_interval(row[column], row[f"{column}_high"], row["n_seeds"])


@dataclass(frozen=True)
class Correlation:
    """Between two columns, over `points` checkpoints; intervals are None for fewer than 5 groups."""

    pearson: float
    pearson_interval: tuple[float, float] | None
    spearman: float
    spearman_interval: tuple[float, float] | None
    points: int


def correlation(
    table: pl.DataFrame, x: str, y: str, by: str = "trajectory", *, samples: int = 200, seed: int = 0
) -> Correlation | None:
    """Pearson's and Spearman's correlation of two columns, with 95 % bootstrap intervals drawing whole groups of `by`.

    None for fewer than 3 finite pairs, or where one of the two does not vary. `samples` and `seed` are the bootstrap's.
    """
    pairs = _finite(table, [x, y]).select(x=pl.col(x).cast(pl.Float64), y=pl.col(y).cast(pl.Float64), group=by)
    try:
        pearson, spearman = _pearson(pairs), _spearman(pairs)
    except RazorError:
        return None
    return Correlation(
        pearson,
        law.bootstrap(_pearson, pairs, "group", samples=samples, seed=seed),
        spearman,
        law.bootstrap(_spearman, pairs, "group", samples=samples, seed=seed),
        len(pairs),
    )


def _over_seeds(
    points: pl.DataFrame, per_seed: pl.DataFrame, by: Sequence[str], columns: Sequence[str]
) -> pl.DataFrame:
    """A row per group of `points`: the means over the rows of `per_seed`, which has one per group and seed."""
    rows = []
    for key, group in points.group_by(by, maintain_order=True):
        same = [pl.col(name).eq_missing(pl.lit(value)) for name, value in zip(by, key, strict=True)]
        seeds = per_seed.filter(same).sort("seed")
        row = dict(zip(by, key, strict=True))
        for column in columns:
            low, high = frontier.t_interval(floats(seeds, column).tolist())
            row |= {column: seeds[column].mean(), f"{column}_low": low, f"{column}_high": high}
        rows.append({**row, "n_seeds": len(seeds), "seeds_total": group["seed"].n_unique()})
    numbers = [name for column in columns for name in (column, f"{column}_low", f"{column}_high")]
    schema = {
        **{name: points.schema[name] for name in by},
        **dict.fromkeys(numbers, pl.Float64()),
        **dict.fromkeys(("n_seeds", "seeds_total"), pl.Int64()),
    }
    return pl.DataFrame(rows, schema=schema)


def _finite(points: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The rows with a finite number in each of `columns`; null is none."""
    return points.filter([pl.col(name).cast(pl.Float64).is_finite() for name in dict.fromkeys(columns)])


def _pearson(pairs: pl.DataFrame) -> float:
    return float(np.corrcoef(*_varied(pairs))[0, 1])


def _spearman(pairs: pl.DataFrame) -> float:
    return float(stats.spearmanr(*_varied(pairs)).statistic)


def _varied(pairs: pl.DataFrame) -> tuple[Floats, Floats]:
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise RazorError("A correlation needs at least 3 points that differ in both.")
    return x, y
