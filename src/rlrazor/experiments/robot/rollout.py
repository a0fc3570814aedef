"""Episodes of a policy, and demonstrations of an expert, many at a time.

An episode ends with success at the first step whose `info["success"]` is set. It ends without where the environment
says that it is over, terminated or truncated, and after the world's horizon.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.lanes import Lane, Lanes, Orders
from rlrazor.experiments.robot.simulators import Simulator, Simulators
from rlrazor.experiments.robot.world import FIRST, Episode, Floats, World
from rlrazor.system import interrupts

HISTORY = 2
"""The last observations that a policy sees; at a start, the first one as often."""

Tokens = NDArray[np.int64]


class Actor(Protocol):
    """What acts in a roll-out. A row's tokens do not depend on the other rows."""

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        """Tokens (N, A) for states (N, H, S), sampled by uniform noise (N, A) in [0, 1); greedy where that is None.

        N is always the number of lanes, whether or not as many episodes are left, so that no result depends on that.
        The other rows are what was last there, or zeros and no instruction; what is answered there is not used.
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


def roll_out(
    simulators: Simulators, episodes: Sequence[Episode], actor: Actor, *, sampled: bool, lanes: int = 32
) -> list[Rolled]:
    """Run the episodes with actions of the actor, sampled or greedy; the results are in the order given.

    Two batches of up to `lanes` episodes are under way: the actor decides for the one while the other is simulated.
    When an episode ends, the next takes its lane; which that is follows from the episodes' lengths alone, so that the
    results do not depend on the number of processes.

    Raises RazorError for an action that is no number, where the simulator fails, and where a process dies or hangs.
    """
    waiting = deque(enumerate(episodes))
    width = min(lanes, -(-len(episodes) // 2))  # few episodes are shared out as well
    batches = [_Batch(number, simulators, _Acting(actor, sampled, lanes), width) for number in range(2)]
    done: dict[int, Rolled] = {}
    try:
        for batch in batches:
            batch.send(waiting)
        while any(batch.busy for batch in batches):
            interrupts.check()
            for batch in batches:
                done.update(batch.receive())
                batch.send(waiting)
    except BaseException:
        simulators.end()  # some have not answered yet
        raise
    return [done[place] for place in range(len(episodes))]


@dataclass(frozen=True)
class _Acting:
    actor: Actor
    sampled: bool
    lanes: int


class _Batch:
    """Lanes that are stepped together, each with the episode under way there."""

    def __init__(self, number: int, simulators: Simulators, acting: _Acting, width: int) -> None:
        self.number, self.simulators, self.acting = number, simulators, acting
        self.under_way: list[_UnderWay | None] = [None] * width
        self.instructions = [""] * acting.lanes
        self.history: Floats | None = None
        self.sent: list[tuple[Simulator, list[int]]] = []

    @property
    def busy(self) -> bool:
        return bool(self.sent)

    def send(self, waiting: deque[tuple[int, Episode]]) -> None:
        """Have every episode that is under way make a step, and start one in each lane that is free."""
        stepping = [lane for lane, one in enumerate(self.under_way) if one is not None]
        actions = self._act(stepping)
        starting = [lane for lane, one in enumerate(self.under_way) if one is None][: len(waiting)]
        for lane in starting:
            place, episode = waiting.popleft()
            self.under_way[lane] = _UnderWay(place, episode, self.simulators.world)
            self.instructions[lane] = episode.instruction
        each = self.simulators.each
        for number, simulator in enumerate(each):
            steps = [index for index, lane in enumerate(stepping) if lane % len(each) == number]
            starts = [lane for lane in starting if lane % len(each) == number]
            own = [*(stepping[index] for index in steps), *starts]
            if own:
                names: list[Lane] = [(self.number, lane) for lane in own]
                begun = [one.episode for lane in starts if (one := self.under_way[lane]) is not None]
                simulator.send(Lanes.step, Orders(names, actions[steps], begun))
                self.sent.append((simulator, own))

    def receive(self) -> Iterator[tuple[int, Rolled]]:
        """What came of it: the episodes that have ended, and their places in the list."""
        sent, self.sent = self.sent, []
        for simulator, lanes in sent:
            outcomes = simulator.receive()
            if self.history is None:
                shape = (self.acting.lanes, HISTORY, *outcomes.observations.shape[1:])
                self.history = np.zeros(shape, outcomes.observations.dtype)
            for row, lane in enumerate(lanes):
                one, observation = self.under_way[lane], outcomes.observations[row]
                assert one is not None
                self.history[lane, :-1] = self.history[lane, 1:] if one.tokens else observation
                self.history[lane, -1] = observation
                if outcomes.over[row]:
                    self.under_way[lane] = None
                    yield one.place, one.rolled(bool(outcomes.solved[row]))

    def _act(self, stepping: Sequence[int]) -> Floats:
        """The actions (n, A) of those lanes."""
        if self.history is None or not stepping:
            return np.zeros((0, len(self.simulators.world.action_low)), np.float32)
        under_way = [one for lane in stepping if (one := self.under_way[lane]) is not None]
        noise = None
        if self.acting.sampled:
            noise = np.zeros((self.acting.lanes, len(self.simulators.world.action_low)))
            noise[stepping] = [one.noise[len(one.tokens)] for one in under_way]
        tokens = self.acting.actor.act(list(self.instructions), self.history, noise)
        actions = self.acting.actor.actions_of(tokens)
        for lane, one in zip(stepping, under_way, strict=True):
            one.take(self.history[lane], tokens[lane], actions[lane])
        return actions[stepping]


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
    simulators: Simulators, episodes: Sequence[Episode], *, route: str = FIRST, noise: float = 0.0
) -> list[Demonstrated]:
    """Run the episodes with the expert of that route; `noise` is the deviation of what is added to its actions.

    An action is within the world's bounds with its noise too. What does not succeed is there as well. Raises RazorError
    for a route that a task does not have, where the simulator fails, and where a process dies or hangs.
    """
    done: list[Demonstrated] = []
    try:
        each = simulators.each
        for first in range(0, len(episodes), len(each)):
            interrupts.check()
            together = list(zip(each, episodes[first : first + len(each)], strict=False))
            for simulator, episode in together:
                simulator.send(_demonstrate, episode, route, noise)
            done += [simulator.receive() for simulator, _ in together]
    except BaseException:
        simulators.end()
        raise
    return done


def _demonstrate(lanes: Lanes, episode: Episode, route: str, noise: float) -> Demonstrated:
    world, rng = lanes.world, episode.noise(f"expert/{route}")
    expert = world.expert(episode.task, route)
    deviations = noise * rng.standard_normal((world.horizon, len(world.action_low)))
    history: list[Floats] = []
    intended: list[Floats] = []
    actions: list[Floats] = []
    lane: Lane = (0, 0)
    observation, success, over = lanes.start(lane, episode)
    seen = np.stack([observation] * HISTORY)
    while not over:
        meant = np.asarray(expert.act(observation, rng), np.float32)
        action = np.clip(meant + deviations[len(actions)], world.action_low, world.action_high).astype(np.float32)
        history.append(seen)
        intended.append(meant)
        actions.append(action)
        observation, success, over = lanes.act(lane, action)
        seen = np.stack([*seen[1:], observation])
    return Demonstrated(episode, np.stack(history), np.stack(actions), np.stack(intended), success)
