"""Runs that imitate the best policies of a sweep: who teaches is chosen here, for every experiment and study."""

from collections.abc import Callable, Mapping, Sequence

from rlrazor.runs.experiment import Phase
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import RunStore

MakeStudents = Callable[[float, Mapping[int, Ancestor]], Sequence[RunSpec]]
"""(level, seed -> teacher) -> the runs that imitate these teachers."""


def choose(specs: Sequence[RunSpec], store: RunStore, method: str, accuracy: float) -> dict[int, Ancestor]:
    """Per seed the best policy that `method` trained among these runs.

    The best: of the checkpoints with a new-task score of at least `accuracy`, the one with the highest prior score; if
    none gets there, the one with the highest new-task score. Ties go to the first in the grid.
    """
    teachers = {}
    for seed in dict.fromkeys(spec.seed for spec in specs):
        runs = [store.read(spec) for spec in specs if spec.method == method and spec.seed == seed]
        candidates = [(run.spec, record) for run in runs for record in run.records]
        good = [(spec, record) for spec, record in candidates if record.new >= accuracy]
        if good:
            spec, record = max(good, key=lambda candidate: candidate[1].prior_mean)
        else:
            spec, record = max(candidates, key=lambda candidate: candidate[1].new)
        teachers[seed] = Ancestor(spec, record.step)
    return teachers


def unknown(specs: Sequence[RunSpec], method: str, level: float) -> dict[int, Ancestor]:
    """Stand-ins for teachers that are not trained yet, by seed: enough to count their students."""
    experiment = specs[0].experiment
    return {spec.seed: Ancestor(RunSpec(experiment, method, {"new": level}, spec.seed), 0) for spec in specs}


def students(
    specs: Sequence[RunSpec],
    store: RunStore | None,
    method: str,
    levels: Sequence[float],
    make: MakeStudents,
    table: str = "records",
) -> Phase:
    """The runs that imitate the best of these runs, by `method`: teachers of their own for each level.

    A student judged at another accuracy than its teacher's says nothing of imitation. Two levels may have one teacher,
    and then the same students; without a store, each has its own.
    """
    found: dict[RunSpec, None] = {}
    teachings = []
    for level in levels:
        teachers = unknown(specs, method, level) if store is None else choose(specs, store, method, level)
        own = make(level, teachers)
        found |= dict.fromkeys(own)
        teachings += [
            {
                "level": level,
                "seed": teacher.spec.seed,
                "method": teacher.spec.method,
                "step": teacher.step,
                "run_id": teacher.spec.run_id,
                "student": name,
            }
            for teacher in teachers.values()
            for name in dict.fromkeys(spec.method for spec in own)
        ]
    return Phase("students", list(found), table=table, teachings=teachings)
