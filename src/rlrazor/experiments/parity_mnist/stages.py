"""Sequences of tasks on images: splits of MNIST's digits, each told by an indicator, after FashionMNIST.

Methods are ParityMNIST's, whose targets and losses hold for any split of the digits, with two penalties. In a stage
"the base" of a method, which the oracle's and KL-DPG's targets are made of, is the policy that the stage starts from. A
penalty holds a run to the base of all stages (`+kl`), or to the stage before (`+kl-before`).
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rlrazor.drift import forward_kl, reverse_kl
from rlrazor.errors import RazorError
from rlrazor.experiments.continual.config import PENALTIES, TO_BASE, TO_BEFORE, parts_of
from rlrazor.experiments.continual.experiment import Continual
from rlrazor.experiments.continual.measures import (
    ON_PRIOR,
    SINCE_BEFORE,
    drift_of,
    earlier_of,
    has_reached,
    scores_of,
    tasks_of,
)
from rlrazor.experiments.parity_mnist import cost, data, sequences
from rlrazor.experiments.parity_mnist.methods import METHODS, Method
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, load_weights, log_probs, weights_of
from rlrazor.experiments.parity_mnist.protection import Past, Term
from rlrazor.experiments.parity_mnist.sampling import TrainingInputs, generator, offline_labels, sample
from rlrazor.experiments.parity_mnist.sequences import CORE_METHODS, ImageSequences
from rlrazor.experiments.parity_mnist.splits import Questions, drawn, load_tests, pretraining
from rlrazor.experiments.parity_mnist.task import FASHION
from rlrazor.experiments.parity_mnist.train import copied, joint_base, make_loss, updates
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError

Outputs = Mapping[str, Tensor]
"""Task -> a policy's log-probabilities on its test inputs."""
MEASURES = {"kl_forward": forward_kl, "kl_reverse": reverse_kl}
DRIFT = tuple(kl + on + since for since in ("", SINCE_BEFORE) for on in ("", ON_PRIOR) for kl in MEASURES)
"""The columns of drift that every record has. More: `_on_TASK` of each task, and `_on_earlier`, their mean so far."""


@dataclass(frozen=True)
class Images(Continual):
    """The experiment, on the images in `data_dir`."""

    data_dir: Path | None = None

    config: ClassVar[type[ImageSequences]] = ImageSequences
    presets: ClassVar[Mapping[str, ImageSequences]] = sequences.PRESETS
    methods: ClassVar[Mapping[str, Method]] = {name: METHODS[name] for name in (*CORE_METHODS, "replay", "ewc")}

    def bases(self, config: ImageSequences, store: RunStore | None) -> list[RunSpec]:
        """Pre-trained on all tasks and the prior one."""
        return config.base_specs("" if store is None else data.fingerprint(self.data_dir))

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Pre-train (`base`) or train a stage, on one thread: results must not depend on the number of jobs."""
        prepare_process(1)
        return pretrain(spec, self.data_dir) if spec.method == BASE else learn(spec, self.data_dir, store)

    def cost(self, spec: RunSpec) -> Cost:
        """See `Continual.cost`."""
        return cost.of(spec, spec.params.get("train_size", 0) * len(tasks_of(spec)))

    def trial(self, config: ImageSequences) -> Trial:
        """See `Continual.trial`."""
        return cost.trial(config, config.test_size * (len(config.tasks) + 1))

    def describe(self, config: ImageSequences) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        return {
            "new_task": "the stage’s task",
            "prior_task": "FashionMNIST",
            "labels": {name: label_of(name) for name in config.methods},
            "data": data.fingerprint(self.data_dir),
            "drift": list(DRIFT),
        }


def find_method(name: str) -> tuple[Method, str]:
    """The method of that name, and its penalty, one of PENALTIES. Raises RazorError, with the names, for another."""
    plain, penalty = parts_of(name)
    if plain not in Images.methods or penalty not in PENALTIES:
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {', '.join(Images.methods)}; each also with '{TO_BASE}' for a KL "
            f"penalty to the base, or '{TO_BEFORE}' for one to the stage before."
        )
    return METHODS[plain], penalty


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    method, penalty = find_method(name)
    return method.label + PENALTIES[penalty]


def pretrain(spec: RunSpec, data_dir: Path | None) -> Iterator[Checkpoint]:
    """Joint cross-entropy on `pretrain_size` images of each task, with any of the correct answers at random."""
    tasks, size = tasks_of(spec), spec.params["pretrain_size"]
    new, prior = (pretraining(names, size, spec.seed, data_dir) for names in (tasks, [FASHION]))
    inputs, labels = Questions.join([new, prior]).inputs, prior.correct.int().argmax(dim=1)
    policy = joint_base(spec, inputs, new.correct.float(), labels, generator(spec.seed, "pretrain"))
    tests = load_tests(tuple(tasks), spec.params["test_size"], data_dir)
    said = outputs_of(policy, tests)
    yield Checkpoint(measure(spec, (0, 0.0), said, tests, (said, said)), partial(weights_of, policy))


def learn(spec: RunSpec, data_dir: Path | None, store: RunStore) -> Iterator[Checkpoint]:
    """Train a run's tasks from where it starts; it ends at its first checkpoint with a score of at least `until`.

    A metric of each record is whether it has `reached` that; a run that never does ends with its last epoch.
    """
    method, _ = find_method(spec.method)
    tests = load_tests(tuple(tasks_of(spec.root)), spec.settings["test_size"], data_dir)
    base, before = (load_weights(store.load_weights(of.spec, of.step)) for of in (spec.chain[0], spec.chain[-1]))
    given, policy = training_inputs_of(spec, data_dir, base, before), copy.deepcopy(before)
    origins = outputs_of(base, tests), outputs_of(before, tests)
    loss_of = make_loss(spec, method, given, protection_of(spec, data_dir, before))
    for step, epoch, loss, due in updates(spec, policy, len(given.inputs), loss_of):
        if due:
            record = measure(spec, (step, epoch), outputs_of(policy, tests), tests, origins)
            reached = has_reached(spec, record)
            metrics = {**record.metrics, "reached": float(reached), "loss": loss.item()}
            yield Checkpoint(replace(record, metrics=metrics), partial(copied, policy))
            if reached:
                return


def outputs_of(policy: DigitPolicy, tests: Mapping[str, Questions]) -> Outputs:
    """What a policy says to all tasks."""
    return {task: log_probs(policy, asked.inputs) for task, asked in tests.items()}


def measure(
    spec: RunSpec,
    at: tuple[int, float],
    said: Outputs,
    tests: Mapping[str, Questions],
    origins: tuple[Outputs, Outputs],
) -> Record:
    """The record `at` (step, epoch) of a policy that `said` this; `origins`: what the base says, and the stage before.

    Raises DivergedError where an output is not finite.
    """
    if not all(logp.isfinite().all() for logp in said.values()):
        raise DivergedError(*at)
    drifted: dict[str, float] = {}
    for since, origin in zip(("", SINCE_BEFORE), origins, strict=True):
        for name, distance in MEASURES.items():
            each = {task: distance(origin[task].double(), said[task].double()).mean().item() for task in tests}
            on_prior = each.pop(FASHION)
            drifted |= drift_of(spec, name, since, each, on_prior)
    scores = {task: asked.score(said[task]) for task, asked in tests.items()}
    new, metrics = scores_of(spec, scores)
    return Record(spec.run_id, *at, new, {FASHION: scores[FASHION]}, drifted, metrics)


def training_inputs_of(spec: RunSpec, data_dir: Path | None, base: DigitPolicy, before: DigitPolicy) -> TrainingInputs:
    """What a stage learns from; every stage of a seed sees the same images, under its own indicator."""
    (method, penalty), size = find_method(spec.method), spec.params["train_size"]
    asked = Questions.join(drawn(task, size, generator(spec.seed, "images"), data_dir) for task in tasks_of(spec))
    before_logp = log_probs(before, asked.inputs)
    anchor_logp = log_probs(base, asked.inputs) if penalty == TO_BASE else before_logp
    offline = None if method.on_policy else offline_labels(spec, method, asked.correct, before_logp)
    return TrainingInputs(asked.inputs, asked.correct, before_logp, anchor_logp, offline)


def protection_of(spec: RunSpec, data_dir: Path | None, before: DigitPolicy) -> Term | None:
    """The method's term against forgetting: the images of pre-training, of the prior task and the earlier ones."""
    method, _ = find_method(spec.method)
    if method.protection is None:
        return None
    past = pretraining([FASHION, *earlier_of(spec)], spec.settings["pretrain_size"], spec.seed, data_dir)
    rng = generator(spec.seed, "protection")
    answers = sample(method.targets[0](past.correct, log_probs(before, past.inputs)), 1, rng)[:, 0]
    return method.protection(Past(before, past.inputs, answers, spec.params["strength"], rng))
