"""Sequences of tasks on images: settings, presets, and the specs that follow from them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlrazor.experiments.continual.config import EXPERIMENT, TO_BASE, TO_BEFORE, InSequence, check
from rlrazor.experiments.parity_mnist.config import Config
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.settings import Presets, log_spaced, setting

if TYPE_CHECKING:
    from rlrazor.experiments.parity_mnist.methods import Method

RECIPE = 1  # goes into every base's spec: raise it when a change to the code changes the bits of a run

SPLITS: Mapping[str, Sequence[int]] = {
    "parity": (0, 2, 4, 6, 8),
    "above-four": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "three": (0, 3, 6, 9),  # multiples of it
    "round": (0, 3, 6, 8, 9),  # by their strokes
}
"""Task -> one of its two classes of digits; a label is right when it is in the digit's own."""
CORE_METHODS = ("sft-1", "sft-2", "oracle", "reinforce", "grpo", "dr-grpo", "kl-dpg")
PAPER_METHODS = (*(name + penalty for penalty in ("", TO_BASE, TO_BEFORE) for name in CORE_METHODS), "replay", "ewc")


@dataclass(frozen=True)
class ImageSequences(Config, InSequence):
    """The settings of ParityMNIST, and what sequences have besides: of `train_size` images and `test_size` per task."""

    train_size: int = setting("training images of a stage", 10_000)
    test_size: int = setting("test images of each task", 2_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, tuple(SPLITS), ("schedules", "epochs"))

    @property
    def taught(self) -> list[str]:
        """No method imitates a teacher here."""
        return []

    def method_of(self, name: str) -> "tuple[Method, Any]":
        """The method of this name, and its penalty. Raises RazorError for an unknown one."""
        from rlrazor.experiments.parity_mnist.stages import find_method  # which imports torch

        return find_method(name)

    def base_specs(self, data: str, variant: Mapping[str, Any] | None = None) -> list[RunSpec]:
        """One base run per seed; `data` is the fingerprint of the images."""
        params: dict[str, Any] = {"recipe": RECIPE, "data": data}
        params |= {name: getattr(self, name) for name in ("pretrain_size", "pretrain_epochs", "test_size")}
        params["tasks"] = "+".join(task for task in SPLITS if task in self.tasks)
        return [RunSpec(EXPERIMENT, BASE, params, seed) for seed in self.seeds]

    def rates(self, method: str) -> Sequence[float]:
        """The learning rates that the method is tried at."""
        return self.lrs

    def stage(self, method: str, lr: float, tasks: Sequence[str], start: Ancestor) -> RunSpec:
        """A run that trains these tasks, one or several at once, from there. Raises RazorError for another method."""
        found, penalty = self.method_of(method)
        params = {"task": "+".join(tasks), "lr": lr, "schedule": self.schedules[0], "until": self.target}
        params |= {name: getattr(self, name) for name in ("checkpoints_per_epoch", "train_size", "batch_size")}
        params |= {
            "epochs": self.epochs[0],
            "group_size": self.group_size if found.on_policy else None,
            "kl_coef": self.kl_coef if penalty else 0.0,
        }
        params |= {} if found.strength is None else {"strength": found.strength}
        return RunSpec(EXPERIMENT, method, params, start.spec.seed, start)


QUICK = ("sft-1", "sft-2", "oracle", "grpo", "replay")
_STAGE: Mapping[str, Any] = {"schedules": ("constant",), "epochs": (8,), "checkpoints_per_epoch": 10}
PRESETS: Mapping[str, ImageSequences] = {
    "paper": ImageSequences(
        PAPER_METHODS, log_spaced(1e-4, 1e-3, 4), tasks=tuple(SPLITS), orders=2, seeds=(0, 1, 2), **_STAGE
    ),
    "quick": ImageSequences(QUICK, (3e-4, 1e-3), tasks=("parity", "above-four", "prime"), **_STAGE),
}


_TYPED = Presets(PRESETS, {"core": lambda: CORE_METHODS, "paper": lambda: PAPER_METHODS})
resolve, parse_setting = _TYPED.resolve, _TYPED.parse
