"""Methods at matched new-task score, each at a learning rate that was not chosen on what is reported: the one rule.

1. A run is stopped at its first checkpoint whose new-task score is at least `at`. What it keeps there is not looked at.
2. Of the runs of a seed that get there, the one is reported whose setting, the learning rate and what else was tried
   (`TUNED`), got there in the largest number of the *other* seeds and, of these, forgot least there on average. Where
   several are equal, or no other seed tells, it is the lowest learning rate.
3. What is reported is one number a seed; means, intervals and verdicts are over these.

So no seed's score has a part in its own choice: the least of many noisy numbers would flatter who was tried most often.
The price is that a choice is made on one seed less than there are, and that the seeds' choices share seeds, so that
their interval is a guide. With a single seed the run is chosen on the score that is reported, and that is optimistic.

Who was tried more often still has more to choose from: a fair comparison gives each the same `budgets`.

Tables have a row per checkpoint, with `seed`, `new` and `prior`, fractions of 1, and `trajectory`, the run. `by` are
the columns whose values make a group, one thing that is compared, such as a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from rlrazor.analysis.law import finite

RATE = "lr"
SCORES = ("new", "prior")
TUNED = (RATE, "method", "schedule", "epochs", "batch_size", "iterations")
"""What a setting consists of, as far as the table has it and does not group by it."""

_ROW, _NTH, _OTHERS, _THERE = (f"matched: {name}" for name in ("row", "nth", "others", "forgotten there"))
_PLACE = "matched or last: row"


def matched(points: pl.DataFrame, by: Sequence[str], at: float | pl.Expr, also: Sequence[str] = ()) -> pl.DataFrame:
    """Per group and seed the checkpoint that the rule reports, a whole row; none for a seed that does not get there.

    `at`: the new-task score, or an expression of the columns. `also`: further columns that are chosen with the learning
    rate. Forgetting is the column of that name, or what the prior score lacks; rows without finite scores do not count.
    """
    setting = _settings(points, by, also)
    numbered = _numbered(points, by, setting)
    there = _first(numbered.filter(pl.col("new") >= at), [*by, "seed", *_run(points, setting)])
    forgotten = pl.col("forgetting") if "forgetting" in points.columns else -pl.col("prior")
    alike = [*by, *setting, _NTH]
    others, alone = pl.len().over(alike) - 1, points["seed"].n_unique() == 1
    elsewhere = (forgotten.sum().over(alike) - forgotten) / others
    ranked = there.with_columns(
        others.cast(pl.Int64).alias(_OTHERS),
        # Rounded, since sums in another order differ in their last digits, and equals should be.
        (forgotten if alone else pl.when(others > 0).then(elsewhere)).round(12).alias(_THERE),
    ).sort(
        [_OTHERS, _THERE, *setting, _NTH],
        descending=[True, *[False] * (len(setting) + 2)],
        nulls_last=True,
        maintain_order=True,
    )
    return _first(ranked, [*by, "seed"]).sort(_ROW).drop(_ROW, _NTH, _OTHERS, _THERE)


def matched_or_last(points: pl.DataFrame, by: Sequence[str], at: float | None) -> pl.DataFrame:
    """The same, and of a group that gets there in no seed the last checkpoints; `reached` tells which are which.

    Of a seed's runs then the one that ends with the highest new-task score, whatever it forgot. `at` None: of all
    groups the last.
    """
    scored = finite(points, SCORES).with_row_index(_PLACE)
    there = scored.clear() if at is None else matched(scored, by, at)
    missed = scored.join(there, on=list(by), how="anti", nulls_equal=True).sort("step", maintain_order=True)
    runs = [*by, "seed", *_run(missed, _settings(missed, by, ()))]
    ends = missed.unique(runs, keep="last", maintain_order=True).sort(["new", _PLACE], descending=[True, False])
    last = _first(ends, [*by, "seed"])
    parts = [there.with_columns(reached=pl.lit(value=True)), last.with_columns(reached=pl.lit(value=False))]
    return pl.concat(parts).sort(_PLACE).drop(_PLACE)


def budgets(points: pl.DataFrame, by: Sequence[str], also: Sequence[str] = ()) -> pl.DataFrame:
    """What each group was chosen from: a row per group, in order of first appearance.

    `rates`, its learning rates; `fewest` and `most`, its runs in a seed, of the seeds of the whole table. Where one run
    is the beginning of another the two are one.
    """
    numbered = _numbered(points, by, setting := _settings(points, by, also))
    seeds = points["seed"].n_unique()
    runs = numbered.sort(_ROW).unique([*by, "seed", *_run(points, setting)], keep="first", maintain_order=True)
    rates = pl.col(RATE).n_unique() if RATE in points.columns else pl.lit(1, pl.UInt32)
    counts = runs.group_by([*by, "seed"], maintain_order=True).agg(pl.len())
    spread = counts.group_by(by, maintain_order=True).agg(
        fewest=pl.when(pl.len() < seeds).then(0).otherwise(pl.col("len").min()), most=pl.col("len").max()
    )
    of_rates = runs.group_by(by, maintain_order=True).agg(rates=rates)
    return pl.concat([of_rates, spread.drop(by)], how="horizontal")


def by_rate(points: pl.DataFrame, by: Sequence[str], at: float) -> pl.DataFrame:
    """The curve over learning rates: per group, learning rate and seed how far it gets, and what that costs.

    A row per group, learning rate and seed that was run, ascending: `new`, the highest new-task score, and `forgetting`
    of the run that the rule reports where one learning rate alone is to choose from; null where none gets to `at`.
    """
    keys = [*by, RATE, "seed"]
    scored = finite(points, SCORES)
    reached = scored.group_by(keys, maintain_order=True).agg(pl.max("new"))
    cost = {tuple(row[:-1]): row[-1] for row in matched(scored, [*by, RATE], at).select(*keys, "forgetting").rows()}
    forgotten = pl.Series([cost.get(key) for key in reached.select(keys).rows()], dtype=pl.Float64)
    return reached.with_columns(forgetting=forgotten).sort(RATE, "seed", maintain_order=True)


def rows_of(table: pl.DataFrame, by: Sequence[str], group: Sequence[Any]) -> pl.DataFrame:
    """The rows of a group, by its values in the columns `by`."""
    return table.filter(pl.col(name).eq_missing(pl.lit(value)) for name, value in zip(by, group, strict=True))


def _settings(points: pl.DataFrame, by: Sequence[str], also: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys((*TUNED, *also)) if name in points.columns and name not in by]


def _run(points: pl.DataFrame, setting: Sequence[str]) -> Sequence[str]:
    """The columns that tell a seed's runs apart."""
    return ["trajectory"] if "trajectory" in points.columns else setting


def _numbered(points: pl.DataFrame, by: Sequence[str], setting: Sequence[str]) -> pl.DataFrame:
    """The rows with scores, in the order of their steps, with their run's setting.

    A run at a constant learning rate has no length, as each is the beginning of a longer one. Of runs of a seed whose
    settings are the same, such as students of several teachers, the first is alike to the first of another seed.
    """
    rows = finite(points, SCORES).with_row_index(_ROW)
    if {"schedule", "epochs"} <= set(setting):
        rows = rows.with_columns(epochs=pl.when(pl.col("schedule").ne_missing("constant")).then("epochs"))
    run, first = [*by, "seed", *_run(points, setting)], pl.col(_ROW).min()
    rows = rows.with_columns(pl.col(name).first().over(run) for name in setting)
    rows = rows.with_columns(first.over(run).rank("dense").over([*by, "seed", *setting]).alias(_NTH))
    return rows.sort("step", maintain_order=True) if "step" in points.columns else rows


def _first(rows: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    return rows.unique(list(by), keep="first", maintain_order=True)
