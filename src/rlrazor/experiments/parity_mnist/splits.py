"""The tasks: splits of MNIST's digits, told apart by the indicators beside the pixels, and FashionMNIST before them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.policy import OUTCOMES, as_inputs
from rlrazor.experiments.parity_mnist.sampling import generator
from rlrazor.experiments.parity_mnist.sequences import SPLITS
from rlrazor.experiments.parity_mnist.task import FASHION

ALL = (*SPLITS, FASHION)  # in the order of their indicators
load = lru_cache(maxsize=2)(data.load)


@dataclass(frozen=True)
class Questions:
    """Of a task: inputs (N, 790), and which of the ten answers are correct to each, (N, 10)."""

    inputs: Tensor
    correct: Tensor

    @classmethod
    def of(cls, task: str, images: Tensor, labels: Tensor) -> "Questions":
        """What the task asks about these images: one indicator is 1, all others 0."""
        return cls(as_inputs(images, *(float(task == one) for one in ALL)), correct_answers(task, labels))

    @classmethod
    def join(cls, parts: Iterable["Questions"]) -> "Questions":
        """Of several tasks, one after another."""
        inputs, correct = zip(*((part.inputs, part.correct) for part in parts), strict=True)
        return cls(torch.cat(inputs), torch.cat(correct))

    def score(self, logp_NV: Tensor) -> float:
        """The share of questions whose likeliest answer is correct."""
        return self.correct.gather(1, logp_NV.argmax(dim=1, keepdim=True)).double().mean().item()


def correct_answers(task: str, labels: Tensor) -> Tensor:
    """Mask (N, 10): the digits of the label's own class; of FashionMNIST, the label alone."""
    if task == FASHION:
        return F.one_hot(labels, OUTCOMES).bool()
    inside = torch.tensor([digit in SPLITS[task] for digit in range(OUTCOMES)])
    return inside[labels][:, None] == inside


def images_of(task: str, data_dir: Path | None) -> data.Dataset:
    """What a task asks about. Raises RazorError as `data.load` does."""
    return load("fashion-mnist" if task == FASHION else "mnist", data_dir)


def drawn(task: str, count: int, rng: Generator, data_dir: Path | None) -> Questions:
    """About `count` training images, drawn from the stream."""
    images = images_of(task, data_dir)
    rows = torch.randperm(len(images.train_labels), generator=rng)[:count]
    return Questions.of(task, images.train_images[rows], images.train_labels[rows])


def pretraining(tasks: Iterable[str], count: int, seed: int, data_dir: Path | None) -> Questions:
    """What a base learns from; a task's are the same whatever the others are, so that a run can have them again."""
    return Questions.join(drawn(task, count, generator(seed, f"pretrain {task}"), data_dir) for task in tasks)


@lru_cache(maxsize=1)
def load_tests(tasks: tuple[str, ...], count: int, data_dir: Path | None) -> Mapping[str, Questions]:
    """Each task's questions about the first `count` test images, and the prior task's."""
    images = {task: images_of(task, data_dir) for task in (*tasks, FASHION)}
    return {task: Questions.of(task, of.test_images[:count], of.test_labels[:count]) for task, of in images.items()}
