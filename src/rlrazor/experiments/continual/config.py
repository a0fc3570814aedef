"""What a sequence is made of: settings with their help, presets, and the specs that follow. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.runs import settings
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.settings import (
    check_bounds,
    check_many,
    check_positive,
    check_runs,
    check_samples,
    kinds_of,
    log_spaced,
    setting,
)

EXPERIMENT = "continual"
RECIPE = 1  # goes into every base's spec: raise it when a change to this folder changes the bits of a run

SPLITS: Mapping[str, Sequence[int]] = {
    "parity": (0, 2, 4, 6, 8),
    "above-four": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "three": (0, 3, 6, 9),  # multiples of it
    "round": (0, 3, 6, 8, 9),  # by their strokes
}
"""Task -> one of its two classes of digits; a label is right when it is in the digit's own."""
RATES, ALONE, JOINT = "rates", "alone", "joint"  # in the column `order`, of runs that are no sequence
CORE_METHODS = ("sft-1", "sft-2", "oracle", "reinforce", "grpo", "dr-grpo", "kl-dpg")
PAPER_METHODS = (*(name + penalty for penalty in ("", "+kl", "+kl-before") for name in CORE_METHODS), "replay", "ewc")


@dataclass(frozen=True)
class Config:
    """Sequences of stages: every method and seed goes through the tasks in every order."""

    methods: tuple[str, ...] = setting("methods, comma-separated, or 'core' (seven) or 'paper' (with their penalties)")
    tasks: tuple[str, ...] = setting("the tasks, in the first order: parity, above-four, prime, three, round")
    orders: int = setting("1: that order; 2: its reverse, too")
    lrs: tuple[float, ...] = setting("learning rates to choose from, comma-separated, or LOW:HIGH:COUNT log-spaced")
    seeds: tuple[int, ...] = setting("seeds; each pre-trains a base policy of its own", (0,))
    target: float = setting("new-task score at which a stage ends", 0.93)
    epochs: int = setting("epochs after which a stage ends at the latest", 8)
    train_size: int = setting("training images of a stage", 10_000)
    test_size: int = setting("test images of each task", 2_000)
    checkpoints_per_epoch: int = setting("checkpoints measured per epoch", 10)
    batch_size: int = setting("images per step", 128)
    group_size: int = setting("labels sampled per image by on-policy methods", 64)
    kl_coef: float = setting("weight of the KL penalty in the methods named ...+kl and ...+kl-before", 0.1)
    pretrain_epochs: int = setting("length of the base policy's pre-training", 20)
    pretrain_size: int = setting("images of each task in pre-training", 500)

    def __post_init__(self) -> None:
        check_many(self, ("methods", "tasks", "lrs", "seeds"))
        check_positive(self, KINDS, but=("seeds", "kl_coef"))
        check_bounds(self, KINDS)
        if unknown := [task for task in self.tasks if task not in SPLITS]:
            raise RazorError(f"Unknown task {unknown[0]!r:.60}. Tasks: {', '.join(SPLITS)}.")
        if len(self.tasks) < 2:
            raise RazorError("A sequence has two tasks or more: name them with tasks.")
        runs = len(self.methods) * (len(self.lrs) + len(self.tasks) * len(self.seeds) * (self.orders + 1))
        check_runs(runs, self.epochs * self.checkpoints_per_epoch)
        check_samples(self, "batch_size")

    def base_specs(self, data: str) -> list[RunSpec]:
        """One base run per seed; `data` is the fingerprint of the images."""
        params: dict[str, Any] = {"recipe": RECIPE, "data": data}
        params |= {name: getattr(self, name) for name in ("pretrain_size", "pretrain_epochs", "test_size")}
        params["tasks"] = "+".join(task for task in SPLITS if task in self.tasks)
        return [RunSpec(EXPERIMENT, BASE, params, seed) for seed in self.seeds]

    def spec(self, method: str, lr: float, tasks: Sequence[str], start: Ancestor) -> RunSpec:
        """A run that trains these tasks, one or several at once, from there. Raises RazorError for another method."""
        from rlrazor.experiments.continual.methods import find_method  # which imports torch

        found, penalty = find_method(method)
        params = {"task": "+".join(tasks), "lr": lr, "schedule": "constant", "until": self.target}
        params |= {
            name: getattr(self, name) for name in ("epochs", "checkpoints_per_epoch", "train_size", "batch_size")
        }
        params |= {
            "group_size": self.group_size if found.on_policy else None,
            "kl_coef": self.kl_coef if penalty else 0.0,
        }
        params |= {} if found.strength is None else {"strength": found.strength}
        return RunSpec(EXPERIMENT, method, params, start.spec.seed, start)


KINDS = kinds_of(Config)
QUICK = ("sft-1", "sft-2", "oracle", "grpo", "replay")
PRESETS: Mapping[str, Config] = {
    "paper": Config(PAPER_METHODS, tuple(SPLITS), 2, log_spaced(1e-4, 1e-3, 4), (0, 1, 2)),
    "quick": Config(QUICK, ("parity", "above-four", "prime"), 1, (3e-4, 1e-3)),
}


def parse_setting(name: str, value: Any) -> Any:
    """A setting as Config holds it: see `settings.parse_setting`. `methods` also takes `core` and `paper`."""
    return settings.parse_setting(KINDS, {"core": lambda: CORE_METHODS, "paper": lambda: PAPER_METHODS}, name, value)
