"""What the runs of a method lost and gained, item by item, and which items were lost most surely over methods.

Tables have a row per run and item: `run`, its id; `prior`, `task` and `item`, which name the item, and its `category`,
null without one; `base` and `tuned`, the two outcomes; `choices`, `right`, `base_logprobs` and `tuned_logprobs`, as
`rlrazor.runs.items` tells of them, null where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, mode
from typing import Any

import polars as pl

from rlrazor.analysis.lost import SHOWN, Likelihoods, Transitions, fall, guessed_among, over_tasks, transitions

UNKNOWN = "the outcomes of some of its items are not known"
OTHERS = "its items are not the same in all runs"
NOT_RIGHT_OR_WRONG = "its items are not all right or wrong"
_NAME = ("task", "item")
_LOGPROBS = ("base_logprobs", "tuned_logprobs")


@dataclass(frozen=True)
class RunsChanges:
    """What some runs lost and gained, together, on each prior task; `whole`, the mean over these, None for none.

    `categories`: by prior task, of those with several. `left_out`: prior task -> why it is not counted.
    """

    whole: Transitions | None
    tasks: Mapping[str, Transitions]
    categories: Mapping[str, Mapping[str, Transitions]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def changes_of(items: pl.DataFrame, level: float) -> RunsChanges:
    """Of all runs of a table, each of which counts the same; intervals of `level`, see `lost`."""
    tasks: dict[str, Transitions] = {}
    categories: dict[str, dict[str, Transitions]] = {}
    left_out: dict[str, str] = {}
    runs = items["run"].n_unique()
    for (name,), own in items.group_by("prior", maintain_order=True):
        prior = str(name)
        if (why := _not_to_count(own, runs)) is not None:
            left_out[prior] = why
            continue
        if (found := _transitions(own, level)) is None:
            left_out[prior] = NOT_RIGHT_OR_WRONG
            continue
        tasks[prior] = found
        parts = own.with_columns(part=pl.coalesce("category", "task")).group_by("part", maintain_order=True)
        of = {str(part): _transitions(rows, level, several=own["task"].n_unique() > 1) for (part,), rows in parts}
        if len(of) > 1:
            categories[prior] = {part: one for part, one in of.items() if one is not None}
    return RunsChanges(over_tasks([*tasks.values()]) if tasks else None, tasks, categories, left_out)


def _not_to_count(items: pl.DataFrame, runs: int) -> str | None:
    """Why a prior task's items cannot be counted; None if they can."""
    if items["run"].n_unique() < runs or items["base"].null_count() or items["tuned"].null_count():
        return UNKNOWN
    first, *others = (one.select(_NAME).sort(_NAME) for one in items.partition_by("run"))
    return None if all(one.equals(first) for one in others) else OTHERS


def _transitions(items: pl.DataFrame, level: float, *, several: bool | None = None) -> Transitions | None:
    """Of the same items in each run. `several`: their prior task has several tasks, each of which may be lost together.

    By default whether these items are of several.
    """
    runs = items.sort(_NAME).partition_by("run")
    tasks = runs[0]["task"]
    clustered = tasks.n_unique() > 1 if several is None else several
    return transitions(
        [one["base"].to_numpy() for one in runs],
        [one["tuned"].to_numpy() for one in runs],
        level,
        choices_N=[guessed_among(*of) for of in runs[0].select("choices", "right").rows()],
        clusters_N=tasks.to_list() if clustered else None,
    )


@dataclass(frozen=True)
class LostInRuns:
    """An item that was right in the base and is wrong now in some runs.

    `runs`: method -> in how many of its runs, of those that know it. `fall`: how far the right answer fell behind the
    best wrong one, in nats as the task's metric compares them, the mean over the runs that lost it; None without
    answers to choose among. `right`: the place of a right answer among these, `said`: of the one that most of those
    runs took instead.
    """

    prior: str
    task: str
    item: str
    runs: Mapping[str, tuple[int, int]]
    fall: float | None = None
    right: int | None = None
    said: int | None = None

    @property
    def share(self) -> float:
        """Of the runs that lost it: a mean over methods, each of which counts the same."""
        return fmean(lost / of for lost, of in self.runs.values())


def surest_in_runs(methods: Mapping[str, pl.DataFrame], count: int = SHOWN) -> list[LostInRuns]:
    """Of the items of all methods' tables those that were lost most surely, at most `count`.

    First what the largest share of runs lost; then what fell furthest, task by task in turn, as falls of two tasks may
    be in different units.
    """
    asked = {
        (method, prior): own["run"].n_unique()
        for method, items in methods.items()
        for (prior,), own in items.group_by("prior")
    }
    lost = [
        items.filter(pl.col("base") > pl.col("tuned")).with_columns(method=pl.lit(method))
        for method, items in methods.items()
    ]
    if not lost:
        return []
    found = [
        _lost(own.rows(named=True), {method: of for (method, prior), of in asked.items() if prior == own["prior"][0]})
        for own in pl.concat(lost).partition_by("prior", *_NAME, maintain_order=True)
    ]
    found.sort(key=lambda one: (-round(one.share, 9), one.fall is None, -(one.fall or 0.0)))
    before: dict[tuple[float, str], int] = {}
    ranks = []
    for one in found:
        place = round(one.share, 9), one.prior
        before[place] = before.get(place, -1) + 1
        ranks.append((-place[0], before[place]))
    ranked = sorted(zip(ranks, found, strict=True), key=lambda pair: pair[0])
    return [one for _, one in ranked[:count]]


def _lost(rows: Sequence[Mapping[str, Any]], asked: Mapping[str, int]) -> LostInRuns:
    """An item, of the runs that lost it; `asked`: method -> how many of its runs know its prior task."""
    first = rows[0]
    counts = {method: (sum(row["method"] == method for row in rows), of) for method, of in asked.items()}
    pairs = [tuple(Likelihoods(row[name] or (), row["right"] or ()) for name in _LOGPROBS) for row in rows]
    falls = [one for base, tuned in pairs if (one := fall(base, tuned)) is not None]
    said = [place for _, tuned in pairs if (place := tuned.likeliest) is not None]
    return LostInRuns(
        *(first["prior"], first["task"], first["item"]),
        runs=counts,
        fall=fmean(falls) if falls else None,
        right=first["right"][0] if first["right"] else None,
        said=mode(said) if said else None,
    )
