"""Pre-training the base policy and the one training loop that serves every method."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor import drift, objectives
from rlrazor.experiments.parity_mnist.evaluate import Reference, accuracy, evaluate
from rlrazor.experiments.parity_mnist.methods import (
    PARITY,
    RULES,
    Method,
    Rule,
    correct_outcomes,
    find_method,
    is_correct,
)
from rlrazor.experiments.parity_mnist.optimizers import make_optimizer
from rlrazor.experiments.parity_mnist.policy import (
    PRIOR_TASK,
    DigitPolicy,
    add_low_rank_adapters,
    as_inputs,
    load_weights,
    log_probs,
    weights_of,
)
from rlrazor.experiments.parity_mnist.protection import Past
from rlrazor.experiments.parity_mnist.task import DOTS, FASHION, Task, load_dots, load_task
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.settings import checkpoint_steps
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of

EXPERIMENT = "parity-mnist"
RECIPE = 3  # goes into every spec: raise it when a change to this file changes the bits of a run

PRETRAIN_LR = 1e-3
PRETRAIN_BATCH_SIZE = 64
WARMUP = 0.05  # of an epoch; independent of the number of epochs, so that a short run is a prefix of a long one
TRACED = 500  # images a task that a traced run looks at after every step; all 60,000 would take seconds a step

BASE_PARAMS = ("recipe", "data", "pretrain_size", "pretrain_epochs")
BASE_VARIANTS = ("pretrain_accuracy", DOTS, "precision", "rule")  # only named where they differ from the usual


@dataclass(frozen=True)
class Base:
    """A base policy with what every run on it needs, computed once; `train_logp` (N, V) on the training images."""

    policy: DigitPolicy
    train_logp: Tensor
    reference: Reference


@dataclass(frozen=True)
class Trainer:
    """The callable that `sweep.run` hands to its workers: small to pickle, the data is loaded where it runs."""

    data_dir: Path | None

    def __call__(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Pre-train (`base`) or fine-tune (any other method) as `spec` says."""
        prepare_process()
        task = load_task(self.data_dir)
        if spec.method == BASE:
            return pretrain(spec, task)
        return finetune(spec, task, store)


def prepare_process() -> None:
    """Settings on which speed and bit-identical results depend.

    One thread: results must not depend on the number of jobs, and a matrix product's summation order depends on the
    threads. Denormals to zero: the optimiser's moments of never-lit border pixels decay into denormal numbers, which
    make its step ten times slower (5.7 ms instead of 0.6 ms).
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def base_spec(params: Mapping[str, Any], seed: int) -> RunSpec:
    """The spec of the base run that a fine-tuning run with these params starts from."""
    own = {name: params[name] for name in (*BASE_PARAMS, *BASE_VARIANTS) if name in params}
    return RunSpec(EXPERIMENT, BASE, own, seed)


def pretrain(spec: RunSpec, task: Task) -> Iterator[Checkpoint]:
    """Joint cross-entropy on `pretrain_size` images of each task, ParityMNIST's labels uniform over the correct five.

    The parity labels are drawn anew each epoch, so the base learns the distribution and not one draw of it. Variants:
    `pretrain_accuracy` is the share of correct labels among them (1 by default), `dots` the number of images of a
    further prior task, `precision` that of the weights at the end.
    """
    size, epochs = spec.params["pretrain_size"], spec.params["pretrain_epochs"]
    rng = generator(spec.seed, "pretrain")
    new_rows, prior_inputs, prior_labels = pretraining_images(size, task, rng)
    inputs = torch.cat([task.new_train[new_rows], prior_inputs])
    if count := spec.params.get(DOTS):
        dots = load_dots()
        inputs = torch.cat([inputs, dots.train[:count]])
        prior_labels = torch.cat([prior_labels, dots.train_labels[:count]])
    correct = correct_outcomes(task.new_train_digits[new_rows]).float()
    share = spec.params.get("pretrain_accuracy", 1.0)
    parity_targets = share * correct + (1 - share) * (1 - correct)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, "initialisation"))
        policy = DigitPolicy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=PRETRAIN_LR, weight_decay=0.0, fused=True)
    for _ in range(epochs):
        labels = torch.cat([sample(parity_targets, 1, rng)[:, 0], prior_labels])
        for rows in torch.split(torch.randperm(len(inputs), generator=rng), PRETRAIN_BATCH_SIZE):
            loss = F.cross_entropy(policy(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if spec.params.get("precision") == "bfloat16":
        round_to_bfloat16(policy)
    yield Checkpoint(evaluate(spec, 0, 0.0, policy, task), weights_of(policy))


def finetune(spec: RunSpec, task: Task, store: RunStore) -> Iterator[Checkpoint]:
    """Fine-tune on ParityMNIST by the spec's method; a checkpoint every 1/checkpoints_per_epoch of an epoch.

    One forward pass per image and step, however large the group: the group's labels share the image's logits.
    Variants, which a spec's params need not name: `optimizer` (optimizers.OPTIMIZERS), `precision` of the weights
    ("float32", or "bfloat16": rounded after each step), `staleness` (see Labels), `importance` (whether stale samples
    are importance-weighted), `traced` (a cheap checkpoint of a `Tracer` after every step instead), `rule` (a name in
    methods.RULES: another new task on the same images).
    Raises DivergedError when the policy's outputs are no longer finite.
    """
    params = spec.params
    method, _ = find_method(spec.method)
    base = load_base(base_spec(params, spec.seed), store, task)
    policy = copy.deepcopy(base.policy)
    if method.adapters:
        add_low_rank_adapters(policy, int(params["strength"]), generator(spec.seed, "adapters"))
    optimizer = make_optimizer(params.get("optimizer", "adamw"), policy, params["lr"])
    protect = None
    if method.protection:
        _, inputs, answers = pretraining_images(params["pretrain_size"], task, generator(spec.seed, "pretrain"))
        past = Past(base.policy, inputs, answers, params["strength"], generator(spec.seed, "protection"))
        protect = method.protection(past)
    tracer = Tracer(spec, task, base) if params.get("traced") else None

    rule = RULES[params.get("rule", PARITY)]
    digits, base_train_logp = rule.rename(task.new_train_digits), rule.reorder(base.train_logp)
    steps_per_epoch = math.ceil(len(digits) / params["batch_size"])
    total = steps_per_epoch * params["epochs"]
    due = checkpoint_steps(steps_per_epoch, params["epochs"], params["checkpoints_per_epoch"])
    order_rng = generator(spec.seed, "order")
    batches = [
        rows
        for _ in range(params["epochs"])
        for rows in torch.split(torch.randperm(len(digits), generator=order_rng), params["batch_size"])
    ]
    labels = Labels(spec, method, rule, base, task, store, batches)
    for step, rows in enumerate(batches):
        # index_select, not indexing: half the time of a step's data loading.
        inputs_BI = task.new_train.index_select(0, rows)
        logp_BV = rule.reorder(policy(inputs_BI).log_softmax(dim=-1))
        if method.on_policy and not logp_BV.isfinite().all():
            raise DivergedError(step, step / steps_per_epoch)
        actions_BG, behaviour_logp_BG = labels.of_step(step, policy, logp_BV.detach())
        rewards_BG = is_correct(digits[rows][:, None], actions_BG).float()
        base_logp_BV = base_train_logp[rows]
        logp_BG = logp_BV.gather(1, actions_BG)
        if params.get("importance"):
            assert behaviour_logp_BG is not None
            logp_BG = objectives.importance_weighted(logp_BG, behaviour_logp_BG)
        loss = method.objective(logp_BG, rewards_BG, base_logp_BV.gather(1, actions_BG))
        if params["kl_coef"]:
            loss = loss + params["kl_coef"] * objectives.kl_to_base(logp_BV, base_logp_BV)
        if protect:
            loss = loss + protect(policy, inputs_BI)

        optimizer.set_lr_factor(lr_factor(step, total, steps_per_epoch, params["schedule"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if params.get("precision") == "bfloat16":
            round_to_bfloat16(policy)
        if tracer:
            yield Checkpoint(tracer.record(step + 1, (step + 1) / steps_per_epoch, policy), {})
        elif step + 1 in due:
            record = evaluate(spec, step + 1, (step + 1) / steps_per_epoch, policy, task, base.reference)
            record = replace(record, metrics={**record.metrics, "loss": loss.item()})
            yield Checkpoint(record, {name: tensor.clone() for name, tensor in weights_of(policy).items()})


class Labels:
    """The outputs that a run learns from, step by step: an annotator's, or samples of the policy at some age.

    All are by the rule's names, as methods see them.

    `staleness` k: the samples of step t come from the policy as it was k updates before, the base for t < k. They are
    drawn ahead, since the batches are known: at step t, for the images of step t + k. No old weights are kept.
    """

    def __init__(
        self,
        spec: RunSpec,
        method: Method,
        rule: Rule,
        base: Base,
        task: Task,
        store: RunStore,
        batches: Sequence[Tensor],
    ) -> None:
        self.rule, self.base, self.task, self.batches = rule, base, task, batches
        self.staleness = spec.params.get("staleness", 0)
        self.group_size = spec.params["group_size"]
        self.rng = generator(spec.seed, "sampling")
        self.ahead: deque[tuple[Tensor, Tensor]] = deque()
        self.offline_NG = None
        if not method.on_policy:
            source = teacher_log_probs(spec.params["teacher"], task, store) if method.from_teacher else base.train_logp
            digits, source = rule.rename(task.new_train_digits), rule.reorder(source)
            labels_rng = generator(spec.seed, "labels")
            each = spec.params.get("labels_per_image", 1)
            self.offline_NG = torch.cat(
                [sample(target(digits, source), each, labels_rng) for target in method.targets], dim=1
            )

    def of_step(self, step: int, policy: DigitPolicy, logp_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, G) for a step's batch, and their log-probabilities when they were drawn if a policy drew them.

        `logp_BV` is the present policy's on this batch.
        """
        if self.offline_NG is not None:
            return self.offline_NG[self.batches[step]], None
        if self.staleness == 0:
            return self._drawn_from(logp_BV)
        later = step + self.staleness
        if later < len(self.batches):
            ahead = self.rule.reorder(log_probs(policy, self.task.new_train[self.batches[later]]))
            self.ahead.append(self._drawn_from(ahead))
        if step < self.staleness:
            return self._drawn_from(self.rule.reorder(self.base.train_logp[self.batches[step]]))
        return self.ahead.popleft()

    def _drawn_from(self, logp_BV: Tensor) -> tuple[Tensor, Tensor]:
        actions_BG = sample(logp_BV.exp(), self.group_size, self.rng)
        return actions_BG, logp_BV.gather(1, actions_BG)


class Tracer:
    """Looks at every step of a run: where it points, and what it does to the KL (RL's Razor, Fig. 10).

    Gradients are at the policy before the step, over `TRACED` training images a task: of the prior task's
    cross-entropy, and of the new task's expected error 1 - E[R]. A positive cosine means that the step raises the loss:
    for the prior task, that it forgets. Scores and drift are over as many test images.
    """

    def __init__(self, spec: RunSpec, task: Task, base: Base) -> None:
        self.spec = spec
        self.prior = as_inputs(task.prior_train_images[:TRACED], PRIOR_TASK), task.prior_train_labels[:TRACED]
        self.new = task.new_train[:TRACED], correct_outcomes(task.new_train_digits[:TRACED])
        self.new_test, self.new_digits = task.new_test[:TRACED], task.new_test_digits[:TRACED]
        self.prior_test = task.prior_test[:TRACED], task.prior_test_labels[:TRACED]
        self.before = copy.deepcopy(base.policy)
        self.base_logp = base.reference.new.logp[:TRACED]
        self.logp = self.base_logp

    def record(self, step: int, epoch: float, policy: DigitPolicy) -> Record:
        """The step that has just turned the policy of the last call into this one."""
        logp = log_probs(policy, self.new_test)
        if not logp.isfinite().all():
            raise DivergedError(step, epoch)
        before, after = (
            torch.cat([weight.flatten() for weight in weights_of(moment).values()]) for moment in (self.before, policy)
        )
        update = after - before
        kl_before, kl_after = (drift.forward_kl(self.base_logp, seen).mean().item() for seen in (self.logp, logp))
        metrics = {
            "cos_prior_gradient": _cosine(update, self._gradient(self._prior_loss)),
            "cos_new_gradient": _cosine(update, self._gradient(self._new_error)),
            "kl_change": kl_after - kl_before,
            "kl_of_step": drift.forward_kl(self.logp, logp).mean().item(),
            "update_norm": update.norm().item(),
        }
        self.before.load_state_dict(weights_of(policy))
        self.logp = logp
        return Record(
            run_id=self.spec.run_id,
            step=step,
            epoch=epoch,
            new=is_correct(self.new_digits, logp.argmax(dim=1)).double().mean().item(),
            prior={FASHION: accuracy(log_probs(policy, self.prior_test[0]), self.prior_test[1])},
            drift=drift.measure(self.base_logp, logp),
            metrics=metrics,
        )

    def _prior_loss(self) -> Tensor:
        return F.cross_entropy(self.before(self.prior[0]), self.prior[1])

    def _new_error(self) -> Tensor:
        probs: Tensor = self.before(self.new[0]).softmax(dim=1)
        return 1 - (probs * self.new[1]).sum(dim=1).mean()

    def _gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss(), list(self.before.parameters()))])


def _cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of them is: a step that moves nothing points nowhere."""
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0


@torch.no_grad()
def round_to_bfloat16(policy: DigitPolicy) -> None:
    """Give every weight the nearest value that bfloat16 can hold, as if it were stored in it."""
    for weight in policy.parameters():
        weight.copy_(weight.bfloat16())


_last_base: dict[Path, Base] = {}


def load_base(spec: RunSpec, store: RunStore, task: Task) -> Base:
    """The base policy of a finished base run; the last one is kept, since a sweep goes through the runs of one base."""
    path = store.weights_path(spec, 0)
    if path not in _last_base:
        policy = load_weights(store.load_weights(spec, 0))
        _last_base.clear()
        _last_base[path] = Base(policy, log_probs(policy, task.new_train), Reference.of(policy, task))
    return _last_base[path]


def teacher_log_probs(teacher: Mapping[str, Any], task: Task, store: RunStore) -> Tensor:
    """Log-probabilities (N, V) of the teacher's checkpoint on the training images."""
    spec = RunSpec(EXPERIMENT, teacher["method"], teacher["params"], teacher["seed"])
    return log_probs(load_weights(store.load_weights(spec, teacher["step"])), task.new_train)


def pretraining_images(size: int, task: Task, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What a base is pre-trained on: the new task's rows (N,), the prior task's inputs (N, 785) and labels (N,).

    The first that are drawn from a fresh generator(seed, "pretrain"), so that a run can have its base's images again.
    """
    new_rows = torch.randperm(len(task.new_train), generator=rng)[:size]
    prior_rows = torch.randperm(len(task.prior_train_images), generator=rng)[:size]
    return new_rows, as_inputs(task.prior_train_images[prior_rows], PRIOR_TASK), task.prior_train_labels[prior_rows]


def sample(probs_NV: Tensor, group_size: int, rng: Generator) -> Tensor:
    """Draw `group_size` outcomes per row, with replacement: (N, G) int64."""
    return torch.multinomial(probs_NV, group_size, replacement=True, generator=rng)


def lr_factor(step: int, total: int, steps_per_epoch: int, schedule: str) -> float:
    """The learning rate of 0-based `step` as a fraction of the peak: linear warm-up, then constant or cosine to 0."""
    warmup = max(1, round(WARMUP * steps_per_epoch))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def generator(seed: int, purpose: str) -> Generator:
    """A random stream of its own for each purpose, so that methods share data order and labels at equal seed."""
    return Generator().manual_seed(seed_of(seed, purpose))
