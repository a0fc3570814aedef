"""Small runs of the robot experiment in the tiny world, and policies so small that all actions can be listed."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrazor.experiments.robot.base import load_policy, pretrain, weights_of
from rlrazor.experiments.robot.evaluate import evaluate
from rlrazor.experiments.robot.policy import Policy, Seen
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.train import finetune
from rlrazor.runs.records import BASE, Ancestor, Record, RunSpec
from rlrazor.runs.store import Checkpoint, Keep, RunStore
from robot_worlds import Points

BASE_PARAMS: Mapping[str, Any] = {
    "recipe": 1,
    "world": "points",
    "new_task": "carry",
    "prior_tasks": ["reach", "touch"],
    "demonstrations": 600,
    "new_demonstrations": 40,
    "noise": 0.1,
    "new_noise": 0.6,
    "bc_updates": 300,
    "bc_batch": 256,
    "bc_lr": 3e-3,
    "width": 64,
    "layers": 2,
    "heads": 2,
    "episodes": 40,
    "kl_episodes": 20,
    "scored": "sampled",
}
ONLINE: Mapping[str, Any] = {"starts": 8, "group_size": 4}
OFFLINE: Mapping[str, Any] = {"batch_size": 256, "per_start": 2, "expert_noise": 0.1}
COMMON: Mapping[str, Any] = {
    "lr": 1e-3,
    "schedule": "constant",
    "epochs": 1,
    "updates": 4,
    "checkpoints_per_epoch": 2,
    "kl_coef": 0.0,
    "grid": 4,
}


@dataclass(frozen=True)
class Stored:
    """A base in a store, and where its demonstrations are kept."""

    spec: RunSpec
    store: RunStore
    cache: Path

    @property
    def policy(self) -> Policy:
        """Loaded again."""
        return load_policy(self.spec.params, Points(), self.store.load_weights(self.spec, 0))

    @property
    def record(self) -> Record:
        """What was measured of it."""
        (record,) = self.store.read(self.spec).records
        return record


def base_spec(**changed: Any) -> RunSpec:
    """A base in the tiny world."""
    return RunSpec("robot", BASE, {**BASE_PARAMS, **changed}, 0)


def stored_base(folder: Path) -> Stored:
    """The base of `base_spec()`."""
    torch.set_num_threads(1)
    spec, store = base_spec(), RunStore(folder / "out")
    store.keep(spec, Keep(all=True))
    store.write(spec, list(pretrain(spec, Points(), workers=0, cache=folder / "cache")), seconds=0)
    return Stored(spec, store, folder / "cache")


def stored_briefly(base: Stored) -> Stored:
    """The same policy, of which six episodes of each task are measured."""
    spec, policy = base_spec(episodes=6, kl_episodes=3), base.policy
    with Simulators(Points()) as simulators:
        checkpoint = evaluate(spec, 0, 0.0, policy, simulators).checkpoint({}, lambda: weights_of(policy))
    base.store.keep(spec, Keep(all=True))
    base.store.write(spec, [checkpoint], seconds=0)
    return Stored(spec, base.store, base.cache)


def run_spec(base: RunSpec, method: str, kind: Mapping[str, Any], **changed: Any) -> RunSpec:
    """A run of a method on it."""
    return RunSpec("robot", method, {**COMMON, **kind, **changed}, base.seed, Ancestor(base, 0))


def checkpoints_of(spec: RunSpec, store: RunStore, cache: Path) -> list[Checkpoint]:
    """All checkpoints of a run, their weights as they were at the time."""
    found = []
    for one in finetune(spec, Points(), store, workers=0, cache=cache):
        weights = dict(one.weights())
        found.append(Checkpoint(one.record, lambda kept=weights: kept, items=one.items))  # type: ignore[misc]
    return found


def all_actions(bins: int, tokens: int) -> Tensor:
    """Every action (bins ** tokens, tokens)."""
    return torch.tensor(list(itertools.product(range(bins), repeat=tokens)))


def everywhere(instruction: str, history_HS: Tensor, count: int) -> Seen:
    """The same state, so many times."""
    return Seen([instruction] * count, history_HS.expand(count, *history_HS.shape))
