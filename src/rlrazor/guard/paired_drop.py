"""The drop of a sweep's checkpoint by its items, each beside what the base made of it, as `runs.items` keeps them."""

import math
from collections.abc import Callable, Mapping, Sequence

import polars as pl

from rlrazor.analysis import paired
from rlrazor.analysis.paired import Difference

Outcomes = Callable[[str], pl.DataFrame | None]
"""By the id of a run what became of each item of the prior tasks, of the columns `items.SCHEMA`, where it is known."""


def prior_names(columns: Sequence[str]) -> list[str]:
    """The prior tasks that a table with these columns has scores of."""
    named = [name for name in columns if name.startswith("prior_") and not name.endswith("_stderr")]
    return [name.removeprefix("prior_") for name in named if name != "prior_loss"]


def paired_drop(items: pl.DataFrame | None, step: int, drops: Mapping[str, float]) -> paired.Mean | None:
    """The mean over prior tasks of the drop at a step, with its paired error. `drops`: of each task, a fraction of 1.

    None where there is no task, or the outcomes of one's items are not all known or do not make up its drop.
    """
    if items is None or not drops:
        return None
    parts = []
    for name, drop in drops.items():
        own = items.filter(pl.col("prior") == name, pl.col("step") == step)
        if (difference := _difference(own, drop)) is None:
            return None
        parts.append(difference)
    return paired.Mean(parts)


def _difference(items: pl.DataFrame, drop: float) -> Difference | None:
    """Of a prior task's items, or its tasks, as it weighs them: what comes to its `drop`; None where neither does."""
    if items.is_empty() or items["base"].null_count() or items["tuned"].null_count():
        return None
    groups = [[items], items.partition_by("task", maintain_order=True)]
    for parts in groups:
        found = paired.Mean([paired.paired(one["base"], one["tuned"], bounded=True) for one in parts])
        if math.isclose(found.mean, drop, abs_tol=1e-6):
            return found
    return None
