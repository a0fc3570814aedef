"""Episodes of a policy, and demonstrations of an expert, many at a time.

An episode ends with success at the first step whose `info["success"]` is set, and without after the world's horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.lanes import Lanes, Order, Outcome
from rlrazor.experiments.robot.world import Episode, Floats, World
from rlrazor.system import interrupts

HISTORY = 2
"""The last observations that a policy sees; at a start, the first one as often."""

Tokens = NDArray[np.int64]


class Actor(Protocol):
    """What acts in a roll-out. A row's tokens do not depend on the other rows."""

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        """Tokens (N, A) for states (N, H, S), sampled by uniform noise (N, A) in [0, 1); greedy where that is None.

        N is always the number of lanes, whether or not as many episodes are left, so that no result depends on that.
        """
        ...

    def actions_of(self, tokens: Tokens) -> Floats:
        """The actions (N, A) that tokens (N, A) stand for."""
        ...


@dataclass(frozen=True)
class Rolled:
    """An episode of a policy: `history` (T, H, S), the states as it saw them, and `tokens` (T, A), its actions."""

    episode: Episode
    history: Floats
    tokens: Tokens
    success: bool

    @property
    def steps(self) -> int:
        """How many steps it took, T."""
        return len(self.tokens)


class Simulators:
    """A world's environments, which are built when they are needed and stay for the next episodes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lanes = Lanes(world)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, half: int, orders: Sequence[Order]) -> list[Outcome]:
        """Carry out an order for each lane that has one."""
        return self.lanes.step(half, orders)


def roll_out(
    simulators: Simulators, episodes: Sequence[Episode], actor: Actor, *, sampled: bool, lanes: int = 32
) -> list[Rolled]:
    """Run the episodes with actions of the actor, sampled or greedy, in the order given.

    Two batches of `lanes` episodes each are under way; when one ends, the next takes its lane. Which lane that is
    follows from the episodes' lengths alone. Raises RazorError for an action that is no number.
    """
    waiting = list(enumerate(episodes))[::-1]
    done: list[Rolled | None] = [None] * len(episodes)
    halves = [_Half(simulators, actor, lanes, sampled) for _ in range(2)]
    while waiting or any(half.busy for half in halves):
        interrupts.check()
        for number, half in enumerate(halves):
            for place, rolled in half.tick(number, waiting):
                done[place] = rolled
    return [one for one in done if one is not None]


class _Half:
    """A batch of lanes, each with the episode under way there."""

    def __init__(self, simulators: Simulators, actor: Actor, lanes: int, sampled: bool) -> None:
        self.simulators, self.actor, self.sampled = simulators, actor, sampled
        self.under_way: list[_UnderWay | None] = [None] * lanes
        world = simulators.world
        self.instructions = [""] * lanes
        self.history = np.zeros((lanes, HISTORY, *world.observation_shape), np.float32)

    @property
    def busy(self) -> bool:
        return any(one is not None for one in self.under_way)

    def tick(self, number: int, waiting: list[tuple[int, Episode]]) -> list[tuple[int, Rolled]]:
        """One step of each episode that is under way; then a start in each lane that is free. The episodes that end."""
        orders: list[Order] = []
        if self.busy:
            noise = self._noise() if self.sampled else None
            tokens = self.actor.act(self.instructions, self.history, noise)
            actions = self.actor.actions_of(tokens)
            for lane, one in enumerate(self.under_way):
                if one is not None:
                    one.take(self.history[lane], tokens[lane], actions[lane])
                    orders.append((lane, actions[lane]))
        for lane, one in enumerate(self.under_way):
            if one is None and waiting:
                place, episode = waiting.pop()
                self.under_way[lane] = _UnderWay(place, episode, self.simulators.world)
                self.instructions[lane] = episode.instruction
                orders.append((lane, episode))
        ended = []
        for lane, observation, success, over in self.simulators.step(number, orders):
            one = self.under_way[lane]
            assert one is not None
            self.history[lane] = [*self.history[lane, 1:], observation] if one.tokens else observation
            if over:
                ended.append((one.place, one.rolled(success)))
                self.under_way[lane] = None
        return ended

    def _noise(self) -> NDArray[np.float64]:
        noise = np.zeros((len(self.under_way), len(self.simulators.world.action_low)))
        for lane, one in enumerate(self.under_way):
            if one is not None:
                noise[lane] = one.noise[len(one.tokens)]
        return noise


class _UnderWay:
    """An episode and what has happened in it."""

    def __init__(self, place: int, episode: Episode, world: World) -> None:
        self.place, self.episode = place, episode
        # Row t is the noise of step t, which depends on the episode and on t alone.
        self.noise = episode.noise("actions").random((world.horizon, len(world.action_low)))
        self.history: list[Floats] = []
        self.tokens: list[Tokens] = []

    def take(self, history: Floats, tokens: Tokens, action: Floats) -> None:
        if not np.isfinite(action).all():
            raise RazorError(
                f"The policy's action at step {len(self.tokens)} of {self.episode.task!r} is not a number: it has "
                "diverged. Use a lower learning rate, or weights from before."
            )
        self.history.append(history.copy())
        self.tokens.append(tokens.copy())

    def rolled(self, success: bool) -> Rolled:
        return Rolled(self.episode, np.stack(self.history), np.stack(self.tokens), success)


@dataclass(frozen=True)
class Demonstrated:
    """An expert's episode: states (T, H, S) as a policy sees them, and actions (T, A).

    `actions` were carried out, noise and all; `intended` are the expert's own there.
    """

    episode: Episode
    history: Floats
    actions: Floats
    intended: Floats
    success: bool


def demonstrate(
    simulators: Simulators, episodes: Sequence[Episode], *, route: str = "first", noise: float = 0.0
) -> list[Demonstrated]:
    """Run the episodes with the expert of that route; `noise` is the deviation of what is added to its actions.

    An action is within the world's bounds with its noise too. What does not succeed is there as well.
    """
    done = []
    for episode in episodes:
        interrupts.check()
        done.append(_demonstrated(simulators, episode, route, noise))
    return done


def _demonstrated(simulators: Simulators, episode: Episode, route: str, noise: float) -> Demonstrated:
    world, rng = simulators.world, episode.noise(f"expert/{route}")
    expert = world.expert(episode.task, route)
    deviations = noise * rng.standard_normal((world.horizon, len(world.action_low)))
    history: list[Floats] = []
    intended: list[Floats] = []
    actions: list[Floats] = []
    ((_, observation, success, over),) = simulators.step(0, [(0, episode)])
    seen = np.stack([observation] * HISTORY)
    while not over:
        meant = expert.act(observation, rng)
        action = np.clip(meant + deviations[len(actions)], world.action_low, world.action_high).astype(np.float32)
        history.append(seen)
        intended.append(np.asarray(meant, np.float32))
        actions.append(action)
        ((_, observation, success, over),) = simulators.step(0, [(0, action)])
        seen = np.stack([*seen[1:], observation])
    return Demonstrated(episode, np.stack(history), np.stack(actions), np.stack(intended), success)
