"""Tasks in sequence as the runner sees them: bases, a rate for each method, stage after stage, and two comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rlrazor.experiments.continual import config as configs
from rlrazor.experiments.continual.config import EXPERIMENT, Config
from rlrazor.experiments.continual.evaluate import DRIFT, tasks_of
from rlrazor.experiments.continual.methods import METHODS, label_of
from rlrazor.experiments.continual.train import learn, pretrain
from rlrazor.experiments.parity_mnist import cost, data
from rlrazor.experiments.parity_mnist.methods import Method
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.estimate import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.runner import versions_of
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.teachers import choose

RATES, ALONE, JOINT = "rates", "alone", "joint"  # in the column `order`, where there is no sequence


@dataclass(frozen=True)
class Continual:
    """The experiment, on the images in `data_dir`.

    The rule for a method's learning rate: on the first task of the first order, with the first seed, it is the one
    whose checkpoint with a new-task score of at least the target has the highest prior score; where none gets there,
    the one with the highest new-task score. A stage ends at its first checkpoint that gets to the target, so methods
    are compared at equal scores; one that never gets there goes on from its last checkpoint.
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
        yield Phase("base policies", bases, columns={"order": RATES, "stage": 0})
        first = config.tasks[:1]
        trials = [config.spec(name, lr, first, Ancestor(bases[0], 0)) for name in config.methods for lr in config.lrs]
        yield Phase("learning rates", trials, keep="final", columns={"order": RATES, "stage": 1})
        rates = {name: rate_of(name, trials, store, config.target) for name in config.methods}
        starts = [(name, Ancestor(base, 0)) for base in bases for name in config.methods]
        for number, tasks in enumerate(config.sequences, 1):
            at = starts
            for stage, task in enumerate(tasks, 1):
                specs = [config.spec(name, rates[name], [task], start) for name, start in at]
                columns = {"order": str(number), "stage": stage}
                yield Phase(f"order {number}, stage {stage}: {task}", specs, "final", columns=columns)
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
        params = spec.params
        if spec.method == BASE:
            return Cost(0, 1)
        images = params["train_size"] * len(tasks_of(spec))
        return Cost(
            -(-images // params["batch_size"]) * params["epochs"], params["epochs"] * params["checkpoints_per_epoch"]
        )

    def trial(self, config: Config, specs: Sequence[RunSpec]) -> Trial:
        """That of ParityMNIST, whose measurement of a checkpoint is of more inputs."""
        trial, inputs = cost.trial(config), config.test_size * (len(config.tasks) + 1)
        share = inputs / cost.TEST_IMAGES / cost.MEASURES_COST

        def run(spec: RunSpec, of: Cost) -> float:
            return trial.run(spec, Cost(of.steps, 0)) + share * trial.run(spec, Cost(0, of.checkpoints))

        return replace(trial, run=run, timed=f"{trial.timed}; at most, as a stage ends when its task is learned")

    def describe(self, config: Config) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        return {
            "new_task": "the stage’s task",
            "prior_task": "FashionMNIST",
            "labels": {name: label_of(name) for name in config.methods},
            "data": data.fingerprint(self.data_dir),
            "versions": versions_of(),
            "drift": list(DRIFT),
        }


def rate_of(method: str, trials: Sequence[RunSpec], store: RunStore | None, target: float) -> float:
    """The method's learning rate, by the rule; without a store, which is a dry run, any."""
    if store is None:
        return float(trials[0].params["lr"])
    (chosen,) = choose(trials, store, method, target).values()
    return float(chosen.spec.params["lr"])


def end_of(spec: RunSpec, store: RunStore | None) -> Ancestor:
    """Where the next stage starts: the run's last checkpoint."""
    return Ancestor(spec, 0 if store is None else store.read(spec).records[-1].step)
