"""Pre-training the base policy and the one training loop that serves every method."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor import objectives
from rlrazor.experiments.parity_mnist.evaluate import Base, Reference, evaluate
from rlrazor.experiments.parity_mnist.methods import PARITY, RULES, Method, correct_outcomes, find_method
from rlrazor.experiments.parity_mnist.optimizers import make_optimizer
from rlrazor.experiments.parity_mnist.policy import (
    PIXELS,
    PRIOR_TASK,
    DigitPolicy,
    add_low_rank_adapters,
    as_inputs,
    load_weights,
    log_probs,
    weights_of,
)
from rlrazor.experiments.parity_mnist.probes import Probes, inputs_of
from rlrazor.experiments.parity_mnist.protection import Past, Term
from rlrazor.experiments.parity_mnist.sampling import Labels, TrainingInputs, generator, offline_labels, sample
from rlrazor.experiments.parity_mnist.task import DOTS, PROBE_IMAGES, Task, load_dots
from rlrazor.experiments.parity_mnist.tracer import Tracer
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.settings import checkpoint_steps, lr_factor
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of

PRETRAIN_LR = 1e-3
PRETRAIN_BATCH_SIZE = 64

Loss = Callable[[int, DigitPolicy], Tensor]
"""(step, policy) -> what the policy is to descend at that step."""


def pretrain(spec: RunSpec, task: Task) -> Iterator[Checkpoint]:
    """Joint cross-entropy on `pretrain_size` images of each task, ParityMNIST's labels uniform over the correct five.

    The parity labels are drawn anew each epoch, so the base learns the distribution and not one draw of it. Variants:
    `pretrain_accuracy` is the share of correct labels among them (1 by default), `dots` the number of images of a
    further prior task, `precision` that of the weights at the end.
    """
    size, rng = spec.params["pretrain_size"], generator(spec.seed, "pretrain")
    new_rows, prior_inputs, prior_labels = pretraining_images(size, task, rng)
    inputs = torch.cat([task.new_train[new_rows], prior_inputs])
    if count := spec.params.get(DOTS):
        dots = load_dots()
        inputs = torch.cat([inputs, dots.train[:count]])
        prior_labels = torch.cat([prior_labels, dots.train_labels[:count]])
    correct = correct_outcomes(task.new_train_digits[new_rows]).float()
    share = spec.params.get("pretrain_accuracy", 1.0)
    policy = joint_base(spec, inputs, share * correct + (1 - share) * (1 - correct), prior_labels, rng)
    if spec.params.get("precision") == "bfloat16":
        round_to_bfloat16(policy)
    yield Checkpoint(evaluate(spec, 0, 0.0, policy, task), partial(weights_of, policy))


def joint_base(spec: RunSpec, inputs: Tensor, targets_NV: Tensor, prior_labels: Tensor, rng: Generator) -> DigitPolicy:
    """A policy after `pretrain_epochs` of cross-entropy on these inputs, the new tasks' first, then the prior ones'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, "initialisation"))
        policy = DigitPolicy(inputs.shape[1] - PIXELS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=PRETRAIN_LR, weight_decay=0.0, fused=True)
    for _ in range(spec.params["pretrain_epochs"]):
        labels = torch.cat([sample(targets_NV, 1, rng)[:, 0], prior_labels])
        for rows in torch.split(torch.randperm(len(inputs), generator=rng), PRETRAIN_BATCH_SIZE):
            loss = F.cross_entropy(policy(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy


def finetune(spec: RunSpec, task: Task, store: RunStore) -> Iterator[Checkpoint]:
    """Fine-tune on ParityMNIST by the spec's method; a checkpoint every 1/checkpoints_per_epoch of an epoch.

    One forward pass per image and step, however large the group: the group's labels share the image's logits.
    Variants, which a spec need not name: `optimizer` (optimizers.OPTIMIZERS), `precision` of the weights ("float32", or
    "bfloat16": rounded after each step), `staleness` (see Labels), `importance` (whether stale samples are
    importance-weighted), `traced` (a cheap checkpoint of a `Tracer` after every step instead), `probes` (whether KL is
    also measured on inputs that stand for the prior task), `rule` (a name in methods.RULES: another new task on the
    same images).
    Raises DivergedError when the policy's outputs are no longer finite.
    """
    params, (method, _) = spec.params, find_method(spec.method)
    assert spec.starts_from is not None
    base = load_base(spec.starts_from, store, task)
    policy = copy.deepcopy(base.policy)
    if method.adapters:
        add_low_rank_adapters(policy, int(params["strength"]), generator(spec.seed, "adapters"))
    tracer = Tracer(spec, task, base) if params.get("traced") else None
    probes = Probes.of(base.policy, probes_of(spec, task)) if params.get("probes") else None
    loss_of = make_loss(spec, method, training_inputs_of(spec, base, task, store), protection_of(spec, base, task))
    for step, epoch, loss, due in updates(spec, policy, len(task.new_train), loss_of):
        if tracer:
            yield Checkpoint(tracer.record(step, epoch, policy), partial(copied, policy))
        elif due:
            record = evaluate(spec, step, epoch, policy, task, base.reference)
            probed = probes.measure(policy, step, epoch) if probes else {}
            record = replace(record, drift={**record.drift, **probed}, metrics={**record.metrics, "loss": loss.item()})
            yield Checkpoint(record, partial(copied, policy))


def updates(
    spec: RunSpec, policy: DigitPolicy, images: int, loss_of: Loss
) -> Iterator[tuple[int, float, Tensor, bool]]:
    """Update the policy, over and over: after each step its number from 1, the epoch, the loss, and whether it is due.

    Due are the checkpoints to be measured.
    """
    params = spec.params
    optimizer = make_optimizer(params.get("optimizer", "adamw"), policy, params["lr"])
    steps_per_epoch = math.ceil(images / params["batch_size"])
    total = steps_per_epoch * params["epochs"]
    due = checkpoint_steps(steps_per_epoch, params["epochs"], params["checkpoints_per_epoch"])
    for step in range(total):
        loss = loss_of(step, policy)
        optimizer.set_lr_factor(lr_factor(step, total, steps_per_epoch, params["schedule"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if spec.settings.get("precision") == "bfloat16":
            round_to_bfloat16(policy)
        yield step + 1, (step + 1) / steps_per_epoch, loss, step + 1 in due


def training_inputs_of(spec: RunSpec, base: Base, task: Task, store: RunStore) -> TrainingInputs:
    """What a run on ParityMNIST learns from."""
    method, _ = find_method(spec.method)
    rule = RULES[spec.settings.get("rule", PARITY)]
    correct = correct_outcomes(rule.rename(task.new_train_digits))
    offline = None
    if not method.on_policy:
        source = base.train_logp if spec.teacher is None else teacher_log_probs(spec.teacher, task, store)
        offline = offline_labels(spec, method, correct, rule.reorder(source))
    base_logp = rule.reorder(base.train_logp)
    return TrainingInputs(task.new_train, correct, base_logp, base_logp, offline, rule)


def make_loss(spec: RunSpec, method: Method, given: TrainingInputs, protect: Term | None) -> Loss:
    """The method's objective on the batch of each step, and what the run adds to it: a KL penalty, a protection."""
    params, images = spec.params, len(given.inputs)
    batches = batches_of(spec, images)
    labels = Labels(spec, given, batches)

    def loss_of(step: int, policy: DigitPolicy) -> Tensor:
        rows = batches[step]
        # index_select, not indexing: half the time of a step's data loading.
        inputs_BI = given.inputs.index_select(0, rows)
        logp_BV = given.rule.reorder(policy(inputs_BI).log_softmax(dim=-1))
        if method.on_policy and not logp_BV.isfinite().all():
            raise DivergedError(step, step / math.ceil(images / params["batch_size"]))
        actions_BG, behaviour_logp_BG = labels.of_step(step, policy, logp_BV.detach())
        rewards_BG = given.correct[rows].gather(1, actions_BG).float()
        base_logp_BV = given.base_logp[rows]
        logp_BG = logp_BV.gather(1, actions_BG)
        if params.get("importance"):
            assert behaviour_logp_BG is not None
            logp_BG = objectives.importance_weighted(logp_BG, behaviour_logp_BG)
        loss = method.objective(logp_BG, rewards_BG, base_logp_BV.gather(1, actions_BG))
        if params["kl_coef"]:
            loss = loss + params["kl_coef"] * objectives.kl_to_base(logp_BV, given.anchor_logp[rows])
        return loss + protect(policy, inputs_BI) if protect else loss

    return loss_of


def batches_of(spec: RunSpec, images: int) -> Sequence[Tensor]:
    """The rows of each step's images: every epoch goes over all of them, in an order of its own."""
    rng = generator(spec.seed, "order")
    return [
        rows
        for _ in range(spec.params["epochs"])
        for rows in torch.split(torch.randperm(images, generator=rng), spec.params["batch_size"])
    ]


def protection_of(spec: RunSpec, base: Base, task: Task) -> Term | None:
    """The method's term against forgetting, if it has one, made from what is still there of the past."""
    method, _ = find_method(spec.method)
    if method.protection is None:
        return None
    rng = generator(spec.seed, "pretrain")
    _, inputs, answers = pretraining_images(spec.settings["pretrain_size"], task, rng)
    return method.protection(
        Past(base.policy, inputs, answers, spec.params["strength"], generator(spec.seed, "protection"))
    )


def copied(policy: DigitPolicy) -> dict[str, Tensor]:
    """The weights as they are now."""
    return {name: tensor.clone() for name, tensor in weights_of(policy).items()}


@torch.no_grad()
def round_to_bfloat16(policy: DigitPolicy) -> None:
    """Give every weight the nearest value that bfloat16 can hold, as if it were stored in it."""
    for weight in policy.parameters():
        weight.copy_(weight.bfloat16())


_last_base: dict[Path, Base] = {}


def load_base(of: Ancestor, store: RunStore, task: Task) -> Base:
    """The policy that runs start from; the last one is kept, since a sweep goes through the runs of one base."""
    path = store.weights_path(of.spec, of.step)
    if path not in _last_base:
        policy = load_weights(store.load_weights(of.spec, of.step))
        _last_base.clear()
        _last_base[path] = Base(policy, log_probs(policy, task.new_train), Reference.of(policy, task))
    return _last_base[path]


def teacher_log_probs(teacher: Ancestor, task: Task, store: RunStore) -> Tensor:
    """Log-probabilities (N, V) of the teacher's checkpoint on the training images."""
    return log_probs(load_weights(store.load_weights(teacher.spec, teacher.step)), task.new_train)


def pretraining_images(size: int, task: Task, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What a base is pre-trained on: the new task's rows (N,), the prior task's inputs (N, 785) and labels (N,).

    The first that are drawn from a fresh generator(seed, "pretrain"), so that a run can have its base's images again.
    """
    new_rows = torch.randperm(len(task.new_train), generator=rng)[:size]
    prior_rows = torch.randperm(len(task.prior_train_images), generator=rng)[:size]
    return new_rows, as_inputs(task.prior_train_images[prior_rows], PRIOR_TASK), task.prior_train_labels[prior_rows]


def probes_of(spec: RunSpec, task: Task) -> Mapping[str, Tensor]:
    """The probes of a run, one of prior images that its base has not seen: those after `pretraining_images`."""
    rng = generator(spec.seed, "pretrain")
    torch.randperm(len(task.new_train), generator=rng)
    rows = torch.randperm(len(task.prior_train_images), generator=rng)[spec.settings["pretrain_size"] :]
    return inputs_of(task, task.prior_train_images[rows[:PROBE_IMAGES]])
