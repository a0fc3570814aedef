"""Sentences that sections still share; what the numbers are is in `rlrazor.analysis.statistics`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from rlrazor.analysis.statistics import at_accuracy, correlation, estimate_of
from rlrazor.report.tables import Table
from rlrazor.report.text import NEVER, cell, how_many, nats, number, written


def kept_table(
    points: pl.DataFrame,
    by: Sequence[str],
    names: Mapping[tuple[Any, ...], str],
    levels: Iterable[float],
    kl_unit: str = "nats",
) -> Table:
    """The prior accuracy that each group's best checkpoints keep at each level of new accuracy, and their forward KL.

    `names`: a group's values of `by` -> its name; a row each.
    """
    levels = sorted(set(levels))
    rows = {group: [name] for group, name in names.items()}
    for level in levels:
        cells = at_accuracy(points, by, level, ["prior", "kl_forward"])
        found = dict(zip(cells.select(by).iter_rows(), cells.to_dicts(), strict=True))
        for group, row in rows.items():
            kept = found.get(group)
            if kept is None or kept["n_seeds"] == 0:
                row.append(NEVER)
            else:
                row.append(f"{written(estimate_of(kept, 'prior'))} / {cell(kept, 'kl_forward', nats)}")
    headers = ["arm", *(f"new ≥ {level:.0%}" for level in levels)]
    return Table(f"Best prior accuracy, %, and its forward KL, {kl_unit}", headers, list(rows.values()))


def follows_kl(arms: pl.DataFrame, threshold: float, noun: str) -> str:
    """A sentence for a note: whether what is kept follows the KL, over `arms`, a row of `at_accuracy` for each `noun`.

    Empty where too few get there.
    """
    reached = arms.drop_nulls("kl_forward")
    rank = correlation(reached, "kl_forward", "prior", by="method", samples=0)
    if rank is None:
        return ""
    return (
        f" Over the {len(reached)} {noun}s that get to {threshold:.0%}, prior accuracy and forward KL have a rank "
        f"correlation of {number(rank.spearman).replace('-', '−')}."
    )


def over_seeds(count: int) -> str:
    """What a finding says of its seeds: "3 seeds", "1 seed, which leaves it open"."""
    return how_many(count, "seed") + ("" if count > 1 else ", which leaves it open")
