"""ParityMNIST as the runner sees it: base policies, the sweep, students of its best policies; and what they cost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlrazor.experiments.parity_mnist import config as configs
from rlrazor.experiments.parity_mnist import cost, data
from rlrazor.experiments.parity_mnist.config import TAUGHT_AT, TEACHER, Config, sensitivity_variants
from rlrazor.experiments.parity_mnist.evaluate import DRIFT
from rlrazor.experiments.parity_mnist.methods import METHODS, Method, label_of
from rlrazor.experiments.parity_mnist.task import load_task
from rlrazor.experiments.parity_mnist.train import finetune, pretrain
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.teachers import students


@dataclass(frozen=True)
class ParityMnist:
    """The experiment, on the images in `data_dir`; with `sensitivity` also over what the paper leaves open."""

    data_dir: Path | None = None
    sensitivity: bool = False

    name: ClassVar[str] = configs.EXPERIMENT
    title: ClassVar[str] = "ParityMNIST"
    config: ClassVar[type[Config]] = Config
    presets: ClassVar[Mapping[str, Config]] = configs.PRESETS
    methods: ClassVar[Mapping[str, Method]] = METHODS

    def phases(self, config: Config, store: RunStore | None) -> Iterator[Phase]:
        """Bases, the methods that need no teacher, and those that imitate the best of them; then the variants."""
        images = "" if store is None else data.fingerprint(self.data_dir)
        yield Phase("base policies", config.base_specs(images))
        taught = config.taught
        specs = config.specs(images, [name for name in config.methods if name not in taught])
        yield Phase("sweep", specs)
        if taught:
            yield students(specs, store, TEACHER, TAUGHT_AT, lambda _, teachers: config.specs(images, taught, teachers))
        for setting, value, variant in sensitivity_variants(config) if self.sensitivity else ():
            columns, tried = {"setting": setting, "value": value}, f"{setting} {value}"
            bases = variant.base_specs(images)
            yield Phase(f"{tried}: base policies", bases, table="sensitivity", columns=columns)
            yield Phase(tried, variant.specs(images, variant.methods), table="sensitivity", columns=columns)

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Pre-train (`base`) or fine-tune (any other method) as `spec` says.

        On one thread: results must not depend on the number of jobs, and a matrix product's summation order depends on
        the threads. Denormals to zero: the optimiser's moments of never-lit border pixels decay into denormal numbers,
        which make its step ten times slower (5.7 ms instead of 0.6 ms).
        """
        prepare_process(1)
        task = load_task(self.data_dir)
        return pretrain(spec, task) if spec.method == BASE else finetune(spec, task, store)

    def cost(self, spec: RunSpec) -> Cost:
        """Updates and checkpoints of a run, on all of MNIST."""
        return cost.of(spec)

    def trial(self, config: Config) -> Trial:
        """A few updates and an evaluation, on random images (under 3 s)."""
        return cost.trial(config)

    def describe(self, config: Config) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        return {
            "new_task": "ParityMNIST",
            "prior_task": "FashionMNIST",
            "labels": {name: label_of(name) for name in config.methods},
            "data": data.fingerprint(self.data_dir),
            "drift": list(DRIFT),
        }
