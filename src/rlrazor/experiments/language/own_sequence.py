"""A sequence of a user's own: stage after stage, of which none is begun that the budget cannot hold.

What is spent is the forward KL of each stage from the one before, on its own prompts, in nats, summed. What the next
one will cost is told by `analysis.ahead`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlrazor.analysis import ahead
from rlrazor.experiments.language.config import TINY
from rlrazor.experiments.language.evaluate import SAMPLED
from rlrazor.experiments.language.sequences import ModelSequences
from rlrazor.experiments.language.stages import Models
from rlrazor.experiments.language.unfinished import save_model
from rlrazor.experiments.language.world import policy_of, world_of
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Phase
from rlrazor.runs.records import Ancestor, Record, RunSpec
from rlrazor.runs.store import RunStore


@dataclass(frozen=True)
class Stage:
    """A stage as far as it is: `before` and `stderr` are of its task's score when it begins, `end` its last checkpoint.

    `end` is None where it is not trained; `diverged_at` is the step at which it diverged, if it did.
    """

    number: int
    spec: RunSpec
    before: float
    stderr: float
    forecast: ahead.StageForecast
    end: Record | None = None
    diverged_at: int | None = None

    @property
    def task(self) -> str:
        """Its name."""
        return str(self.spec.params["task"])

    @property
    def spent(self) -> float:
        """What it cost, in nats."""
        return 0.0 if self.end is None else self.end.drift["kl_forward_since_before"]

    @property
    def has_model(self) -> bool:
        """Whether it was trained to its end."""
        return self.end is not None and self.diverged_at is None

    def as_json(self) -> dict[str, Any]:
        """For scripts: scores are fractions of 1, KL is in nats."""
        end = None if self.end is None else asdict(self.end)
        told = {"stage": self.number, "task": self.task, "before": self.before, "before_stderr": self.stderr}
        return {**told, "forecast": asdict(self.forecast), "end": end, "diverged_at": self.diverged_at}


@dataclass(frozen=True)
class OwnSequence(Models):
    """The experiment: one method at one learning rate, one order, one seed. Each stage's model goes into OUT/models."""

    kl_budget: float | None = None

    def phases(self, config: ModelSequences, store: RunStore | None) -> Iterator[Phase]:
        """The base, and stage after stage until one would cost too much, or has diverged; what is there stays."""
        yield Phase("base policy", self.bases(config, store), columns={"order": "1", "stage": 1})
        for number, phase in enumerate(self._in_order(config, store), 1):
            stages = [] if store is None else self.stages(config, store)
            if len(stages) == number and stages[-1].end is None and self.is_over_budget(stages):
                return
            yield replace(phase, title=f"stage {number} of {len(config.tasks)}: {config.tasks[number - 1]}")
            if store is None:
                continue
            stage = self.stages(config, store)[number - 1]
            if stage.diverged_at is not None:
                return
            self._save_model(stage, store)

    def stages(self, config: ModelSequences, store: RunStore) -> list[Stage]:
        """Those that are trained, and the one that comes next; none comes after one that has diverged."""
        found: list[Stage] = []
        # What a KL bounds is how often a policy's own samples are right.
        target = config.target if config.scored == SAMPLED else 1.0
        for phase in self._in_order(config, store):
            (spec,) = phase.specs
            rows = [_row(of, store) for of in spec.chain]
            before = rows[-1][f"score_{spec.params['task']}"]
            stderr = self._stderr(spec.params["task"], before, config)
            forecast = ahead.forecast(before, stderr, target, ahead.finished_of(rows))
            stage = Stage(len(found) + 1, spec, before, stderr, forecast)
            if store.is_finished(spec):
                run = store.read(spec)
                stage = replace(stage, end=run.records[-1], diverged_at=run.diverged_at)
            found.append(stage)
            if stage.end is None or stage.diverged_at is not None:
                break
        return found

    def is_over_budget(self, stages: Sequence[Stage]) -> bool:
        """Whether they have cost more than the budget, or would with the last of them, which is not trained.

        Where nothing is left of it, none is begun, whatever is forecast.
        """
        if self.kl_budget is None:
            return False
        spent, last = sum(stage.spent for stage in stages), stages[-1]
        if last.end is not None:
            return spent > self.kl_budget
        return spent >= self.kl_budget or spent + last.forecast.kl > self.kl_budget

    def model_of(self, stage: Stage, store: RunStore) -> Path:
        """The folder of its model."""
        return store.folder / "models" / f"{stage.number}-{stage.task}-{stage.spec.run_id}"

    def trial(self, config: ModelSequences) -> Trial:
        """See `Models.trial`; a stage's model lies in OUT/models as well."""
        found = super().trial(config)
        return replace(found, sizes=replace(found.sizes, model=found.sizes.weights))

    def describe(self, config: ModelSequences) -> Mapping[str, Any]:
        """See `Models.describe`; of one method nothing else is worth a section but its items."""
        return {**super().describe(config), "kl_budget": self.kl_budget, "sections": ["own-sequence", "items"]}

    def _in_order(self, config: ModelSequences, store: RunStore | None) -> Iterator[Phase]:
        (method,) = config.methods
        (lr,) = config.rates(method)
        return self.in_order(config, config.tasks, {method: lr}, store)

    def _stderr(self, task: str, score: float, config: ModelSequences) -> float:
        """Of a score, at most: 0 where right answers are counted out, else that of as many coins with its bias.

        Where all samples were right, or all wrong, Wilson's interval still is wide: its width, in standard errors.
        """
        source = next(source for source in self.sources if source.name == task)
        if self.base == TINY and source.task().correct is not None:
            return 0.0
        samples = min(self.data[task][2], config.test_prompts) * config.kl_samples
        if score in (0, 1):
            return ahead.NORMAL / (samples + ahead.NORMAL**2)
        return math.sqrt(score * (1 - score) / samples)

    def _save_model(self, stage: Stage, store: RunStore) -> None:
        """From the weights that the store keeps, whole also where an adapter was trained."""
        folder = self.model_of(stage, store)
        if folder.exists() or stage.end is None:
            return
        base = world_of(self, stage.spec, store).base
        policy = policy_of(Ancestor(stage.spec, stage.end.step), base.model, store)
        save_model(policy, base.tokenizer, folder)


def _row(of: Ancestor, store: RunStore) -> dict[str, Any]:
    """A checkpoint as `ahead.finished_of` reads it."""
    (record,) = (record for record in store.read(of.spec).records if record.step == of.step)
    return {**record.metrics, **record.drift, "new": record.new, "task": of.spec.params.get("task")}
