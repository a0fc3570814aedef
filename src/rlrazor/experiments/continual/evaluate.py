"""A checkpoint's scores on every task, and how far it is from the base and from the stage before, in nats."""

from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from rlrazor.drift import forward_kl, reverse_kl
from rlrazor.experiments.continual.tasks import Questions
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, log_probs
from rlrazor.experiments.parity_mnist.task import FASHION
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.sweep import DivergedError

Outputs = Mapping[str, Tensor]
"""Task -> a policy's log-probabilities on its test inputs."""
MEASURES = {"kl_forward": forward_kl, "kl_reverse": reverse_kl}
ORIGINS = ("", "_since_before")  # the ends of columns of drift: from the base, and from the stage before
DRIFT = tuple(kl + on + since for since in ORIGINS for on in ("", "_on_prior") for kl in MEASURES)
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
    origins: tuple[Outputs, Outputs],
) -> Record:
    """The record `at` (step, epoch) of a policy that `said` this; `new` is the score on the tasks that it trains.

    `origins`: what the base says, and the stage before. Raises DivergedError where an output is not finite.
    """
    if not all(logp.isfinite().all() for logp in said.values()):
        raise DivergedError(*at)
    scores = {task: asked.score(said[task]) for task, asked in tests.items()}
    groups = {"": tasks_of(spec), "_on_prior": [FASHION], "_on_earlier": earlier_of(spec)}
    groups |= {f"_on_{task}": [task] for task in tests if task != FASHION}
    drifted: dict[str, float] = {}
    for since, origin in zip(ORIGINS, origins, strict=True):
        for kl, distance in MEASURES.items():
            each = {task: distance(origin[task].double(), said[task].double()).mean().item() for task in tests}
            drifted |= {kl + on + since: fmean(each[task] for task in own) for on, own in groups.items() if own}
    new, metrics = fmean(scores[task] for task in groups[""]), {f"score_{task}": one for task, one in scores.items()}
    return Record(spec.run_id, *at, new, {FASHION: scores[FASHION]}, drifted, metrics)
