"""Sequences of tasks for language models: any base that fine-tuning takes, and any tasks with a verifier.

A run is trained and measured as on one task; `lesson` joins several, `stage_reference` measures all of them.

    setup = Setup(base, source, further=(another, a_third))       # TaskSources: built-in, or prompts and a verifier
    Models(setup).in_order(config, config.tasks, {method: lr}, store)

`config`, a `ModelSequences`, names the tasks by the sources' names.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.config import PENALTIES
from rlrazor.experiments.continual.experiment import Continual
from rlrazor.experiments.continual.measures import ON_PRIOR, SINCE_BEFORE, tasks_of
from rlrazor.experiments.language import cost, protection, sequences
from rlrazor.experiments.language.config import count_steps, due_steps, replayed
from rlrazor.experiments.language.evaluate import DRIFT
from rlrazor.experiments.language.experiment import Language, described_as
from rlrazor.experiments.language.methods import METHODS, Method
from rlrazor.experiments.language.sequences import ModelSequences, method_of, name_of_sweep
from rlrazor.experiments.language.setup import Setup, TaskSource
from rlrazor.experiments.language.tasks import Splits
from rlrazor.experiments.language.train import train
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore

SINCE = tuple(f"kl_forward{on}{since}" for on in ("", ON_PRIOR) for since in ("", SINCE_BEFORE))[1:]
"""The columns of drift that every record has besides those of a run on one task."""


@dataclass(frozen=True)
class Models(Setup, Continual):
    """The experiment on one base, and the tasks of its sources."""

    config: ClassVar[type[ModelSequences]] = ModelSequences
    presets: ClassVar[Mapping[str, ModelSequences]] = sequences.PRESETS
    methods: ClassVar[Mapping[str, Method]] = METHODS

    @cached_property
    def data(self) -> Mapping[str, tuple[str, int, int]]:
        """Of each task the fingerprint of its prompts, and how many there are to train on and to measure on."""
        splits = {source.name: (source, _loaded(source)) for source in self.sources}
        return {name: (source.fingerprint(of), len(of.train), len(of.test)) for name, (source, of) in splits.items()}

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How many prompts of each task there are to train on, without fingerprints, as `Language.count`."""
        return {source.name: len(_loaded(source).train) for source in self.sources}

    def bases(self, config: ModelSequences, store: RunStore | None) -> list[RunSpec]:
        """Measured on all tasks, after its pre-training if it is the tiny one."""
        prints = "+".join(self.data[task][0] for task in sorted(config.tasks)) if store else ""
        return config.base_specs(self.fingerprint if store else "", prints)

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Measure the base, or train a stage."""
        return train(self, spec, store)

    def cost(self, spec: RunSpec) -> Cost:
        """See `Continual.cost`."""
        if spec.method == BASE:
            return Cost(0, 1)
        prompts = self.prompts(spec)
        if protection.has_old(self, spec, method_of(spec.method)[0]):
            prompts += replayed(spec, prompts)
        return Cost(count_steps(spec, prompts), len(due_steps(spec, prompts)))

    def prompts(self, spec: RunSpec) -> int:
        """How many of its tasks' a run learns from, but for old ones."""
        most = spec.params["train_prompts"] or math.inf
        return int(sum(min(self.counts[task], most) for task in tasks_of(spec)))

    def trial(self, config: ModelSequences) -> Trial:
        """See `Continual.trial`; timed on the first task."""
        one, sweep = Language(self.base, self.task, self.prior, self.running), config.sweep(task=self.task.name)
        found = cost.trial_of(one.timing(sweep), sweep, self, self.prompts)
        return replace(
            found, run=partial(_seconds, found.run, len(self.sources)), once=lambda spec: found.once(_of_sweep(spec))
        )

    def describe(self, config: ModelSequences) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        return {
            "new_task": "the stage’s task",
            "labels": {name: method_of(name)[0].label + PENALTIES[method_of(name)[1]] for name in config.methods},
            "thresholds": [config.target],
            "data": "+".join(fingerprint for fingerprint, *_ in self.data.values()),
            "drift": [*DRIFT, *SINCE],
            **described_as(self, config),
        }


def _loaded(source: TaskSource) -> Splits:
    """Its prompts; what is wrong with them is said of the task."""
    try:
        return source.load()
    except RazorError as error:
        raise RazorError(f"The task {source.name}: {error}") from error


def _seconds(of_one: Callable[[RunSpec, Cost], float], tasks: int, spec: RunSpec, whole: Cost) -> float:
    """Of a run whose checkpoints are measured on so many tasks, from that on one."""
    return of_one(_of_sweep(spec), Cost(whole.steps, whole.checkpoints * tasks))


def _of_sweep(spec: RunSpec) -> RunSpec:
    """With its method as a sweep names it."""
    return replace(spec, method=name_of_sweep(spec.method))
