"""What a drop on a prior task is made of: a format that changed, what comes back with a few steps, and what is lost.

Every item is scored in the base (b) and in the tuned model (t), by the task's strict parser (s) and, where its answers
are generated, by one that forgives the template (r, never less than s). Both models are then trained alike, for a few
steps on other prior items, and scored again (b', t'). As means over the items:

    drop        = b_s - t_s
    format      = (t_r - t_s) - (b_r - b_s)     right but for the template, beyond the base's own such items
    taught      = b'_r - b_r                    what those steps teach a model that has forgotten nothing
    recoverable = (t'_r - t_r) - max(taught, 0) what came back, less what they would have taught the base too
    lost        = max(b_r, b'_r) - t'_r         what is still missing

so that drop = format + recoverable + lost. Where the steps cost the base something (taught < 0) nothing is taken off:
else damage to the control would count as recovery of the tuned model. That choice, made by the estimate, takes off a
little too much where taught is 0 but for noise: recoverable is rather too small than too large.

Without answers that are generated format is not known, and what it is goes into the other two.

Intervals are paired (`paired`); `recoverable`, a difference of two differences on the same items, lies between -2 and
2, so it is measured in half units. In a group whose items may be lost together they are as wide as a bootstrap of
clusters makes them (`lost`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlrazor.analysis import paired
from rlrazor.analysis.law import Floats
from rlrazor.analysis.lost import clusters_of, widened
from rlrazor.analysis.paired import Difference, Interval

FORMAT, RECOVERABLE, LOST = "format", "recoverable", "lost"
REST = "not format"  # where nothing was recovered: the two others together
NO_DROP, UNTOLD = "no drop", "cannot be told"


@dataclass(frozen=True)
class PartOfDrop:
    """A difference of means over items, a fraction of 1, and its ends."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class DropParts:
    """A drop on `n` items and its parts, with intervals of `level`; None for what was not measured.

    `rest`: the drop by the forgiving parser, what is recoverable and lost together. `taught`: of the base, by the
    recovery's steps.
    """

    n: int
    level: float
    drop: PartOfDrop
    format: PartOfDrop | None
    rest: PartOfDrop
    recoverable: PartOfDrop | None = None
    lost: PartOfDrop | None = None
    taught: PartOfDrop | None = None

    @property
    def mainly(self) -> str:
        """The largest part, if it is more than 0 with all of its interval, of a drop that is."""
        if self.drop.interval[0] <= 0:
            return NO_DROP
        last = {REST: self.rest} if self.lost is None else {RECOVERABLE: self.recoverable, LOST: self.lost}
        parts = {name: part for name, part in {FORMAT: self.format, **last}.items() if part is not None}
        name, largest = max(parts.items(), key=lambda one: one[1].value)
        return name if largest.interval[0] > 0 else UNTOLD


@dataclass(frozen=True)
class Outcomes:
    """Of the same N items in one model, between 0 and 1, 1 for right: by the strict parser, and by the forgiving one.

    `robust` None: there is none. `after`: by that one, or else the strict one, once the model was trained; None for
    not.
    """

    strict: ArrayLike
    robust: ArrayLike | None = None
    after: ArrayLike | None = None


def drop_parts(
    base: Outcomes,
    tuned: Outcomes,
    level: float,
    *,
    groups_N: Sequence[Hashable] | None = None,
    clusters_N: Sequence[Hashable] | None = None,
) -> DropParts:
    """`groups_N`: groups each of which counts the same, as an unweighted mean over tasks; else each item does.

    `clusters_N`: which items may be lost together; not looked at where there are groups.
    """
    scored = _Scored(level, groups_N, clusters_N)
    before, after = np.asarray(base.strict, float), np.asarray(tuned.strict, float)
    drop, form = scored.part(before, after), None
    if base.robust is not None and tuned.robust is not None:
        forgiven = np.asarray(base.robust, float), np.asarray(tuned.robust, float)
        form = scored.part(forgiven[1] - after, forgiven[0] - before)
        before, after = forgiven
    rest = scored.part(before, after)
    if base.after is None or tuned.after is None:
        return DropParts(len(before), level, drop, form, rest)
    control, recovered = np.asarray(base.after, float), np.asarray(tuned.after, float)
    taught = scored.part(control, before)
    if taught.value > 0:
        back = scored.part((recovered + before) / 2, (after + control) / 2, times=2)
        lost = scored.part(control, recovered)
    else:
        back, lost = scored.part(recovered, after), scored.part(before, recovered)
    return DropParts(len(before), level, drop, form, rest, back, lost, taught)


@dataclass(frozen=True)
class _Scored:
    """How differences of items are put together."""

    level: float
    groups: Sequence[Hashable] | None
    clusters: Sequence[Hashable] | None

    def part(self, first_N: Floats, second_N: Floats, times: float = 1.0) -> PartOfDrop:
        """`times` the mean of first less second."""
        difference = self._difference(first_N, second_N)
        clusters = None if self.clusters is None or self.groups is not None else clusters_of(self.clusters)
        low, high = widened(difference.interval(self.level), first_N - second_N, clusters, self.level)
        return PartOfDrop(times * difference.mean, (times * low, times * high))

    def _difference(self, first_N: Floats, second_N: Floats) -> Difference:
        if self.groups is None:
            return paired.paired(first_N, second_N, bounded=True)
        places: dict[Hashable, list[int]] = {}
        for at, group in enumerate(self.groups):
            places.setdefault(group, []).append(at)
        return paired.Mean([paired.paired(first_N[own], second_N[own], bounded=True) for own in places.values()])
