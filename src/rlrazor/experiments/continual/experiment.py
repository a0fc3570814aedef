"""Tasks in sequence as the runner sees them: bases, a rate for each method, stage after stage, and two comparisons.

A family of policies is a subclass, `parity_mnist.stages.Images` or `language.stages.Models`, with a config of its own,
an `InSequence`. Between them they say which runs there are:

    bases(config, store)                        a run per seed that all others start from
    config.rates(method)                        the learning rates to choose from
    config.stage(method, lr, tasks, start)      the run that trains these tasks, together, from that checkpoint

and the subclass how one is trained and measured, as any experiment does. A base's param `tasks` names all tasks and a
stage's `task` its own, with `+` between several; a stage ends at its first checkpoint with a score of at least `until`,
and its records have the columns of `measures`. So `studies.continual` knows no family, and neither does what is below.

`Continual.in_order` yields the stages of one order: a phase at a time, which the runner finishes before it asks for the
next. Who wants to decide whether a stage may begin goes through it himself, and stops asking:

    for phase in self.in_order(config, config.tasks, rates, store):
        if store and not may_begin(phase.specs, store):  # what each starts from, `spec.starts_from`, is in the store
            return
        yield phase
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlrazor.experiments.continual.config import ALONE, EXPERIMENT, JOINT, RATES
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.teachers import choose


@dataclass(frozen=True)
class Continual(ABC):
    """The experiment, but for what is trained.

    The rule for a method's learning rate, `teachers.choose`: on the first task of the first order, with the first seed,
    it is that of the checkpoint with the highest prior score among those with a new-task score of at least the target;
    where none gets there, of the one with the highest new-task score. A stage ends at its first checkpoint that gets to
    the target, so methods are compared at equal scores; one that never gets there goes on from its last checkpoint.
    """

    name: ClassVar[str] = EXPERIMENT
    title: ClassVar[str] = "Tasks in sequence"
    config: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
    methods: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def bases(self, config: Any, store: RunStore | None) -> list[RunSpec]:
        """A run per seed; without a store, which is a dry run, what they are made from need not be there."""

    def phases(self, config: Any, store: RunStore | None) -> Iterator[Phase]:
        """`columns` tell the order, by its number, and the stage; besides the sequences:

        `rates`, the first stage at every rate; `alone`, each task from the base; `joint`, all at once from there.
        """
        first, *_ = starts = [Ancestor(base, 0) for base in self.bases(config, store)]
        trials = [
            config.stage(name, lr, config.tasks[:1], first) for name in config.methods for lr in config.rates(name)
        ]
        yield Phase("learning rates", trials, keep="final", columns={"order": RATES, "stage": 1})
        rates = {name: rate_of(name, trials, store, config.target) for name in config.methods}
        for number, tasks in enumerate([config.tasks, config.tasks[::-1]][: config.orders], 1):
            yield from self.in_order(config, tasks, rates, store, number)
        plain = [(name, start) for start in starts for name in config.methods if "+" not in name]
        for order, groups in ((ALONE, [[task] for task in config.tasks]), (JOINT, [config.tasks])):
            specs = [config.stage(name, rates[name], group, start) for group in groups for name, start in plain]
            yield Phase(order, specs, columns={"order": order, "stage": 1})

    def in_order(
        self, config: Any, tasks: Sequence[str], rates: Mapping[str, float], store: RunStore | None, number: int = 1
    ) -> Iterator[Phase]:
        """Stage after stage, each method at its rate, all seeds; a stage starts where the one before ended."""
        at = [(name, Ancestor(base, 0)) for base in self.bases(config, store) for name in rates]
        for stage, task in enumerate(tasks, 1):
            specs = [config.stage(name, rates[name], [task], start) for name, start in at]
            columns = {"order": str(number), "stage": stage}
            yield Phase(f"order {number}, stage {stage}: {task}", specs, keep="final", columns=columns)
            at = [(spec.method, end_of(spec, store)) for spec in specs]

    # What any experiment has

    @abstractmethod
    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Make a base, or train a stage."""

    @abstractmethod
    def cost(self, spec: RunSpec) -> Cost:
        """Updates and checkpoints of a run, at most: it ends when it has learned its task."""

    @abstractmethod
    def trial(self, config: Any) -> Trial:
        """Time an update and the measurement of a checkpoint; a run takes less than that where it ends early."""

    @abstractmethod
    def describe(self, config: Any) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""


def rate_of(method: str, trials: Sequence[RunSpec], store: RunStore | None, target: float) -> float:
    """The method's learning rate, by the rule; without a store, which is a dry run, any."""
    own = [spec for spec in trials if spec.method == method]
    spec = own[0] if store is None else choose(own, store, method, target)[own[0].seed].spec
    return float(spec.params["lr"])


def end_of(spec: RunSpec, store: RunStore | None) -> Ancestor:
    """Where the next stage starts: the run's last checkpoint."""
    return Ancestor(spec, 0 if store is None else store.read(spec).records[-1].step)
