"""What a world of tasks is to the rest: environments, scripted experts, and the episodes that are run in them.

A second world, such as LIBERO's, is a second class with these few members; nothing else knows a simulator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrazor.seeding import seed_of

if TYPE_CHECKING:
    import gymnasium

Cell = tuple[int, int, int]
"""Column, row, and how many of each the grid has."""

FIRST, SECOND = "first", "second"
"""The routes of a task's experts: all tasks have the first."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """A task by its name, and what one says to ask for it: several paraphrases of one instruction."""

    name: str
    paraphrases: tuple[str, ...]


@dataclass(frozen=True)
class Episode:
    """What decides an episode's bits, apart from the policy.

    `seed` alone decides the start, all that is placed at random; with `cell`, the first two coordinates of that, in
    general the moved object's, are the middle of a cell of a grid over their range instead. `draw` tells episodes of
    one start apart: the noise of sampling follows from both.
    """

    task: str
    seed: int
    instruction: str
    draw: int = 0
    cell: Cell | None = None

    def noise(self, purpose: str) -> np.random.Generator:
        """The episode's own stream of random numbers for that purpose."""
        return np.random.default_rng(seed_of(self.seed, f"{purpose}/{self.draw}"))


class Expert(Protocol):
    """A scripted policy for one episode: it may remember how far it is."""

    def act(self, observation: Floats, rng: np.random.Generator) -> Floats:
        """The action (A,) that it takes at an observation (S,), within the world's bounds."""
        ...


class World(Protocol):
    """A picklable description: environments are built where they are stepped, in whichever process that is.

    `horizon` is the number of steps after which an episode ends, whatever the environment says. Actions (A,) lie
    between `action_low` and `action_high`; observations are (S,), or images, of the shape `observation_shape`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def tasks(self) -> Mapping[str, Task]: ...  # noqa: D102
    @property
    def horizon(self) -> int: ...  # noqa: D102
    @property
    def observation_shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def action_low(self) -> Floats: ...  # noqa: D102
    @property
    def action_high(self) -> Floats: ...  # noqa: D102

    def environment(self, task: str) -> "gymnasium.Env[Any, Any]":
        """An environment of the task, to be used for one episode after another.

        `reset(seed=s, options={"cell": c})` decides all of a start, of a used environment as of a new one; `step` gives
        observations, of states in float32, and `info["success"]`, and neither raises at the end of an episode.
        """
        ...

    def expert(self, task: str, route: str = FIRST) -> Expert:
        """A scripted expert for one episode of the task; raises RazorError for a route that the task does not have."""
        ...


def episodes_of(world: World, task: str, count: int, *, seed: int, purpose: str) -> list[Episode]:
    """`count` episodes of a task, each of its own start; of another purpose they are others.

    What a policy is evaluated on, demonstrations and training differ in their purpose, so none sees another's starts.
    A longer list begins with the shorter one.
    """
    return [_episode(world.tasks[task], seed_of(seed, f"robot/{purpose}/{task}/{index}")) for index in range(count)]


def grid_of(world: World, task: str, side: int, *, seed: int, purpose: str) -> list[Episode]:
    """An episode from every cell of a grid of starts, row by row: side * side."""
    starts = episodes_of(world, task, side * side, seed=seed, purpose=purpose)
    return [replace(one, cell=(index % side, index // side, side)) for index, one in enumerate(starts)]


def repeated(episodes: Sequence[Episode], times: int) -> list[Episode]:
    """Every episode as often, those of one start beside each other: they differ in the noise of sampling only."""
    return [replace(one, draw=draw) for one in episodes for draw in range(times)]


def _episode(task: Task, seed: int) -> Episode:
    paraphrase = seed_of(seed, "paraphrase") % len(task.paraphrases)
    return Episode(task.name, seed, task.paraphrases[paraphrase])
