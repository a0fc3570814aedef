"""Tasks in sequence as the runner sees them: bases, a rate for each method, stage after stage, and two comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlrazor.experiments.continual import config as configs
from rlrazor.experiments.continual.config import ALONE, EXPERIMENT, JOINT, RATES, Config
from rlrazor.experiments.continual.evaluate import DRIFT, tasks_of
from rlrazor.experiments.continual.methods import METHODS, label_of
from rlrazor.experiments.continual.train import learn, pretrain
from rlrazor.experiments.parity_mnist import cost, data
from rlrazor.experiments.parity_mnist.methods import Method
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.teachers import choose


@dataclass(frozen=True)
class Continual:
    """The experiment, on the images in `data_dir`.

    The rule for a method's learning rate, `teachers.choose`: on the first task of the first order, with the first seed,
    it is that of the checkpoint with the highest prior score among those with a new-task score of at least the target;
    where none gets there, of the one with the highest new-task score. A stage ends at its first checkpoint that gets to
    the target, so methods are compared at equal scores; one that never gets there goes on from its last checkpoint.
    """

    data_dir: Path | None = None

    name: ClassVar[str] = EXPERIMENT
    title: ClassVar[str] = "Tasks in sequence"
    config: ClassVar[type[Config]] = Config
    presets: ClassVar[Mapping[str, Config]] = configs.PRESETS
    methods: ClassVar[Mapping[str, Method]] = METHODS

    def phases(self, config: Config, store: RunStore | None) -> Iterator[Phase]:
        """`columns` tell the order, by its number, and the stage; besides the sequences:

        `rates`, the first stage at every rate; `alone`, each task from the base; `joint`, all at once from there.
        """
        bases = config.base_specs("" if store is None else data.fingerprint(self.data_dir))
        trials = [
            config.spec(name, lr, config.tasks[:1], Ancestor(bases[0], 0))
            for name in config.methods
            for lr in config.lrs
        ]
        yield Phase("learning rates", trials, keep="final", columns={"order": RATES, "stage": 1})
        rates = {name: rate_of(name, trials, store, config.target) for name in config.methods}
        starts = [(name, Ancestor(base, 0)) for base in bases for name in config.methods]
        for number, tasks in enumerate([config.tasks, config.tasks[::-1]][: config.orders], 1):
            at = starts
            for stage, task in enumerate(tasks, 1):
                specs = [config.spec(name, rates[name], [task], start) for name, start in at]
                columns = {"order": str(number), "stage": stage}
                yield Phase(f"order {number}, stage {stage}: {task}", specs, keep="final", columns=columns)
                at = [(spec.method, end_of(spec, store)) for spec in specs]
        plain = [(name, start) for name, start in starts if "+" not in name]
        for order, groups in ((ALONE, [[task] for task in config.tasks]), (JOINT, [config.tasks])):
            specs = [config.spec(name, rates[name], group, start) for group in groups for name, start in plain]
            yield Phase(order, specs, columns={"order": order, "stage": 1})

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Pre-train (`base`) or train a stage, on one thread: results must not depend on the number of jobs."""
        prepare_process(1)
        return pretrain(spec, self.data_dir) if spec.method == BASE else learn(spec, self.data_dir, store)

    def cost(self, spec: RunSpec) -> Cost:
        """Updates and checkpoints of a run, at most: it ends when it has learned its task."""
        return cost.of(spec, spec.params.get("train_size", 0) * len(tasks_of(spec)))

    def trial(self, config: Config, specs: Sequence[RunSpec]) -> Trial:
        """Time an update and the measurement of a checkpoint; a run takes less than that where it ends early."""
        return cost.trial(config, config.test_size * (len(config.tasks) + 1))

    def describe(self, config: Config) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        return {
            "new_task": "the stage’s task",
            "prior_task": "FashionMNIST",
            "labels": {name: label_of(name) for name in config.methods},
            "data": data.fingerprint(self.data_dir),
            "drift": list(DRIFT),
        }


def rate_of(method: str, trials: Sequence[RunSpec], store: RunStore | None, target: float) -> float:
    """The method's learning rate, by the rule; without a store, which is a dry run, any."""
    spec = trials[0] if store is None else choose(trials, store, method, target)[trials[0].seed].spec
    return float(spec.params["lr"])


def end_of(spec: RunSpec, store: RunStore | None) -> Ancestor:
    """Where the next stage starts: the run's last checkpoint."""
    return Ancestor(spec, 0 if store is None else store.read(spec).records[-1].step)
