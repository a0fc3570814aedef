"""Environments side by side in one process: a lane has an episode under way, and an environment for as long as that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError, cause_of
from rlrazor.experiments.robot.world import Episode, Floats, World

if TYPE_CHECKING:
    import gymnasium

Lane = tuple[int, int]
"""Which of the batches under way, and which row of it."""


@dataclass(frozen=True)
class Orders:
    """What happens in each of N lanes: in the first of them a step with these actions (n, A), in the others a start."""

    lanes: Sequence[Lane]
    actions: Floats
    starts: Sequence[Episode]


@dataclass(frozen=True)
class Outcomes:
    """Of each of N lanes the observation (N, S), whether the task is solved there, and whether the episode is over."""

    observations: Floats
    solved: NDArray[np.bool_]
    over: NDArray[np.bool_]


class Lanes:
    """The lanes of one process. Environments are built when they are needed, and kept for the next episode.

    `alive` is called whenever a lane is done with a step, or a start.
    """

    def __init__(self, world: World, alive: Callable[[], None] = lambda: None) -> None:
        self.world, self.alive = world, alive
        self.free: dict[str, list[gymnasium.Env[Any, Any]]] = {}
        self.under_way: dict[Lane, _UnderWay] = {}

    def step(self, orders: Orders) -> Outcomes:
        """Carry out the orders.

        Raises RazorError where the simulator fails, or sees what is no number.
        """
        steps = len(orders.actions)
        done = [self.act(lane, action) for lane, action in zip(orders.lanes[:steps], orders.actions, strict=True)] + [
            self.start(lane, episode) for lane, episode in zip(orders.lanes[steps:], orders.starts, strict=True)
        ]
        observations, solved, over = zip(*done, strict=True)
        return Outcomes(np.stack(observations), np.array(solved), np.array(over))

    def start(self, lane: Lane, episode: Episode) -> tuple[Floats, bool, bool]:
        """Start an episode, whatever is under way in the lane; as `act`: what is seen, whether solved, whether over."""
        self._release(lane)
        free = self.free.setdefault(episode.task, [])
        one = _UnderWay(free.pop() if free else self.world.environment(episode.task), episode)
        self.under_way[lane] = one
        try:
            observation, _ = one.environment.reset(seed=episode.seed, options={"cell": episode.cell})
        except Exception as error:
            raise self._failed(one, error) from error
        return self._seen(one, observation), False, False

    def act(self, lane: Lane, action: Floats) -> tuple[Floats, bool, bool]:
        """Take an action in a lane."""
        one = self.under_way[lane]
        one.steps += 1
        try:
            observation, _, terminated, truncated, info = one.environment.step(action)
            solved = bool(info["success"])
        except Exception as error:
            raise self._failed(one, error) from error
        over = solved or terminated or truncated or one.steps >= self.world.horizon
        if over:
            self._release(lane)
        return self._seen(one, observation), solved, bool(over)

    def close(self) -> None:
        """Close all environments."""
        for lane in list(self.under_way):
            self._release(lane)
        for kept in self.free.values():
            for environment in kept:
                environment.close()
        self.free = {}

    def _release(self, lane: Lane) -> None:
        if (one := self.under_way.pop(lane, None)) is not None:
            self.free[one.episode.task].append(one.environment)

    def _seen(self, one: "_UnderWay", observation: Any) -> Floats:
        self.alive()
        seen = np.asarray(observation)
        if not np.isfinite(seen).all():
            raise RazorError(f"{self._where(one)}, what is seen is not a number: its simulation has become unstable.")
        return seen

    def _failed(self, one: "_UnderWay", error: Exception) -> RazorError:
        if isinstance(error, RazorError):
            return error
        return RazorError(f"{self._where(one)}, the simulator has failed: {cause_of(error)}")

    def _where(self, one: "_UnderWay") -> str:
        episode = one.episode
        return f"At step {one.steps} of {episode.task!r} in {self.world.name}, seed {episode.seed}"


@dataclass
class _UnderWay:
    environment: "gymnasium.Env[Any, Any]"
    episode: Episode
    steps: int = 0
