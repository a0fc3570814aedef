"""The tasks in memory: ParityMNIST, the prior task FashionMNIST, and two synthetic sets of images beside them."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from rlrazor.drift.representation import NEIGHBOURS
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import data, synthetic
from rlrazor.experiments.parity_mnist.policy import NEITHER_TASK, NEW_TASK, PRIOR_TASK, as_inputs

FASHION, DOTS = "fashion_mnist", "dots"
DOT_TRAIN, DOT_TEST = 10_000, 10_000  # of those to train on, a run says how many it uses
PROBE_IMAGES = 1_000


@dataclass(frozen=True)
class Task:
    """Inputs (N, 785) float32 and labels (N,) int64.

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
    """Both tasks' images, loaded once per process.

    Raises RazorError as `data.load` does, and for too few test images to compare representations on.
    """
    digits, fashion = data.load("mnist", data_dir), data.load("fashion-mnist", data_dir)
    for name, images in (("mnist", digits.test_images), ("fashion-mnist", fashion.test_images)):
        if len(images) <= NEIGHBOURS:
            raise RazorError(
                f"The test set of {name} has {len(images)} images, and CKNNA looks at the {NEIGHBOURS} nearest others "
                f"of each: give at least {NEIGHBOURS + 1}."
            )
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


@lru_cache(maxsize=1)
def load_probe() -> Tensor:
    """Inputs (N, 785) of noise that belongs to neither task, to compare representations on."""
    return as_inputs(synthetic.pink_noise(PROBE_IMAGES, seed=0), NEITHER_TASK)


@dataclass(frozen=True)
class Dots:
    """Counting dots: a prior task that shares nothing with the new one. Inputs (N, 785) and counts (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def load_dots() -> Dots:
    """The images, made once per process, and only for runs whose base was pre-trained on them."""
    images, counts = synthetic.dots(DOT_TRAIN + DOT_TEST, seed=0)
    inputs = as_inputs(images, NEITHER_TASK)
    return Dots(inputs[:DOT_TRAIN], counts[:DOT_TRAIN], inputs[DOT_TRAIN:], counts[DOT_TRAIN:])
