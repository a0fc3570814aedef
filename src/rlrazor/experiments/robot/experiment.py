"""The robot as the runner sees it: base policies, the sweep, and what they cost; films of each run for the report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from rlrazor.experiments.robot import config as configs
from rlrazor.experiments.robot import cost, films
from rlrazor.experiments.robot.base import load_policy, pretrain
from rlrazor.experiments.robot.cache import default_folder
from rlrazor.experiments.robot.config import BASE_RANGE, META_WORLD, TRANSFORMER, Config
from rlrazor.experiments.robot.evaluate import DRIFT
from rlrazor.experiments.robot.methods import METHODS, Method, find_method, label_of
from rlrazor.experiments.robot.train import finetune
from rlrazor.experiments.robot.world import World
from rlrazor.experiments.robot.worlds import world_of
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.runner import versions_of
from rlrazor.runs.store import Checkpoint, RunStore

SIMULATOR = ("metaworld", "mujoco")


@dataclass(frozen=True)
class Robot:
    """The experiment. None of this changes a result, but the `world`, where it is another than the config names.

    `workers`: processes that each run's simulators are in, 0 for the run's own. `recordings`: a folder of recorded
    episodes, for a world without experts. `cache`: where demonstrations and bases are kept. `filmed`: whether each run
    is filmed at its end.
    """

    workers: int = 0
    recordings: Path | None = None
    cache: Path | None = None
    filmed: bool = True
    world: World | None = None

    name: ClassVar[str] = configs.EXPERIMENT
    title: ClassVar[str] = "A robot arm"
    config: ClassVar[type[Config]] = Config
    presets: ClassVar[Mapping[str, Config]] = configs.PRESETS
    methods: ClassVar[Mapping[str, Method]] = METHODS

    def phases(self, config: Config, store: RunStore | None) -> Iterator[Phase]:
        """Bases, then all methods."""
        made_from = "" if store is None else self.made_from(config)
        yield Phase("base policies", config.base_specs(made_from))
        yield Phase("sweep", config.specs(made_from, config.methods))

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Make a base, or fine-tune, as `spec` says; film it at the end.

        On one thread: results must not depend on the number of jobs, and a matrix product's summation order depends on
        the threads.
        """
        prepare_process(1)
        world = self.world_of(spec.root.params["world"])
        if spec.method == BASE:
            run = pretrain(spec, world, workers=self.workers, cache=self.cache_folder)
        else:
            run = finetune(spec, world, store, workers=self.workers, cache=self.cache_folder)
        last = None
        for last in run:
            yield last
        if self.filmed and last is not None:
            policy = load_policy(spec.root.params, world, last.weights())
            films.keep(store.folder, spec, world, policy)

    def cost(self, spec: RunSpec) -> Cost:
        """Updates and checkpoints of a run."""
        return cost.of(spec)

    def trial(self, config: Config) -> Trial:
        """A few steps of the simulator, and a few updates."""
        return cost.trial(config, self.world_of(config.world), self.workers)

    def describe(self, config: Config) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        kinds = {name: find_method(name)[0].on_policy for name in config.methods}
        return {
            "new_task": config.new_task,
            "prior_task": "the prior tasks",
            "prior_tasks": list(config.prior_tasks),
            "labels": {name: label_of(name) for name in config.methods},
            "families": {
                "RL": [name for name, on_policy in kinds.items() if on_policy],
                "SFT": [name for name, on_policy in kinds.items() if not on_policy],
            },
            "drift": [*DRIFT, *(f"kl_forward_on_{task}" for task in config.prior_tasks)],
            "thresholds": list(config.thresholds),
            "kl_unit": "nats per action",
            "base_range": list(BASE_RANGE),
            "data": self.made_from(config),
            "versions": versions_of(*(SIMULATOR if config.world == META_WORLD and self.world is None else ())),
        }

    def world_of(self, name: str) -> World:
        """The world of that name, or the one that was given instead."""
        return self.world or world_of(name, self.recordings)

    def made_from(self, config: Config) -> str:
        """What the runs are made from besides the settings: the release of a simulator, or the weights of a model."""
        if self.world is not None:
            return self.world.name
        if config.policy != TRANSFORMER:
            from rlrazor.experiments.robot.vla.loading import fingerprint

            return fingerprint(config.policy, self.recordings)
        return ", ".join(f"{name} {version(name)}" for name in SIMULATOR)

    @property
    def cache_folder(self) -> Path:
        """Where demonstrations and bases are kept."""
        return self.cache or default_folder()
