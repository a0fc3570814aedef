"""Measuring a base policy and fine-tuning it: what the runner calls for every run, at every scale."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import TINY, count_steps, due_steps, steps_per_epoch, warmup_steps
from rlrazor.experiments.language.demonstrations import Prompts, Source
from rlrazor.experiments.language.methods import find_method
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.tasks import score
from rlrazor.experiments.language.unfinished import Unfinished, save_model
from rlrazor.experiments.language.world import World, policy_of, world_of
from rlrazor.lm import compute, encoding
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.models import add_lora
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
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
    if setup.base != TINY:
        return iter([Checkpoint(world_of(setup, spec, store).reference.base_record(spec.run_id))])
    steps = spec.params["pretrain_steps"]
    model = tiny.pretrain(spec.seed, steps=steps, progress=lambda step: phases.at("pre-training", step, steps))
    record = world_of(setup, spec, store, model).reference.base_record(spec.run_id)
    return iter([Checkpoint(record, partial(weights_of, model))])


def finetune(setup: Setup, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Train by the spec's method, measuring as it goes; what an interrupted run was at is gone on from."""
    from rlrazor.experiments.language import trainers  # TRL takes seconds to import

    world, (method, _) = world_of(setup, spec, store), find_method(spec.method)
    base, running = world.base, setup.running
    prompts = Prompts.of(world.task, world.splits.train[: spec.params["train_prompts"] or None], base)
    processes.in_first(lambda: bool(world.reference))  # measured before the base has an adapter in it

    def demonstrations() -> tuple[list[Any], dict[str, float]]:
        teacher = None if spec.teacher is None else policy_of(spec.teacher, base.model, store)
        return Source(world.task, prompts, base, teacher, spec.seed).examples(method)

    def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> Sequence[float | None]:
        texts = [encoding.decode(base.tokenizer, completion) for completion in completions]
        scores = score(world.task, [prompts.items[position] for position in positions], texts)
        world.say_failures(scores)
        return scores.values

    phases.at("preparing what is trained on")
    examples, counts = processes.in_first(demonstrations)
    counts = {"prompts_too_long": float(prompts.too_long), **counts}
    measuring = Measuring(spec, world, store, len(examples), counts, keep_state=running.save_every != 0)
    state = processes.in_first(measuring.begin)
    with _policy(base.model, spec, store) as (model, frozen):
        measuring.frozen = frozen
        settings = _settings(setup, spec, world, measuring)
        job = trainers.Job(method, settings, model, base.tokenizer, examples, frozen, reward)
        try:
            trainers.train(job, measuring, resume=state)
            if running.keep_models:
                folder = store.folder / "models" / spec.run_id
                processes.in_first(lambda: save_model(model, base.tokenizer, folder))
        except DivergedError:
            yield from measuring.checkpoints.values()
            raise
    yield from measuring.checkpoints.values()


def _settings(setup: Setup, spec: RunSpec, world: World, measuring: "Measuring") -> Any:
    """How the trainer is to train."""
    from rlrazor.experiments.language import trainers

    params, base, task, steps = spec.params, world.base, world.task, measuring.steps
    every = setup.running.save_every
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
    stop_ids = encoding.stop_ids(base.tokenizer, base.model, task.stop)
    samples = trainers.Samples(params["group_size"] or 1, task.max_new_tokens, stop_ids, params["iterations"])
    saving = trainers.Saving(frozenset(saved), measuring.unfinished.folder)
    return trainers.Settings(updates, samples, saving, setup.running.micro_batch, setup.running.report_to)


@contextmanager
def _policy(base: Any, spec: RunSpec, store: RunStore) -> Iterator[tuple[Any, Any]]:
    """The model to train, and the frozen base beside it: with an adapter, None, as it is the model without that."""
    assert spec.starts_from is not None
    # A stage goes on from the one before, which the base that is loaded is not.
    start = policy_of(spec.starts_from, base, store) if spec.starts_from.spec.chain else base
    if not (rank := spec.params["lora_rank"]):
        yield copy.deepcopy(start).requires_grad_(True), base
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(spec.seed, "adapter") % 2**63)
        model = add_lora(start, rank)
    try:
        yield model, None
    finally:
        model.unload()  # leaves the base as it was


class Measuring:
    """Called after each step, it measures where a checkpoint is due; what was measured is in `checkpoints`, by step.

    `frozen`: the base beside the policy, as `_policy` has it. The weights that the store keeps are copied at once:
    training does not wait for who asks for them.
    """

    frozen: Any = None

    def __init__(
        self,
        spec: RunSpec,
        world: World,
        store: RunStore,
        examples: int,
        counts: Mapping[str, float],
        *,
        keep_state: bool,
    ) -> None:
        self.spec, self.world, self.counts = spec, world, counts
        self.keep = store.keeps(spec)
        self.unfinished = Unfinished(store.partial_folder(spec), keep=keep_state)
        self.checkpoints: dict[int, Checkpoint] = {}
        self.steps, self.per_epoch = count_steps(spec, examples), steps_per_epoch(spec, examples)
        self.due, self.examples = due_steps(spec, examples), examples

    def begin(self) -> Any:
        """The trainer's state to go on from, if there is one, with the checkpoints up to it."""
        state, self.checkpoints = self.unfinished.begin(self.due, self.wanted)
        return state

    def wanted(self, step: int) -> bool:
        """Whether the weights of a step are kept. At the end of an epoch a shorter run ends, of which this is more."""
        return self.keep.wants(step, last=step == self.due[-1] or step % self.per_epoch == 0)

    def __call__(self, step: int, policy: Any, measured: Mapping[str, float]) -> None:
        """Measure the policy after this step, if a checkpoint is due."""
        if step not in self.due or step in self.checkpoints:
            return
        phases.at("measuring checkpoint", self.due.index(step) + 1, len(self.due))
        metrics = {**self.counts, **measured}
        record = self.world.reference.record(
            self.spec.run_id, step, step / self.per_epoch, policy, metrics, frozen=self.frozen
        )
        weights = weights_of(policy) if self.wanted(step) else {}
        self.checkpoints[step] = Checkpoint(record, partial(dict, weights))
        self.unfinished.add(self.checkpoints[step])
        phases.at(phases.TRAINING, step, self.steps)
