"""Environments side by side in one process: each lane has one per task, and an episode under way in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrazor.experiments.robot.world import Episode, Floats, World

if TYPE_CHECKING:
    import gymnasium

Order = tuple[int, "Episode | Floats"]
"""A lane, and what is to happen there: an episode starts, or the one under way takes this action (A,)."""

Outcome = tuple[int, Floats, bool, bool]
"""A lane, the observation (S,) there, whether its episode has succeeded, and whether it is over."""


class Lanes:
    """The lanes of one process, built when they are needed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.environments: dict[tuple[int, int, str], gymnasium.Env[Any, Any]] = {}
        self.at: dict[tuple[int, int], tuple[gymnasium.Env[Any, Any], int]] = {}  # the environment in use, steps taken

    def step(self, half: int, orders: Sequence[Order]) -> list[Outcome]:
        """Carry out an order in each lane that has one."""
        return [
            self._start(half, lane, what) if isinstance(what, Episode) else self._step(half, lane, what)
            for lane, what in orders
        ]

    def _start(self, half: int, lane: int, episode: Episode) -> Outcome:
        key = (half, lane, episode.task)
        if key not in self.environments:
            self.environments[key] = self.world.environment(episode.task)
        environment = self.environments[key]
        self.at[half, lane] = (environment, 0)
        observation, _ = environment.reset(seed=episode.seed, options={"cell": episode.cell})
        return lane, np.asarray(observation), False, False

    def _step(self, half: int, lane: int, action: Floats) -> Outcome:
        environment, steps = self.at[half, lane]
        observation, _, terminated, truncated, info = environment.step(action)
        self.at[half, lane] = (environment, steps + 1)
        success = bool(info["success"])
        over = success or terminated or truncated or steps + 1 >= self.world.horizon
        return lane, np.asarray(observation), success, over
