"""A command a run: what a sweep takes, wave after wave, with a number each, for the queue of a cluster.

    planned phases --waves--> runs that need nothing of one another, after those that they start or learn from
                   --lines--> each of them has a number, which the same command finds again: `--line 17`

The numbers are those of the plan, before any run is trained, when nobody knows who will teach. Each stands for a place,
such as the third student, which the process that trains it looks up when the runs before are there. Two students of a
plan may then turn out to be one: the second line has nothing to do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlrazor.errors import RazorError
from rlrazor.runs.experiment import Phase
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.store import WeightsMode
from rlrazor.runs.sweep import Trajectory, trajectories

Wave = list[Trajectory]


@dataclass(frozen=True)
class Line:
    """A run of a plan: of which phase, of which wave before its last one, at which place, and what it is called."""

    number: int
    phase: int
    back: int
    place: int
    title: str
    what: str


class Waves:
    """Phase by phase the runs that can be trained at the same time; it knows those that it has listed.

    `weights`: what the user keeps of all runs.
    """

    def __init__(self, weights: WeightsMode = "none") -> None:
        self.weights = weights
        self.listed: set[tuple[str, int] | str] = set()  # a run with the weights of a step, or with all that is needed

    def of(self, phase: Phase) -> list[Wave]:
        """What the phase's runs start or learn from, unless it was listed before, and then these."""
        found = [*self._before(phase.specs), trajectories(phase.specs)]
        whole = phase.keep != "none" or self.weights == "all"
        self.listed.update(spec.run_id for spec in phase.specs if whole or spec.method == BASE)
        return [wave for wave in found if wave]

    def _before(self, specs: Sequence[RunSpec]) -> list[Wave]:
        needed = [of for of in ancestors(specs) if not self._is_listed(of)]
        if not needed:
            return []
        deeper = self._before([of.spec for of in needed])
        own = [of for of in needed if not self._is_listed(of)]
        self.listed.update((of.spec.run_id, of.step) for of in own)
        self.listed.update(of.spec.run_id for of in own if of.spec.method == BASE)
        return [*deeper, trajectories(list(dict.fromkeys(of.spec for of in own)))]

    def _is_listed(self, of: Ancestor) -> bool:
        return of.spec.run_id in self.listed or (of.spec.run_id, of.step) in self.listed


def ancestors(specs: Iterable[RunSpec]) -> list[Ancestor]:
    """What these runs start from and whom they imitate, each once."""
    found = (of for spec in specs for of in (spec.starts_from, spec.teacher) if of is not None)
    return list(dict.fromkeys(found))


def lines(phases: Sequence[Phase], weights: WeightsMode = "none") -> list[list[Line]]:
    """The lines of a plan, wave by wave, numbered from 1."""
    waves, found, number = Waves(weights), list[list[Line]](), 0
    for at, phase in enumerate(phases):
        own = waves.of(phase)
        for back, wave in reversed(list(enumerate(reversed(own)))):
            title = phase.title if back == 0 else f"weights for {phase.title}"
            found.append(
                [
                    Line(number + place, at, back, place - 1, title, _called(trajectory))
                    for place, trajectory in enumerate(wave, 1)
                ]
            )
            number += len(wave)
    return found


def find(phases: Sequence[Phase], number: int, weights: WeightsMode = "none") -> Line:
    """The line of a number; raises RazorError where the plan has fewer."""
    all_lines = [line for wave in lines(phases, weights) for line in wave]
    if not 1 <= number <= len(all_lines):
        raise RazorError(f"There are {len(all_lines)} lines, and --line {number} is none: --print-commands lists them.")
    return all_lines[number - 1]


def _called(trajectory: Trajectory) -> str:
    """As people name it; a teacher that is not known yet has no settings to name it by."""
    spec = trajectory.longest
    known = spec.method == BASE or "lr" in spec.params
    return spec.describe() if known else f"the best of {spec.method}, seed {spec.seed}"
