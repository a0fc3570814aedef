"""Processes that simulate: what becomes of one that hangs, and how they compute."""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot import simulators as simulating
from rlrazor.experiments.robot.frames import frames_of
from rlrazor.experiments.robot.rollout import Rolled, Tokens, demonstrate, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import Episode, Floats, episodes_of
from rlrazor.system import interrupts
from robot_worlds import Plane, Points


class Still:
    """Stays where it is."""

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        return np.zeros((len(history), 2), np.int64)

    def actions_of(self, tokens: Tokens) -> Floats:
        return tokens.astype(np.float32)


class Sleepy(Plane):
    """Sleeps for so many seconds in each step of an episode but the first."""

    def __init__(self, task: str, sleep: float) -> None:
        super().__init__(task)
        self.sleep, self.steps = sleep, 0

    def reset(self, **options: Any) -> tuple[Floats, dict[str, Any]]:
        self.steps = 0
        return super().reset(**options)

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps > 1:
            time.sleep(self.sleep)
        return super().step(action)


@dataclass(frozen=True)
class SleepyWorld(Points):
    horizon: int = 3
    sleep: float = 0.0

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Sleepy(task, self.sleep)


def episodes(count: int, task: str = "reach") -> list[Episode]:
    return episodes_of(Points(), task, count, seed=0, purpose="test")


HANGS = "^A process that simulates points has not been done with a step for 2 s: its simulator hangs. Run the same"


@pytest.mark.parametrize(
    "run",
    [
        lambda simulators: demonstrate(simulators, episodes(1)),
        lambda simulators: roll_out(simulators, episodes(4), Still(), sampled=False, lanes=2),
    ],
)
def test_a_step_that_never_ends_is_one_sentence(
    run: Callable[[Simulators], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = multiprocessing.active_children()
    with Simulators(SleepyWorld(sleep=3600), workers=1) as simulators:
        simulators.each[0].send(_nothing)
        simulators.each[0].receive()  # it takes its time to start
        monkeypatch.setattr(simulating, "PATIENCE", 2)
        began = time.monotonic()
        with pytest.raises(RazorError, match=HANGS):
            run(simulators)
        assert 2 <= time.monotonic() - began < 60
        assert multiprocessing.active_children() == others


def test_many_slow_steps_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of .7 s each for one answer, longer in all than a single one may take."""
    with Simulators(SleepyWorld(horizon=7, sleep=0.7), workers=1) as simulators:
        simulators.each[0].send(_nothing)
        simulators.each[0].receive()
        monkeypatch.setattr(simulating, "PATIENCE", 3)
        began = time.monotonic()
        (one,) = demonstrate(simulators, episodes(1))
        assert time.monotonic() - began > 4
        assert len(one.actions) == 7


def test_who_waits_hears_of_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the KeyboardInterrupt itself was lost."""
    others = multiprocessing.active_children()
    with Simulators(SleepyWorld(sleep=3600), workers=1) as simulators:
        simulators.each[0].send(_nothing)
        simulators.each[0].receive()
        later = threading.Timer(1.5, monkeypatch.setattr, (interrupts._state, "asked", signal.SIGINT))
        later.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            roll_out(simulators, episodes(1), Still(), sampled=False, lanes=1)
        assert time.monotonic() - began < 60
        later.join()
    monkeypatch.setattr(interrupts._state, "raised", False)
    assert multiprocessing.active_children() == others


def _nothing(lanes: Any) -> None:
    pass


class Fading(Plane):
    """Shows whether half of the smallest normal number is something, and fails in the task of touching."""

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        observation[-1] = sys.float_info.min / 2 > 0
        if self.task == "touch":
            raise ValueError("touched")
        return observation, reward, terminated, truncated, info

    def render(self) -> NDArray[np.uint8]:
        return np.full((2, 2, 3), sys.float_info.min / 2 > 0, np.uint8)


@dataclass(frozen=True)
class FadingWorld(Points):
    horizon: int = 3

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Fading(task)


class Flushing(Still):
    """Says whether small numbers were flushed where it decided."""

    def __init__(self) -> None:
        self.flushed: set[bool] = set()

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        self.flushed.add(sys.float_info.min / 2 == 0)
        return super().act(instructions, history, noise)


@pytest.fixture(params=[True, False])
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    import torch  # not in the processes, which would need more time for it than for all else

    before = sys.float_info.min / 2 == 0
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor does not flush denormals")
    yield request.param
    torch.set_flush_denormal(before)


def test_small_numbers_are_what_they_are_wherever_it_is_simulated(flushes: bool) -> None:
    def seen(done: Sequence[Rolled]) -> list[list[float]]:
        return [one.history[:, -1, -1].tolist() for one in done]

    actor = Flushing()
    for workers in (0, 1):
        with Simulators(FadingWorld(), workers=workers) as simulators:
            done = roll_out(simulators, episodes(4), actor, sampled=False, lanes=2)
            assert seen(done) == [[0.0, 1.0, 1.0]] * 4
    assert actor.flushed == {flushes}
    with pytest.raises(RazorError, match="touched"):
        roll_out(Simulators(FadingWorld()), episodes(2, "touch"), actor, sampled=False, lanes=1)
    assert (
        frames_of(FadingWorld(), episodes(1)[0], np.zeros((2, 2), np.float32)).tolist()
        == np.ones((3, 2, 2, 3)).tolist()
    )
    assert (sys.float_info.min / 2 == 0) is flushes
