"""What every sequence has, whatever is trained: its settings, and the names of penalties. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.measures import ON_EARLIER, ON_PRIOR, SINCE_BEFORE
from rlrazor.runs.settings import check_bounds, check_many, check_runs, setting

EXPERIMENT = "continual"
RATES, ALONE, JOINT = "rates", "alone", "joint"  # in the column `order`, of runs that are no sequence
TO_BASE, TO_BEFORE = "+kl", "+kl-before"
PENALTIES = {"": "", TO_BASE: " + KL to the base", TO_BEFORE: " + KL to the stage before"}
"""The end of a method's name -> that of its label: what a KL penalty holds a stage to."""


HELP = {
    "methods": "methods, comma-separated, or 'core' (seven) or 'paper' (with their penalties)",
    "lrs": "learning rates to choose from, comma-separated, or LOW:HIGH:COUNT log-spaced",
    "schedules": "learning-rate schedule of a stage: constant or cosine",
    "epochs": "epochs after which a stage ends at the latest",
    "kl_coef": f"weight of the KL penalty in the methods named ...{TO_BASE} and ...{TO_BEFORE}",
}
"""What some of a family's settings are in a sequence."""


@dataclass(frozen=True, kw_only=True)
class InSequence:
    """What a family's config has besides its own settings, of which those for a grid have one value here."""

    tasks: tuple[str, ...] = setting("the tasks, in the first order")
    orders: int = setting("1: that order; 2: its reverse, too", 1)
    target: float = setting("new-task score at which a stage ends", 0.93)


def check(config: Any, known: Sequence[str] | None, single: Sequence[str]) -> None:
    """Raise RazorError for what is no sequence, too many runs, or several values of the settings in `single`.

    `known`: the tasks there are, where they can all be named.
    """
    check_many(config, ("methods", "tasks", "lrs", "seeds"))
    check_bounds(config)
    if unknown := [task for task in config.tasks if known is not None and task not in known]:
        raise RazorError(f"Unknown task {unknown[0]!r:.60}. Tasks: {', '.join(known or ())}.")
    for task in config.tasks:
        if f"_on_{task}" in (ON_PRIOR, ON_EARLIER) or task.endswith(SINCE_BEFORE):
            raise RazorError(f"A task cannot be called {task!r:.60}, as columns of KL are: name it otherwise.")
    if len(config.tasks) < 2:
        raise RazorError("A sequence has two tasks or more: name them with tasks.")
    if several := [name for name in single if len(getattr(config, name)) > 1]:
        raise RazorError(f"A stage has one value of {several[0]}, not {len(getattr(config, several[0]))}: give one.")
    runs = len(config.methods) * (len(config.lrs) + len(config.tasks) * len(config.seeds) * (config.orders + 1))
    check_runs(runs, config.epochs[0] * config.checkpoints_per_epoch)


def parts_of(method: str) -> tuple[str, str]:
    """A method's name without its penalty, and that: one of PENALTIES, or what nobody knows."""
    plain, plus, penalty = method.partition("+")
    return plain, plus + penalty
