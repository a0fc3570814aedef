"""A stage's checkpoints beside the base and beside the stage before, on every task of the sequence."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from rlrazor.experiments.continual.measures import SINCE_BEFORE, drift_of, has_reached, scores_of, tasks_of
from rlrazor.experiments.language.evaluate import Answers, Scored, finite
from rlrazor.experiments.language.world import World
from rlrazor.lm import kl, probes
from rlrazor.lm.models import LanguageModel
from rlrazor.runs.records import Record, RunSpec


class StageReference:
    """What a stage's checkpoints are compared with; `before` is the policy that it starts from, None for the base.

    What the stage before says is drawn as what the base says is. KL on the prior is that on the generic probe: on texts
    or prompts that stand for what must not change. Reverse KL, which needs samples of each checkpoint, is measured on
    the stage's own task only.
    """

    def __init__(self, spec: RunSpec, world: World, before: LanguageModel | None) -> None:
        self.spec, self.world = spec, world
        self.reference = world.reference.about([world.asked[task] for task in tasks_of(spec)])
        self.since: dict[str, kl.Probe] = {}
        self.before = None
        if before is not None:
            self.since_on_prior = kl.Probe(before.model, self.reference.generic_of(before))
            for task, asked in world.asked.items():
                sequences = asked.complete(before, probes.NEW)
                self.since[task] = kl.Probe(before.model, sequences, beside=self.since_on_prior)
            self.before = None if spec.params["lora_rank"] else before.model

    def base_checkpoint(self, run_id: str) -> Scored:
        """The base's own scores."""
        found = self.reference.measure_base()
        told = dict(zip(tasks_of(self.spec), found.answers, strict=True))  # of a base, all tasks
        _, scores = scores_of(self.spec, {task: told[task].score for task in self.asked})
        record = Record(run_id, 0, 0.0, found.new, found.prior, {}, {**found.metrics, **scores})
        return Scored(record, found.items, found.questions)

    def checkpoint(
        self,
        run_id: str,
        step: int,
        epoch: float,
        model: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        frozen: Any = None,
    ) -> Scored:
        """See `Reference.checkpoint`, and `continual.measures` for what is added to it."""
        tuned = replace(self.world.base, model=model)
        with finite(step, epoch):
            found = self.reference.measure(tuned, frozen)
            told = dict(zip(tasks_of(self.spec), found.answers, strict=True))
            scores = {task: told[task].score if task in told else one.score(tuned) for task, one in self.asked.items()}
            new, of_tasks = scores_of(self.spec, scores)
            drift = {**found.drift, **self._drift(model, found.drift, told)}
            own = {**(metrics or {}), **found.metrics, **of_tasks}
            record = Record(run_id, step, epoch, new, found.prior, drift, own)
            reached = float(has_reached(self.spec, record))
            return Scored(replace(record, metrics={**own, "reached": reached}), found.items)

    @property
    def asked(self) -> Mapping[str, Any]:
        """All tasks."""
        return self.world.asked

    def _drift(self, model: Any, measures: Mapping[str, float], told: Mapping[str, Answers]) -> dict[str, float]:
        """The columns by inputs and by origin."""
        forward = {
            task: told[task].drift["kl_forward"] if task in told else _forward(one.probe, model)
            for task, one in self.asked.items()
        }
        own = drift_of(self.spec, "kl_forward", "", forward, measures["kl_probe"])
        if not self.since:
            since = drift_of(self.spec, "kl_forward", SINCE_BEFORE, forward, measures["kl_probe"])
            return {**own, **since, f"kl_reverse{SINCE_BEFORE}": measures["kl_reverse"]}
        since_each = {task: _forward(probe, model) for task, probe in self.since.items()}
        since = drift_of(self.spec, "kl_forward", SINCE_BEFORE, since_each, _forward(self.since_on_prior, model))
        reverse = [kl.reverse_kl(model, one.sequences, self.before).per_completion.mean for one in told.values()]
        return {**own, **since, f"kl_reverse{SINCE_BEFORE}": fmean(reverse)}


def _forward(probe: kl.Probe, model: Any) -> float:
    """In nats per completion, or per text."""
    return kl.forward_kl(probe, model).per_completion.mean
