"""Roll-outs and demonstrations: against a loop that knows one episode at a time, and what goes wrong on the way."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.lanes import Lanes
from rlrazor.experiments.robot.rollout import HISTORY, Demonstrated, Rolled, Tokens, demonstrate, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import SECOND, Episode, Floats, episodes_of, grid_of, repeated
from robot_worlds import STRIDE, Plane, Points, Walker

BINS = 64
LANES = 5


class Walking:
    """Goes where the instruction says, or, by the noise, elsewhere; slower where it was going the same way before."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        self.sizes.add(len(history))
        assert len(instructions) == len(history)
        now, before = history[:, -1], history[:, -2]
        to_box = np.array(["box" in one and now[row, 6] == 0 for row, one in enumerate(instructions)])
        aim = np.where(to_box[:, None], now[:, 2:4], now[:, 4:6]) - now[:, :2]
        action = np.clip(aim / STRIDE, -1, 1) - 0.3 * (now[:, :2] - before[:, :2]) / STRIDE
        if noise is not None:
            action = action + 1.5 * (noise - 0.5)
        tokens: Tokens = ((np.clip(action, -1, 1) + 1) / 2 * (BINS - 1)).round().astype(np.int64)
        return tokens

    def actions_of(self, tokens: Tokens) -> Floats:
        return (tokens / (BINS - 1) * 2 - 1).astype(np.float32)


def alone(episode: Episode, *, sampled: bool) -> Rolled:
    """The same by itself, in an environment of its own."""
    environment, actor, horizon = Plane(episode.task), Walking(), Points().horizon
    observation, _ = environment.reset(seed=episode.seed, options={"cell": episode.cell})
    noise = episode.noise("actions").random((horizon, 2))
    seen, success = [observation, observation], False
    states: list[Floats] = []
    tokens: list[Tokens] = []
    while not success and len(tokens) < horizon:
        states.append(np.stack(seen[-HISTORY:]))
        row = noise[len(tokens)][None] if sampled else None
        tokens.append(actor.act([episode.instruction], states[-1][None], row)[0])
        observation, _, _, _, info = environment.step(actor.actions_of(tokens[-1]))
        seen.append(observation)
        success = bool(info["success"])
    return Rolled(episode, np.stack(states), np.stack(tokens), success)


def bits(done: Rolled | Demonstrated) -> tuple[Any, ...]:
    arrays = [value for value in vars(done).values() if isinstance(value, np.ndarray)]
    return done.episode, done.success, [(one.shape, one.dtype, one.tobytes()) for one in arrays]


def mixed(count: int = 9) -> list[Episode]:
    world = Points()
    return [one for task in world.tasks for one in episodes_of(world, task, count, seed=3, purpose="test")]


@pytest.fixture(scope="module")
def two() -> Iterator[Simulators]:
    with Simulators(Points(), workers=2) as simulators:
        yield simulators
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("sampled", [True, False])
def test_episodes_together_are_what_each_is_alone(sampled: bool) -> None:
    episodes, actor = mixed(), Walking()
    done = roll_out(Simulators(Points()), episodes, actor, sampled=sampled, lanes=LANES)
    assert [bits(one) for one in done] == [bits(alone(one, sampled=sampled)) for one in episodes]
    assert actor.sizes == {LANES}
    assert all(one.success for one in done) or sampled
    assert any(one.success for one in done)
    assert all(one.steps == len(one.history) == len(one.tokens) for one in done)
    assert len({one.steps for one in done}) > 5


def test_processes_do_not_change_a_bit(two: Simulators) -> None:
    episodes = mixed()
    here = [bits(one) for one in roll_out(Simulators(Points()), episodes, Walking(), sampled=True, lanes=LANES)]
    assert [bits(one) for one in roll_out(two, episodes, Walking(), sampled=True, lanes=LANES)] == here
    with Simulators(Points(), workers=3) as three:
        assert [bits(one) for one in roll_out(three, episodes, Walking(), sampled=True, lanes=LANES)] == here
        assert len(three.each) == 3


def test_a_few_episodes_and_none_at_all(two: Simulators) -> None:
    for count in (0, 1, 2):
        done = roll_out(two, mixed()[:count], Walking(), sampled=True, lanes=64)
        assert [bits(one) for one in done] == [bits(alone(one, sampled=True)) for one in mixed()[:count]]


def test_the_actor_decides_for_one_batch_while_the_other_is_simulated() -> None:
    log: list[str] = []

    class Told:
        def __init__(self) -> None:
            self.lanes = Lanes(Points())
            self.waiting: list[Any] = []

        def send(self, what: Any, orders: Any) -> None:
            log.append(f"send {orders.lanes[0][0]}")
            self.waiting.append((what, orders))

        def receive(self) -> Any:
            what, orders = self.waiting.pop(0)
            log.append(f"receive {orders.lanes[0][0]}")
            return what(self.lanes, orders)

        def end(self) -> None:
            self.lanes.close()

    class Logged(Walking):
        def act(self, *arguments: Any) -> Tokens:
            log.append("act")
            return super().act(*arguments)

    simulators = Simulators(Points())
    simulators._started = [Told()]
    roll_out(simulators, mixed(), Logged(), sampled=False, lanes=LANES)
    assert log[:2] == ["send 0", "send 1"]
    turns = [tuple(log[start : start + 3]) for start in range(2, 32, 3)]
    assert turns == [(f"receive {half}", "act", f"send {half}") for half in [0, 1] * 5]


def test_draws_of_a_start_differ_in_their_noise_alone() -> None:
    world = Points()
    (start,) = episodes_of(world, "carry", 1, seed=0, purpose="test")
    done = roll_out(Simulators(world), repeated([start], 4), Walking(), sampled=True, lanes=LANES)
    assert len({one.history[0].tobytes() for one in done}) == 1
    assert len({one.tokens.tobytes() for one in done}) == 4
    greedy = roll_out(Simulators(world), repeated([start], 4), Walking(), sampled=False, lanes=LANES)
    assert len({one.tokens.tobytes() for one in greedy}) == 1


def test_the_noise_of_a_step_does_not_depend_on_the_horizon() -> None:
    episodes = mixed(3)
    short = roll_out(Simulators(Points(horizon=4)), episodes, Walking(), sampled=True, lanes=LANES)
    longer = roll_out(Simulators(Points()), episodes, Walking(), sampled=True, lanes=LANES)
    for one, other in zip(short, longer, strict=True):
        assert one.steps == min(4, other.steps)
        assert np.array_equal(one.tokens, other.tokens[:4])


def test_what_a_purpose_draws_no_other_does() -> None:
    world = Points()
    lists = [
        episodes_of(world, task, 50, seed=seed, purpose=purpose)
        for task in world.tasks
        for seed in (0, 1)
        for purpose in ("held out", "demonstrations", "training")
    ]
    seeds = [one.seed for episodes in lists for one in episodes]
    assert len(set(seeds)) == len(seeds) == 900
    assert episodes_of(world, "carry", 60, seed=0, purpose="held out")[:50] == lists[0]
    assert {one.instruction for one in lists[0]} == {*world.tasks["carry"].paraphrases}


def test_a_grid_has_every_cell_once() -> None:
    episodes = grid_of(Points(), "carry", 4, seed=0, purpose="test")
    done = demonstrate(Simulators(Points()), episodes)
    boxes = {tuple(one.history[0, 0, 2:4].round(4).tolist()) for one in done}
    middles = (-0.75, -0.25, 0.25, 0.75)
    assert boxes == {(x, y) for x in middles for y in middles}
    assert len({one.history[0, 0, 4:6].tobytes() for one in done}) == 16  # goals are drawn


def test_demonstrations_are_the_experts(two: Simulators) -> None:
    episodes = [one for one in mixed() if one.task == "carry"]
    still = demonstrate(two, episodes, noise=0.0)
    noisy = demonstrate(two, episodes, noise=0.5)
    here = demonstrate(Simulators(Points()), episodes, noise=0.5)
    assert [bits(one) for one in noisy] == [bits(one) for one in here]
    assert all(one.success for one in still)
    for one in still:
        assert np.array_equal(one.actions, one.intended)
    for one in noisy:
        expert, environment = Walker("carry"), Plane("carry")
        observation, _ = environment.reset(seed=one.episode.seed)
        for state, action, intended in zip(one.history, one.actions, one.intended, strict=True):
            assert np.array_equal(state[-1], observation)
            assert np.array_equal(expert.act(observation, np.random.default_rng(0)), intended)
            observation = environment.step(action)[0]
        assert np.abs(one.actions).max() <= 1
    deviations = np.concatenate([one.actions - one.intended for one in noisy])
    free = np.concatenate([np.abs(one.intended) < 1e-6 for one in noisy])
    assert 0.2 < np.abs(deviations).mean() < 0.5  # without bounds, 0.5 * sqrt(2 / pi) = .40
    assert not free.all()


def test_another_route_is_longer_and_of_the_new_task_alone() -> None:
    episodes = episodes_of(Points(), "carry", 20, seed=0, purpose="test")
    first, second = (demonstrate(Simulators(Points()), episodes, route=route) for route in ("first", SECOND))
    assert all(one.success for one in second)
    assert np.mean([len(one.actions) for one in second]) > 1.1 * np.mean([len(one.actions) for one in first])
    with pytest.raises(RazorError, match="second route"):
        demonstrate(Simulators(Points()), mixed()[-1:], route=SECOND)


class Standing(Walking):
    """Never gets anywhere, or is no number from the second step on."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def actions_of(self, tokens: Tokens) -> Floats:
        actions = np.zeros(tokens.shape, np.float32)
        actions[1] = self.value
        return actions


def test_what_never_ends_is_ended() -> None:
    done = roll_out(Simulators(Points()), mixed(4), Standing(), sampled=False, lanes=LANES)
    assert [(one.steps, one.success) for one in done] == [(Points().horizon, False)] * 12


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_action_that_is_no_number_is_refused(value: float, two: Simulators) -> None:
    for simulators in (Simulators(Points()), two):
        with pytest.raises(RazorError, match="step 0 of 'carry' is not a number: it has diverged"):
            roll_out(simulators, mixed(), Standing(value), sampled=False, lanes=LANES)
        assert simulators is not two or multiprocessing.active_children() == []
        done = roll_out(simulators, mixed(1), Walking(), sampled=False, lanes=LANES)  # anew
        assert [bits(one) for one in done] == [bits(alone(one, sampled=False)) for one in mixed(1)]


class Interrupted(Walking):
    """Ctrl-C while it decides for the third time, when the other batch is being simulated."""

    calls = 0

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().act(instructions, history, noise)


def test_what_is_broken_off_leaves_no_process_and_no_answer_behind(two: Simulators) -> None:
    with pytest.raises(KeyboardInterrupt):
        roll_out(two, mixed(), Interrupted(), sampled=True, lanes=LANES)
    assert multiprocessing.active_children() == []
    done = roll_out(two, mixed(1), Walking(), sampled=True, lanes=LANES)
    assert [bits(one) for one in done] == [bits(alone(one, sampled=True)) for one in mixed(1)]


class Hostile(Plane):
    """Goes wrong at the third step of an episode, in a way that its task's name says."""

    def __init__(self, how: str) -> None:
        super().__init__("reach")
        self.how, self.steps, self.closed = how, 0, False

    def reset(self, **options: Any) -> tuple[Floats, dict[str, Any]]:
        self.steps = 0
        return super().reset(**options)

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation, reward, _, _, info = super().step(action)
        if self.steps == 3 and self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == 3 and self.how == "raise":
            raise ValueError("the cup is not convex")
        if self.steps == 3 and self.how == "blow up":
            observation = observation * np.float32("nan")
        return observation, reward, self.steps == 3, False, info


@dataclass(frozen=True)
class HostileWorld(Points):
    how: str = ""

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Hostile(self.how)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "raise",
            r"^At step 3 of 'reach' in points, seed \d+, the simulator has failed: the cup is not convex.$",
        ),
        ("blow up", r"^At step 3 of 'reach' in points, seed \d+, what is seen is not a number: "),
        ("die", "^A process that simulates points died, most likely killed or out of memory. Run the same command"),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_sentence(how: str, sentence: str) -> None:
    episodes, others = [one for one in mixed() if one.task == "reach"], multiprocessing.active_children()
    with Simulators(HostileWorld(how=how), workers=2) as simulators:
        with pytest.raises(RazorError, match=sentence):
            roll_out(simulators, episodes, Standing(), sampled=False, lanes=LANES)
        assert multiprocessing.active_children() == others
    if how != "die":
        with pytest.raises(RazorError, match=sentence):
            roll_out(Simulators(HostileWorld(how=how)), episodes, Standing(), sampled=False, lanes=LANES)


def test_an_episode_that_the_environment_ends_has_failed() -> None:
    episodes = [one for one in mixed() if one.task == "reach"]
    done = roll_out(Simulators(HostileWorld()), episodes, Standing(), sampled=False, lanes=LANES)
    assert [(one.steps, one.success) for one in done] == [(3, False)] * len(episodes)


def test_a_process_that_died_while_it_had_nothing_to_do(two: Simulators) -> None:
    roll_out(two, mixed(1), Walking(), sampled=False, lanes=LANES)
    victim = multiprocessing.active_children()[0]
    victim.kill()
    victim.join()
    with pytest.raises(RazorError, match="A process that simulates points died"):
        roll_out(two, mixed(), Walking(), sampled=False, lanes=LANES)
    done = roll_out(two, mixed(1), Walking(), sampled=False, lanes=LANES)
    assert [bits(one) for one in done] == [bits(alone(one, sampled=False)) for one in mixed(1)]


def test_environments_are_kept_and_closed() -> None:
    built: list[Hostile] = []

    class Counted(Points):
        def environment(self, task: str) -> gymnasium.Env[Any, Any]:
            built.append(Counting("", task))
            return built[-1]

    class Counting(Hostile):
        def __init__(self, how: str, task: str) -> None:
            super().__init__(how)
            self.task = task

        def close(self) -> None:
            self.closed = True

    with Simulators(Counted()) as simulators:
        episodes = [replace(one, seed=one.seed + turn) for turn in range(4) for one in mixed()]
        roll_out(simulators, episodes, Walking(), sampled=True, lanes=LANES)
        assert len(built) <= 3 * 2 * LANES
        assert not any(one.closed for one in built)
    assert built
    assert all(one.closed for one in built)


PARENT = """
import time
from multiprocessing import active_children
from robot_worlds import Points
from rlrazor.experiments.robot.simulators import Simulators

if __name__ == "__main__":
    simulators = Simulators(Points(), workers=2)
    assert len(simulators.each) == 2
    print(*[child.pid for child in active_children()], flush=True)
    time.sleep(60)
"""


def test_processes_end_with_their_parent(tmp_path: Any) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while children and time.monotonic() < deadline:
        time.sleep(0.05)
        for pid in list(children):
            with suppress(ProcessLookupError, PermissionError):
                if _running(pid):
                    continue
            children.remove(pid)
    assert children == []


def _running(pid: int) -> bool:
    """A child that nobody has waited for yet is none."""
    os.kill(pid, 0)
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False
