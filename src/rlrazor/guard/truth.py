"""The truth beside a forecast: prior tasks scored in both models, on the same items, and the error of what differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlrazor.analysis import paired
from rlrazor.analysis.drop_parts import DropParts
from rlrazor.analysis.paired import Difference
from rlrazor.guard.lost_items import ItemChanges, item_changes
from rlrazor.guard.recover import Recovered
from rlrazor.guard.verdict import known
from rlrazor.lm.noise_floor import NoiseFloor
from rlrazor.lm.scores import Score


@dataclass(frozen=True)
class TaskChange:
    """A prior task's score in both models: fractions of 1 where `fraction`, else in the metric's own unit.

    `difference` is how much worse the tuned model is; `paired`: item by item, or else as if the two had been scored on
    different items. `level` is that of the interval.
    """

    base: float
    tuned: float
    metric: str
    higher_is_better: bool
    fraction: bool
    difference: Difference
    paired: bool
    level: float

    @property
    def drop(self) -> float:
        """How much worse the tuned model is, whichever direction is better."""
        return self.base - self.tuned if self.higher_is_better else self.tuned - self.base

    @property
    def n(self) -> int:
        """Items."""
        return self.difference.n

    @property
    def stderr(self) -> float | None:
        """Of the difference; None where it is not known."""
        return known(self.difference.stderr)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the difference; None where its error is not known."""
        return _interval(self.difference, self.level)


@dataclass(frozen=True)
class Truth:
    """Measured prior scores of both. `limit`: items of each task at most, as was asked for.

    `items`: what was lost and gained item by item, of the tasks whose items are right or wrong. `floor`: how far the
    base's scores are from themselves, where that was measured. `parts`: what each drop is made of, as far as that was
    told apart; `recovered`: how copies of both were trained for it.
    """

    tasks: Mapping[str, TaskChange]
    level: float
    limit: int | None = None
    items: Mapping[str, ItemChanges] = field(default_factory=dict)
    floor: NoiseFloor | None = None
    parts: Mapping[str, DropParts] = field(default_factory=dict)
    recovered: Recovered | None = None

    @property
    def mean_floor(self) -> float | None:
        """The largest that the mean drop of the base against itself was; None where that was not measured."""
        return (
            None if self.floor is None else self.floor.of_mean([n for n, task in self.tasks.items() if task.fraction])
        )

    @property
    def difference(self) -> Difference | None:
        """The mean over the tasks whose scores are fractions of 1; None where none is."""
        parts = [task.difference for task in self.tasks.values() if task.fraction]
        return paired.Mean(parts) if parts else None

    @property
    def drop(self) -> float | None:
        """The mean drop of the scores that are fractions of 1."""
        return None if self.difference is None else self.difference.mean

    @property
    def stderr(self) -> float | None:
        """Its standard error; None where one of them has none: unknown is not 0."""
        return None if self.difference is None else known(self.difference.stderr)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its interval, of `level`; None where it has no standard error."""
        return None if self.difference is None else _interval(self.difference, self.level)

    @property
    def notes(self) -> list[str]:
        """What a reader of the mean drop has to know, in sentences."""
        said = [] if self.floor is None else [self.floor.describe()]
        if apart := [f"{name} ({task.metric})" for name, task in self.tasks.items() if not task.fraction]:
            said.append(
                f"Scores that are not fractions of 1 are shown in their own unit and left out of the mean drop: "
                f"{', '.join(apart)}."
            )
        if unpaired := [name for name, task in self.tasks.items() if not task.paired and task.stderr is not None]:
            said.append(
                f"The error of {', '.join(unpaired)} is not paired, as if the two models had been scored on different "
                "items: the score is of the whole set of items, or theirs are not known."
            )
        unknown = [name for name, task in self.tasks.items() if task.fraction and task.interval is None]
        if unknown and self.drop is not None:
            said.append(
                f"The mean drop has no standard error: lm-eval gives none for {', '.join(unknown)}. How much of it is "
                "chance is not known."
            )
        return said


def truth_of(base: Mapping[str, Score], tuned: Mapping[str, Score], level: float, limit: int | None) -> Truth:
    """The change of each task; both have the same tasks."""
    tasks = {name: _change(before, tuned[name], level) for name, before in base.items()}
    changes = {name: item_changes(base[name], tuned[name], level) for name, task in tasks.items() if task.paired}
    return Truth(tasks, level, limit, {name: one for name, one in changes.items() if one is not None})


def _change(base: Score, tuned: Score, level: float) -> TaskChange:
    fraction = base.is_fraction and tuned.is_fraction
    difference = _paired(base, tuned, bounded=fraction)
    is_paired = difference is not None
    if difference is None:
        drop = (base.value - tuned.value) * (1 if base.higher_is_better else -1)
        errors = [math.nan if score.stderr is None else score.stderr for score in (base, tuned)]
        difference = paired.Independent(drop, math.hypot(*errors), min(base.n, tuned.n), fraction)
    metric, better = base.metric, base.higher_is_better
    return TaskChange(base.value, tuned.value, metric, better, fraction, difference, is_paired, level)


def _paired(base: Score, tuned: Score, *, bounded: bool) -> Difference | None:
    """Item by item; None where the items' outcomes are not known in both, or are not of the same items."""
    names = base.items.names()
    if not names or set(tuned.items.names()) != set(names):
        return None
    first, second = (base, tuned) if base.higher_is_better else (tuned, base)

    def outcomes(score: Score, group: Iterable[tuple[str, str]]) -> list[float]:
        return [score.items.outcomes[task][item] for task, item in group]

    by_task = [[(task, item) for item in items] for task, items in base.items.outcomes.items()]
    groups = [names] if base.items.by_size else by_task  # of items that count alike
    found = [paired.paired(outcomes(first, group), outcomes(second, group), bounded=bounded) for group in groups]
    return found[0] if len(found) == 1 else paired.Mean(found)


def _interval(difference: Difference, level: float) -> tuple[float, float] | None:
    low, high = difference.interval(level)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
