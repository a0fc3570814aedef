"""Pre-training the base policy and the one training loop that serves every method."""

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor import drift, objectives
from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.methods import correct_outcomes, find_method, is_correct
from rlrazor.experiments.parity_mnist.policy import NEW_TASK, PRIOR_TASK, DigitPolicy, as_inputs, log_probs
from rlrazor.records import BASE, Record, RunSpec
from rlrazor.store import Checkpoint, RunStore
from rlrazor.sweep import DivergedError

EXPERIMENT = "parity-mnist"
RECIPE = 1  # goes into every spec: raise it when a change to this file changes the bits of a run
PRIOR_NAME = "fashion_mnist"

PRETRAIN_LR = 1e-3
PRETRAIN_BATCH_SIZE = 64
WARMUP = 0.05  # of an epoch; independent of the number of epochs, so that a short run is a prefix of a long one


@dataclass(frozen=True)
class Task:
    """The two tasks in memory, as inputs (N, 785) float32 and labels (N,) int64.

    FashionMNIST's training images, of which pre-training sees a few hundred, stay uint8 (N, 28, 28): 47 MB, not 188.
    """

    new_train: Tensor
    new_train_digits: Tensor
    new_test: Tensor
    new_test_digits: Tensor
    prior_train_images: Tensor
    prior_train_labels: Tensor
    prior_test: Tensor
    prior_test_labels: Tensor


@lru_cache(maxsize=1)
def load_task(data_dir: Path | None) -> Task:
    """ParityMNIST and FashionMNIST, loaded once per process."""
    digits, fashion = data.load("mnist", data_dir), data.load("fashion-mnist", data_dir)
    return Task(
        new_train=as_inputs(digits.train_images, NEW_TASK),
        new_train_digits=digits.train_labels,
        new_test=as_inputs(digits.test_images, NEW_TASK),
        new_test_digits=digits.test_labels,
        prior_train_images=fashion.train_images,
        prior_train_labels=fashion.train_labels,
        prior_test=as_inputs(fashion.test_images, PRIOR_TASK),
        prior_test_labels=fashion.test_labels,
    )


@dataclass(frozen=True)
class Base:
    """A base policy with what every run on it needs: its log-probabilities on the new task, computed once."""

    policy: DigitPolicy
    train_logp: Tensor
    test_logp: Tensor


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
    return RunSpec(
        EXPERIMENT, BASE, {k: params[k] for k in ("recipe", "data", "pretrain_size", "pretrain_epochs")}, seed
    )


def pretrain(spec: RunSpec, task: Task) -> Iterator[Checkpoint]:
    """Joint cross-entropy on `pretrain_size` images of each task, ParityMNIST's labels uniform over the correct five.

    The parity labels are drawn anew each epoch, so the base learns the distribution and not one draw of it.
    """
    size, epochs = spec.params["pretrain_size"], spec.params["pretrain_epochs"]
    rng = generator(spec.seed, "pretrain")
    new_rows = torch.randperm(len(task.new_train), generator=rng)[:size]
    prior_rows = torch.randperm(len(task.prior_train_images), generator=rng)[:size]
    inputs = torch.cat([task.new_train[new_rows], as_inputs(task.prior_train_images[prior_rows], PRIOR_TASK)])
    parity_targets = correct_outcomes(task.new_train_digits[new_rows]).float()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, "initialisation"))
        policy = DigitPolicy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=PRETRAIN_LR, weight_decay=0.0, fused=True)
    for _ in range(epochs):
        labels = torch.cat([sample(parity_targets, 1, rng)[:, 0], task.prior_train_labels[prior_rows]])
        for rows in torch.split(torch.randperm(len(inputs), generator=rng), PRETRAIN_BATCH_SIZE):
            loss = F.cross_entropy(policy(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test_logp = log_probs(policy, task.new_test)
    record = evaluate(spec, 0, 0.0, policy, task, test_logp)
    yield Checkpoint(record, policy.state_dict())


def finetune(spec: RunSpec, task: Task, store: RunStore) -> Iterator[Checkpoint]:
    """Fine-tune on ParityMNIST by the spec's method; a checkpoint every 1/checkpoints_per_epoch of an epoch.

    One forward pass per image and step, however large the group: the group's labels share the image's logits.
    Raises DivergedError when the policy's outputs are no longer finite.
    """
    params = spec.params
    method, _ = find_method(spec.method)
    base = load_base(base_spec(params, spec.seed), store, task)
    policy = copy.deepcopy(base.policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=params["lr"], weight_decay=0.0, fused=True)

    digits = task.new_train_digits
    offline_NG = None
    if not method.on_policy:
        source = teacher_log_probs(params["teacher"], task, store) if method.from_teacher else base.train_logp
        labels_rng = generator(spec.seed, "labels")
        offline_NG = torch.cat([sample(target(digits, source), 1, labels_rng) for target in method.targets], dim=1)

    steps_per_epoch = math.ceil(len(digits) / params["batch_size"])
    total = steps_per_epoch * params["epochs"]
    due = checkpoint_steps(steps_per_epoch, params["epochs"], params["checkpoints_per_epoch"])
    order_rng, sampling_rng = generator(spec.seed, "order"), generator(spec.seed, "sampling")
    step, loss = 0, torch.zeros(())
    for _ in range(params["epochs"]):
        for rows in torch.split(torch.randperm(len(digits), generator=order_rng), params["batch_size"]):
            # index_select, not indexing: half the time of a step's data loading.
            logp_BV = policy(task.new_train.index_select(0, rows)).log_softmax(dim=-1)
            if offline_NG is not None:
                actions_BG = offline_NG[rows]
            else:
                if not logp_BV.isfinite().all():
                    raise DivergedError(step, step / steps_per_epoch)
                actions_BG = sample(logp_BV.detach().exp(), params["group_size"], sampling_rng)
            rewards_BG = is_correct(digits[rows][:, None], actions_BG).float()
            base_logp_BV = base.train_logp[rows]
            loss = method.objective(logp_BV.gather(1, actions_BG), rewards_BG, base_logp_BV.gather(1, actions_BG))
            if params["kl_coef"]:
                loss = loss + params["kl_coef"] * objectives.kl_to_base(logp_BV, base_logp_BV)

            for group in optimizer.param_groups:
                group["lr"] = params["lr"] * lr_factor(step, total, steps_per_epoch, params["schedule"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step in due:
                record = evaluate(spec, step, step / steps_per_epoch, policy, task, base.test_logp)
                yield Checkpoint(record, {name: tensor.clone() for name, tensor in policy.state_dict().items()})


def evaluate(spec: RunSpec, step: int, epoch: float, policy: DigitPolicy, task: Task, base_logp: Tensor) -> Record:
    """Greedy accuracy on both test sets, and the drift from the base on the new task's 10,000 test images.

    `new_expected` is the mean probability of a correct label: the accuracy of a policy that samples. Raises
    DivergedError when an output is not finite.
    """
    logp = log_probs(policy, task.new_test)
    prior_logp = log_probs(policy, task.prior_test)
    if not (logp.isfinite().all() and prior_logp.isfinite().all()):
        raise DivergedError(step, epoch)
    correct = correct_outcomes(task.new_test_digits)
    return Record(
        run_id=spec.run_id,
        step=step,
        epoch=epoch,
        new=is_correct(task.new_test_digits, logp.argmax(dim=1)).double().mean().item(),
        prior={PRIOR_NAME: (prior_logp.argmax(dim=1) == task.prior_test_labels).double().mean().item()},
        drift=drift.measure(base_logp, logp),
        metrics={"new_expected": (logp.double().exp() * correct).sum(dim=1).mean().item()},
    )


_last_base: dict[Path, Base] = {}


def load_base(spec: RunSpec, store: RunStore, task: Task) -> Base:
    """The base policy of a finished base run; the last one is kept, since a sweep goes through the runs of one base."""
    path = store.weights_path(spec, 0)
    if path not in _last_base:
        policy = DigitPolicy()
        policy.load_state_dict(store.load_weights(spec, 0))
        _last_base.clear()
        _last_base[path] = Base(policy, log_probs(policy, task.new_train), log_probs(policy, task.new_test))
    return _last_base[path]


def teacher_log_probs(teacher: Mapping[str, Any], task: Task, store: RunStore) -> Tensor:
    """Log-probabilities (N, V) of the teacher's checkpoint on the training images."""
    spec = RunSpec(EXPERIMENT, teacher["method"], teacher["params"], teacher["seed"])
    policy = DigitPolicy()
    policy.load_state_dict(store.load_weights(spec, teacher["step"]))
    return log_probs(policy, task.new_train)


def sample(probs_NV: Tensor, group_size: int, rng: Generator) -> Tensor:
    """Draw `group_size` outcomes per row, with replacement: (N, G) int64."""
    return torch.multinomial(probs_NV, group_size, replacement=True, generator=rng)


def checkpoint_steps(steps_per_epoch: int, epochs: int, per_epoch: int) -> set[int]:
    """The steps after which a checkpoint is measured: evenly spaced, the last step of each epoch among them."""
    return {round((i + 1) * steps_per_epoch / per_epoch) for i in range(epochs * per_epoch)} - {0}


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


def seed_of(seed: int, purpose: str) -> int:
    """A 63-bit seed that depends on both arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
