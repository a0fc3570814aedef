"""Measuring a base policy and fine-tuning it: what the runner calls for every run, at every scale."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import polars as pl
import torch

from rlrazor.experiments.continual.config import TO_BASE
from rlrazor.experiments.continual.measures import has_reached, tasks_of
from rlrazor.experiments.language import protection, tiny
from rlrazor.experiments.language.config import TINY, count_steps, due_steps, steps_per_epoch, warmup_steps
from rlrazor.experiments.language.lesson import Lesson
from rlrazor.experiments.language.outcomes import base_items, beside_base
from rlrazor.experiments.language.sequences import method_of
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.stage_reference import StageReference
from rlrazor.experiments.language.unfinished import Unfinished, save_model
from rlrazor.experiments.language.world import World, policy_of, world_of
from rlrazor.lm import compute, encoding
from rlrazor.lm.adapters import unwrapped, weights_of
from rlrazor.lm.models import LanguageModel, add_lora
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Checkpoint, Keep, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
from rlrazor.system import phases, processes


def train(setup: Setup, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Measure the base (`base`), or fine-tune it as `spec` says; of several processes the first alone measures."""
    compute.prepare_process(spec.settings["threads"])
    if spec.method != BASE:
        return finetune(setup, spec, store)
    return measure(setup, spec, store) if processes.rank() == 0 else iter([])


def measure(setup: Setup, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """The base, which the tiny one is after its pre-training here; another one's weights stay where they are."""
    model: Any = None
    weights: Callable[[], Mapping[str, Any]] = dict
    if setup.base == TINY:
        steps, forms = spec.params["pretrain_steps"], tuple(filter(None, spec.params.get("forms", "").split("+")))
        model = tiny.pretrain(
            spec.seed, steps=steps, forms=forms, progress=lambda step: phases.at("pre-training", step, steps)
        )
        weights = partial(weights_of, model)
    found = reference_of(spec, world_of(setup, spec, store, model)).base_checkpoint(spec.run_id)
    return iter([Checkpoint(found.record, weights, beside_base(found.items, found.items), found.questions)])


def reference_of(spec: RunSpec, world: World, before: LanguageModel | None = None) -> Any:
    """What a run's checkpoints are compared with: the base, and in a sequence the stage `before`, None for the base."""
    return StageReference(spec, world, before) if "tasks" in spec.root.params else world.reference


def finetune(setup: Setup, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Train by the spec's method, measuring as it goes; what an interrupted run was at is gone on from."""
    from rlrazor.experiments.language import trainers  # TRL takes seconds to import

    world, (method, _) = world_of(setup, spec, store), method_of(spec.method)
    base, running, of = world.base, setup.running, spec.chain[-1]
    before = replace(base, model=policy_of(of, base.model, store)) if of.spec.chain else None
    references: list[Any] = []  # of the process that measures; made before there is an adapter in the base
    processes.in_first(lambda: references.append(reference_of(spec, world, before)))
    lesson = Lesson.of(world, tasks_of(spec) if "task" in spec.params else list(world.tasks), spec)

    def demonstrations() -> tuple[list[Any], list[Any], dict[str, float]]:
        teacher = None if spec.teacher is None else policy_of(spec.teacher, base.model, store)
        own, counts = lesson.examples(method, before or base, teacher, spec.seed)
        old, counted = protection.old_examples(setup, world, spec, method, before or base, len(own))
        return own + old if method.replays else own, old, counts | counted

    def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> Sequence[float | None]:
        scores = lesson.score(positions, [encoding.decode(base.tokenizer, completion) for completion in completions])
        world.say_failures(scores)
        return scores.values

    phases.at("preparing what is trained on")
    examples, old, counts = processes.in_first(demonstrations)
    unfinished = Unfinished(store.partial_folder(spec), keep=running.save_every != 0)
    measuring = Checkpointing(spec, references, store.keeps(spec), unfinished, counts, len(examples))
    state = processes.in_first(lambda: measuring.begin(store))
    with _policies(base.model, before, spec) as policies:
        measuring.policies = policies
        settings = _settings(setup, spec, base, lesson, measuring)
        looked_at = policies.looked_at(spec)
        term = protection.term_of(spec, method, policies.model, policies.before, old)
        job = trainers.Job(method, settings, policies.model, base.tokenizer, examples, looked_at, reward, term)
        try:
            trainers.train(job, measuring, resume=state)
            if running.keep_models:
                folder, keep = store.folder / "models" / spec.run_id, policies.as_kept
                processes.in_first(lambda: save_model(keep(policies.model), base.tokenizer, folder))
        except DivergedError as error:
            yield from measuring.checkpoints.values()
            # A trainer's own epochs are of its data set, which of own samples is a step's.
            raise DivergedError(error.step, error.step / measuring.per_epoch) from error
    yield from measuring.checkpoints.values()


def _settings(setup: Setup, spec: RunSpec, base: LanguageModel, lesson: Lesson, measuring: "Checkpointing") -> Any:
    """How the trainer is to train."""
    from rlrazor.experiments.language import trainers

    params, steps, every = spec.params, measuring.steps, setup.running.save_every
    # The last step is followed by the run's being stored.
    saved = [] if every == 0 else range(every, steps, every) if every else measuring.due[:-1]
    updates = trainers.Updates(
        lr=params["lr"],
        schedule=params["schedule"],
        steps=steps,
        warmup_steps=warmup_steps(spec, measuring.examples),
        batch_size=params["batch_size"],
        kl_coef=params["kl_coef"],
        seed=seed_of(spec.seed, "order") % 2**31,
        bf16=params["precision"] == "bf16",
    )
    stop_ids = encoding.stop_ids(base.tokenizer, base.model, lesson.stop)
    samples = trainers.Samples(
        params["group_size"] or 1,
        lesson.max_new_tokens,
        stop_ids,
        params["iterations"],
        tries=params.get("own_tries", 1),
        rounds=params.get("rounds", 1),
    )
    saving = trainers.Saving(frozenset(saved), measuring.unfinished.folder)
    return trainers.Settings(updates, samples, saving, setup.running.micro_batch, setup.running.report_to)


@dataclass(frozen=True, eq=False)
class Policies:
    """The model that is trained, the one that it starts from, and the base of all stages, which both stay as they are.

    With an adapter, what it starts from is None: the model without that. `rounded`: of a base in half precision a copy,
    for the weights of checkpoints.
    """

    model: Any
    before: Any
    base: Any
    rounded: Any = None

    def as_kept(self, policy: Any) -> Any:
        """The policy as it is measured and saved: with weights rounded to what the base's are in."""
        if self.rounded is None:
            return policy
        self.rounded.load_state_dict(unwrapped(policy).state_dict())
        return self.rounded

    def looked_at(self, spec: RunSpec) -> Any:
        """What the method's penalty, or DPG, holds to."""
        return self.base if method_of(spec.method)[1] == TO_BASE else self.before


@contextmanager
def _policies(base: Any, before: LanguageModel | None, spec: RunSpec) -> Iterator[Policies]:
    """Of a run that starts from the base, or the stage before.

    What is trained is in float32, whatever the base's weights are in: in half precision an update that is small beside
    its weight is rounded away.
    """
    start = base if before is None else before.model
    if not (rank := spec.params["lora_rank"]):
        # Made here: trainers put things around the forward of what they are given, which would be copied as well.
        rounded = None if compute.precision_of(start) == "float32" else copy.deepcopy(start)
        yield Policies(copy.deepcopy(start).float().requires_grad_(True), start, base, rounded)
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(spec.seed, "adapter") % 2**63)
        model = add_lora(start, rank)
    try:
        yield Policies(model, None, None if before is None else base)
    finally:
        model.unload()  # leaves the base as it was


class Checkpointing:
    """Called after each step, it measures where a checkpoint is due; what was measured is in `checkpoints`, by step.

    `references`: what it is compared with, where this process measures; `policies`: what is trained, and what
    from; `base_items`: the base's outcomes of the prior's items. The weights that the store keeps are copied at once:
    training does not wait for who asks for them. It tells the trainer to stop where a stage has learned its task.
    """

    policies: Policies
    base_items: pl.DataFrame | None = None

    def __init__(
        self,
        spec: RunSpec,
        references: Sequence[Any],
        keep: Keep,
        unfinished: Unfinished,
        counts: Mapping[str, float],
        examples: int,
    ) -> None:
        self.spec, self.references, self.counts = spec, references, counts
        self.keep, self.unfinished = keep, unfinished
        self.checkpoints: dict[int, Checkpoint] = {}
        self.steps, self.per_epoch = count_steps(spec, examples), steps_per_epoch(spec, examples)
        self.due, self.examples = due_steps(spec, examples), examples

    def begin(self, store: RunStore) -> Any:
        """The trainer's state to go on from, if there is one, with the checkpoints up to it."""
        self.base_items = base_items(self.spec.chain[0], store)
        state, self.checkpoints = self.unfinished.begin(self.due, self.wanted)
        return state

    def wanted(self, step: int) -> bool:
        """Whether the weights of a step are kept. At the end of an epoch a shorter run ends, of which this is more."""
        return self.keep.wants(step, last=step == self.due[-1] or step % self.per_epoch == 0)

    def __call__(self, step: int, policy: Any, measured: Mapping[str, float]) -> bool:
        """Measure the policy after this step, if a checkpoint is due; returns whether the run ends with it."""
        if step not in self.due or step in self.checkpoints:
            return False
        phases.at("measuring checkpoint", self.due.index(step) + 1, len(self.due))
        metrics = {**self.counts, **measured}
        policy = self.policies.as_kept(policy)
        found = self.references[0].checkpoint(
            self.spec.run_id, step, step / self.per_epoch, policy, metrics, frozen=self.policies.base
        )
        items = beside_base(self.base_items, found.items)
        any_may_be_last = "until" in self.spec.params and self.keep.wants(step, last=True)
        weights = weights_of(policy) if self.wanted(step) or any_may_be_last else {}
        before = max(self.checkpoints, default=None)
        self.checkpoints[step] = Checkpoint(found.record, partial(dict, weights), items)
        self.unfinished.add(self.checkpoints[step])
        if any_may_be_last and before is not None and not self.wanted(before):
            self.checkpoints[before] = replace(self.checkpoints[before], weights=dict)
            self.unfinished.forget_weights(before)
        phases.at(phases.TRAINING, step, self.steps)
        return has_reached(self.spec, found.record)
