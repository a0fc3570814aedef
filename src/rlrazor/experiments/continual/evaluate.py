"""A checkpoint's scores on every task, and how far it is from the base and from the stage before, in nats."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from rlrazor import drift
from rlrazor.experiments.continual.tasks import Questions
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, log_probs
from rlrazor.experiments.parity_mnist.task import FASHION
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.sweep import DivergedError

Outputs = Mapping[str, Tensor]
"""Task -> a policy's log-probabilities on its test inputs."""
MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_forward": drift.forward_kl,
    "kl_reverse": drift.reverse_kl,
}
SINCE_BEFORE = "_since_before"  # ends the columns of drift from the stage before; the others are from the base
DRIFT = tuple(kl + on + since for since in ("", SINCE_BEFORE) for on in ("", "_on_prior") for kl in MEASURES)
"""The columns of drift that every record has. More: `_on_TASK` of each task, and `_on_earlier`, their mean so far."""


def outputs_of(policy: DigitPolicy, tests: Mapping[str, Questions]) -> Outputs:
    """What a policy says to all tasks."""
    return {task: log_probs(policy, asked.inputs) for task, asked in tests.items()}


def tasks_of(spec: RunSpec) -> list[str]:
    """What a run trains: one task, or several at once; of a base all."""
    return str(spec.params["tasks" if spec.method == BASE else "task"]).split("+")


def earlier_of(spec: RunSpec) -> list[str]:
    """The tasks of the stages before a run's."""
    return [task for of in spec.chain[1:] for task in tasks_of(of.spec)]


def measure(
    spec: RunSpec,
    at: tuple[int, float],
    said: Outputs,
    tests: Mapping[str, Questions],
    base: Outputs,
    before: Outputs,
) -> Record:
    """The record `at` (step, epoch) of a policy that `said` this; `new` is the score on the tasks that it trains.

    Raises DivergedError where an output is not finite.
    """
    if not all(logp.isfinite().all() for logp in said.values()):
        raise DivergedError(*at)
    scores = {task: asked.score(said[task]) for task, asked in tests.items()}
    own, drifted = tasks_of(spec), {}
    groups = {"": own, "_on_earlier": earlier_of(spec), "_on_prior": [FASHION]}
    groups |= {f"_on_{task}": [task] for task in tests if task != FASHION}
    for since, origin in (("", base), (SINCE_BEFORE, before)):
        for kl, distance in MEASURES.items():
            each = {task: distance(origin[task].double(), said[task].double()).mean().item() for task in tests}
            drifted |= {kl + on + since: mean_of(each, tasks) for on, tasks in groups.items() if tasks}
    metrics = {f"score_{task}": score for task, score in scores.items()}
    return Record(spec.run_id, *at, mean_of(scores, own), {FASHION: scores[FASHION]}, drifted, metrics)


def mean_of(values: Mapping[str, float], tasks: Sequence[str]) -> float:
    """The mean over tasks."""
    return fmean(values[task] for task in tasks)
