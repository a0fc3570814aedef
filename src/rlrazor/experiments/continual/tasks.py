"""The tasks: splits of MNIST's digits, told apart by the indicators beside the pixels, and FashionMNIST before them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor.experiments.continual.config import SPLITS
from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.policy import OUTCOMES, as_inputs
from rlrazor.experiments.parity_mnist.sampling import generator
from rlrazor.experiments.parity_mnist.task import FASHION

ALL = (*SPLITS, FASHION)  # in the order of their indicators


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


@dataclass(frozen=True)
class Images:
    """MNIST and FashionMNIST, as in the files."""

    digits: data.Dataset
    fashion: data.Dataset

    def train(self, task: str, count: int, rng: Generator) -> Questions:
        """Of a task about `count` training images, drawn anew from the stream."""
        source = self.fashion if task == FASHION else self.digits
        rows = torch.randperm(len(source.train_labels), generator=rng)[:count]
        return Questions.of(task, source.train_images[rows], source.train_labels[rows])

    def pretraining(self, tasks: Iterable[str], count: int, seed: int) -> Questions:
        """What a base learns from; a task's are the same whatever the others are, so that a run can have them again."""
        return Questions.join(self.train(task, count, generator(seed, f"pretrain {task}")) for task in tasks)


@lru_cache(maxsize=1)
def load_images(data_dir: Path | None) -> Images:
    """Both sets, loaded once per process. Raises RazorError as `data.load` does."""
    return Images(data.load("mnist", data_dir), data.load("fashion-mnist", data_dir))


@lru_cache(maxsize=1)
def load_tests(data_dir: Path | None, tasks: tuple[str, ...], count: int) -> Mapping[str, Questions]:
    """Each task's questions about the first `count` test images, and the prior task's."""
    images = load_images(data_dir)
    sources = {**dict.fromkeys(tasks, images.digits), FASHION: images.fashion}
    return {one: Questions.of(one, of.test_images[:count], of.test_labels[:count]) for one, of in sources.items()}
