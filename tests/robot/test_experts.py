"""The scripted experts solve their tasks, and the second one of pick-and-place goes about it in another way."""

import numpy as np
import pytest

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.metaworld import MetaWorld
from rlrazor.experiments.robot.rollout import Demonstrated, demonstrate
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.tasks import NEW, TASKS
from rlrazor.experiments.robot.world import FIRST, SECOND, episodes_of

pytest.importorskip("metaworld")

WORLD = MetaWorld()


@pytest.fixture(scope="module")
def simulators() -> Simulators:
    return Simulators(WORLD)


@pytest.fixture(scope="module")
def routes(simulators: Simulators) -> dict[str, list[Demonstrated]]:
    """Forty starts by both."""
    episodes = episodes_of(WORLD, NEW, 40, seed=1, purpose="test")
    return {route: demonstrate(simulators, episodes, route=route) for route in (FIRST, SECOND)}


@pytest.mark.parametrize("task", [task for task in TASKS if task != NEW])
def test_an_expert_solves_its_task(task: str, simulators: Simulators) -> None:
    done = demonstrate(simulators, episodes_of(WORLD, task, 5, seed=1, purpose="test"))
    assert [one.success for one in done] == [True] * 5
    for one in done:
        assert one.history.shape == (len(one.actions), 2, 39)
        assert one.actions.dtype == np.float32
        assert np.abs(one.actions).max() <= 1


def test_both_experts_pick_and_place(routes: dict[str, list[Demonstrated]]) -> None:
    for done in routes.values():
        assert np.mean([one.success for one in done]) >= 0.95
        for one in done:
            distance = np.linalg.norm(one.history[:, -1, 4:7] - one.history[:, -1, -3:], axis=1)
            assert distance[-1] < 0.07 + 0.03 < distance[0]  # a step away from success, 7 cm, and before


def test_the_second_takes_another_route(routes: dict[str, list[Demonstrated]]) -> None:
    first, second = routes[FIRST], routes[SECOND]

    def aside(one: Demonstrated) -> float:
        """How far from the puck, along the table's edge, the hand is when it has come down to 8 cm, in m."""
        state = one.history[:, -1]
        low = int(np.argmax(state[:, 2] < 0.08))
        return float(abs(state[low, 0] - state[low, 4]))

    def highest(one: Demonstrated) -> float:
        """Of the puck above the goal or its start, whichever is higher, in m."""
        state = one.history[:, -1]
        return float(state[:, 6].max() - max(state[0, 6], state[0, -1]))

    assert np.mean([aside(one) for one in first]) < 0.02
    assert np.mean([aside(one) for one in second]) > 0.07
    assert np.median([highest(one) for one in first]) < 0.02
    assert np.median([highest(one) for one in second]) > 0.03
    assert {float(one.actions[0, 3]) for one in first} == {0.0}  # the gripper
    assert {float(one.actions[0, 3]) for one in second} == {-1.0}
    lengths = [np.mean([len(one.actions) for one in done]) for done in (first, second)]
    assert 50 < lengths[0] < 60 < 70 < lengths[1] < 90
    # At the first one's states the second does something else: half of an action's size, on average.
    apart = []
    for one in first[:10]:
        expert, rng = WORLD.expert(NEW, SECOND), np.random.default_rng(0)
        theirs = [expert.act(state, rng) for state in one.history[:, -1]]
        apart.append(np.abs(np.array(theirs) - one.actions).mean())
    assert np.mean(apart) > 0.3


def test_noise_makes_it_harder(simulators: Simulators, routes: dict[str, list[Demonstrated]]) -> None:
    episodes = [one.episode for one in routes[FIRST]][:20]
    a_little, much = (np.mean([one.success for one in demonstrate(simulators, episodes, noise=n)]) for n in (0.3, 1.0))
    assert a_little >= 0.8  # .94 of 50
    assert much <= 0.5  # .24 of 50


def test_one_route_only_but_of_the_new_task() -> None:
    with pytest.raises(RazorError, match="No expert solves 'reach' by the route 'second'"):
        WORLD.expert("reach", SECOND)
    with pytest.raises(RazorError, match="No expert solves 'pick-place' by the route 'third'"):
        WORLD.expert(NEW, "third")
