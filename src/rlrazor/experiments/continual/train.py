"""Pre-training on all tasks, and a stage: one task, or several at once, until it is learned."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlrazor.experiments.continual.evaluate import earlier_of, measure, outputs_of, tasks_of
from rlrazor.experiments.continual.methods import TO_BASE, find_method
from rlrazor.experiments.continual.tasks import Questions, drawn, load_tests, pretraining
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, load_weights, log_probs, weights_of
from rlrazor.experiments.parity_mnist.protection import Past, Term
from rlrazor.experiments.parity_mnist.sampling import Lesson, generator, offline_labels, sample
from rlrazor.experiments.parity_mnist.task import FASHION
from rlrazor.experiments.parity_mnist.train import copied, joint_base, make_loss, updates
from rlrazor.runs.records import RunSpec
from rlrazor.runs.store import Checkpoint, RunStore


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
    lesson, policy = lesson_of(spec, data_dir, base, before), copy.deepcopy(before)
    origins = outputs_of(base, tests), outputs_of(before, tests)
    loss_of = make_loss(spec, method, lesson, protection_of(spec, data_dir, before))
    for step, epoch, loss, due in updates(spec, policy, len(lesson.inputs), loss_of):
        if due:
            record = measure(spec, (step, epoch), outputs_of(policy, tests), tests, origins)
            reached = record.new >= spec.params["until"]
            metrics = {**record.metrics, "reached": float(reached), "loss": loss.item()}
            yield Checkpoint(replace(record, metrics=metrics), partial(copied, policy))
            if reached:
                return


def lesson_of(spec: RunSpec, data_dir: Path | None, base: DigitPolicy, before: DigitPolicy) -> Lesson:
    """What a stage learns from; every stage of a seed sees the same images, under its own indicator."""
    (method, penalty), size = find_method(spec.method), spec.params["train_size"]
    asked = Questions.join(drawn(task, size, generator(spec.seed, "images"), data_dir) for task in tasks_of(spec))
    before_logp = log_probs(before, asked.inputs)
    anchor_logp = log_probs(base, asked.inputs) if penalty == TO_BASE else before_logp
    offline = None if method.on_policy else offline_labels(spec, method, asked.correct, before_logp)
    return Lesson(asked.inputs, asked.correct, before_logp, anchor_logp, offline)


def protection_of(spec: RunSpec, data_dir: Path | None, before: DigitPolicy) -> Term | None:
    """The method's term against forgetting: the images of pre-training, of the prior task and the earlier ones."""
    method, _ = find_method(spec.method)
    if method.protection is None:
        return None
    past = pretraining([FASHION, *earlier_of(spec)], spec.settings["pretrain_size"], spec.seed, data_dir)
    rng = generator(spec.seed, "protection")
    answers = sample(method.targets[0](past.correct, log_probs(before, past.inputs)), 1, rng)[:, 0]
    return method.protection(Past(before, past.inputs, answers, spec.params["strength"], rng))
