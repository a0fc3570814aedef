"""Demonstrations: episodes in which a scripted expert succeeded, made once."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.cache import Arrays, cached, digest_of
from rlrazor.experiments.robot.config import RECIPE
from rlrazor.experiments.robot.policy import Policy, Steps
from rlrazor.experiments.robot.rollout import Demonstrated, demonstrate
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import FIRST, Episode, World, episodes_of, grid_of
from rlrazor.system import phases

FORMAT = 1  # raise it when a change to how demonstrations are made changes them
TRIES = 20  # episodes for each demonstration that is wanted, of which the rest may fail

PHASE = "demonstrating"


@dataclass(frozen=True)
class Wanted:
    """What is to be demonstrated: `count` successes of a task, or of each start of a `grid` with so many on a side.

    Gaussian noise of the deviation `noise` is added to the expert's actions: what was carried out is what is learnt.
    `data`: what the world is made from, such as the simulator's release.
    """

    task: str
    count: int
    seed: int
    route: str = FIRST
    noise: float = 0.0
    grid: int = 0
    data: str = ""


@dataclass(frozen=True)
class Demonstrations:
    """Of E episodes, whose `lengths` (E,) add up to T: states (T, H, S) and actions (T, A).

    `interactions`: steps of the simulator that they took, failures included.
    """

    instructions: Sequence[str]
    lengths: Tensor
    history: Tensor
    actions: Tensor
    interactions: int

    @classmethod
    def of(cls, arrays: Arrays) -> Self:
        """As they were kept."""
        lengths, history, actions = (torch.from_numpy(arrays[name]) for name in ("lengths", "history", "actions"))
        return cls(arrays["instructions"].tolist(), lengths, history, actions, int(arrays["interactions"]))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of several tasks, one after another."""
        lengths, history, actions = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("lengths", "history", "actions")
        )
        instructions = [one for part in parts for one in part.instructions]
        return cls(instructions, lengths, history, actions, sum(part.interactions for part in parts))

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        tensors = {name: getattr(self, name).numpy() for name in ("lengths", "history", "actions")}
        named = {"instructions": np.array(self.instructions), "interactions": np.array(self.interactions)}
        return {**tensors, **named}

    @property
    def digest(self) -> str:
        """Of all that is in them."""
        return digest_of(self.arrays())

    def steps(self, policy: Policy) -> Steps:
        """As a policy would have acted: with its tokens."""
        episode_of = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        succeeded = torch.ones(len(self.lengths), dtype=torch.bool)
        return Steps(self.instructions, self.history, policy.tokens_of(self.actions), episode_of, succeeded)


def demonstrations_of(simulators: Simulators, wanted: Wanted, cache: Path) -> Demonstrations:
    """Make them, or take them from the cache; of a world that has recordings instead of experts, take these.

    Raises RazorError where the expert fails too often, or there are too few recordings.
    """
    if recorded := getattr(simulators.world, "recorded", None):
        return _recorded(recorded(wanted.task, wanted.route), wanted)
    made_of = {**of_world(simulators.world, wanted.task), **asdict(wanted)}
    return Demonstrations.of(cached(cache, "demonstrations", made_of, lambda: _make(simulators, wanted).arrays()))


def of_world(world: World, task: str) -> dict[str, Any]:
    """What decides how episodes of a task go, and how they are asked for, beside all that is wanted of them."""
    named = {"format": FORMAT, "recipe": RECIPE, "world": world.name, "horizon": world.horizon}
    return {**named, "instructions": list(world.tasks[task].paraphrases)}


def _make(simulators: Simulators, wanted: Wanted) -> Demonstrations:
    starts = _starts(simulators.world, wanted)
    found: list[list[Demonstrated]] = [[] for _ in starts]
    interactions, missing = 0, len(starts) * wanted.count
    while missing:
        phases.at(f"{PHASE} {wanted.task}", len(starts) * wanted.count - missing, len(starts) * wanted.count)
        places = [
            place
            for place, (own, waiting) in enumerate(zip(found, starts, strict=True))
            for _ in range(min(wanted.count - len(own), len(waiting)))
        ]
        if not places:
            raise RazorError(
                f"The expert of {wanted.task!r} ({wanted.route} route, noise {wanted.noise:g}) fails too often: "
                f"{missing} of {len(starts) * wanted.count} demonstrations are missing after {TRIES} tries for each. "
                "Give it less noise."
            )
        episodes = [starts[place].popleft() for place in places]
        for place, one in zip(
            places, demonstrate(simulators, episodes, route=wanted.route, noise=wanted.noise), strict=True
        ):
            interactions += len(one.actions)
            if one.success:
                found[place].append(one)
                missing -= 1
    return _together([one for own in found for one in own], interactions)


def _recorded(found: Iterator[Demonstrated], wanted: Wanted) -> Demonstrations:
    """The first of a world's recordings, as many as are wanted; those of a grid's starts from wherever they are."""
    count = wanted.count * (wanted.grid**2 or 1)
    first = list(islice(found, count))
    if len(first) < count:
        raise RazorError(f"There are {len(first)} recorded episodes of {wanted.task!r}, and {count} are wanted.")
    return _together(first, sum(len(one.actions) for one in first))


def _together(whole: Sequence[Demonstrated], interactions: int) -> Demonstrations:
    return Demonstrations(
        [one.episode.instruction for one in whole],
        torch.tensor([len(one.actions) for one in whole]),
        torch.from_numpy(np.concatenate([one.history for one in whole])),
        torch.from_numpy(np.concatenate([one.actions for one in whole])),
        interactions,
    )


def training_grid(world: World, task: str, side: int, seed: int) -> list[Episode]:
    """The starts that all methods learn the new task from, one in each cell of a grid: the same for all."""
    return grid_of(world, task, side, seed=seed, purpose="training")


def _starts(world: World, wanted: Wanted) -> list[deque[Episode]]:
    """The episodes to try, in order: for each start of a grid its own, or each from another start."""
    if not wanted.grid:
        tried = wanted.count * TRIES
        return [deque(episodes_of(world, wanted.task, tried, seed=wanted.seed, purpose="demonstrations"))]
    cells = training_grid(world, wanted.task, wanted.grid, wanted.seed)
    return [deque(replace(cell, draw=draw) for draw in range(wanted.count * TRIES)) for cell in cells]
