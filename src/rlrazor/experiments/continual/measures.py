"""The columns that every record of a sequence has: scores on each task, and KL by inputs and by origin, in nats."""

from collections.abc import Mapping
from statistics import fmean

from rlrazor.runs.records import BASE, Record, RunSpec

SINCE_BEFORE = "_since_before"  # the end of columns of drift from the stage before; the others are from the base
ON_PRIOR, ON_EARLIER = "_on_prior", "_on_earlier"


def tasks_of(spec: RunSpec) -> list[str]:
    """What a run trains: one task, or several at once; of a base all."""
    return str(spec.params["tasks" if spec.method == BASE else "task"]).split("+")


def earlier_of(spec: RunSpec) -> list[str]:
    """The tasks of the stages before a run's."""
    return [task for of in spec.chain[1:] for task in tasks_of(of.spec)]


def drift_of(spec: RunSpec, name: str, since: str, of_task: Mapping[str, float], on_prior: float) -> dict[str, float]:
    """The columns of a distance `name` from an origin: on the run's own tasks, the prior, the earlier, and each task.

    `of_task`: of every task, the distance on its inputs; on several tasks it is their mean.
    """
    groups = {"": tasks_of(spec), ON_EARLIER: earlier_of(spec)} | {f"_on_{task}": [task] for task in of_task}
    own = {on: fmean(of_task[task] for task in tasks) for on, tasks in groups.items() if tasks}
    return {name + on + since: value for on, value in {**own, ON_PRIOR: on_prior}.items()}


def scores_of(spec: RunSpec, of_task: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The new-task score, a mean where several are trained; and every task's, as metrics, a fraction of 1."""
    return fmean(of_task[task] for task in tasks_of(spec)), {f"score_{task}": one for task, one in of_task.items()}


def has_reached(spec: RunSpec, record: Record) -> bool:
    """Whether a stage ends with this checkpoint."""
    return "until" in spec.params and record.new >= spec.params["until"]
