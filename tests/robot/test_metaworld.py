"""Meta-World taken apart to go faster: the same bits as its own step, and a start that the seed alone decides."""

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from rlrazor.experiments.robot.metaworld import MetaWorld
from rlrazor.experiments.robot.rollout import Demonstrated, demonstrate
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.tasks import NEW, TASKS
from rlrazor.experiments.robot.world import Episode, episodes_of, grid_of
from rlrazor.extras import MissingExtraError

pytest.importorskip("metaworld")

import mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from rlrazor.experiments.robot.arm import APART, RULES, Arm, ArmEnvironment, State, _quaternion, arm_of
from rlrazor.experiments.robot.experts import expert_of


@cache
def original(task: str) -> Any:
    """Meta-World's own environment, goal in sight, with a random vector that is set by hand."""
    sawyer: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    sawyer._partially_observable = False
    sawyer.__dict__.pop("sawyer_observation_space", None)
    sawyer._set_task_called = sawyer._freeze_rand_vec = True
    return sawyer


def started(task: str, vector: np.ndarray[Any, Any]) -> tuple[Any, State]:
    """What the original sees at a start, and its state as ours."""
    sawyer = original(task)
    sawyer._last_rand_vec = vector
    seen, _ = sawyer.reset()
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    physics = np.empty(mujoco.mj_stateSize(sawyer.model, kind))
    mujoco.mj_getState(sawyer.model, sawyer.data, physics, kind)
    placed = (sawyer.model.body_pos.copy(), sawyer.model.site_pos.copy(), np.array(sawyer._target_pos))
    return seen, State(physics, *placed, seen[:18].copy())


@pytest.mark.parametrize("task", TASKS)
def test_a_step_has_the_bits_of_meta_worlds_own(task: str) -> None:
    """From the same state, with the same noisy expert, up to success and past it."""
    arm, rng = arm_of(task), np.random.default_rng(0)
    seen, state = started(task, arm.vector(0, None))
    expert, successes, past = expert_of(task, "first"), [], 0
    while past < 3:
        action = expert.act(seen.astype(np.float32), rng) + 0.1 * rng.standard_normal(4).astype(np.float32)
        theirs, _, terminated, truncated, info = original(task).step(action)
        seen, state, solved = arm.step(state, action)
        assert np.array_equal(theirs, seen)
        assert bool(info["success"]) == solved
        assert not terminated
        assert not truncated
        successes.append(solved)
        past = past + 1 if solved or past else 0
    assert 30 < successes.index(True) < 140


@pytest.mark.parametrize("task", TASKS)
def test_a_start_is_meta_worlds_own(task: str) -> None:
    """But for where the hand comes to rest, which there depends on what stood in its way: less than half a mm."""
    arm = arm_of(task)
    for seed in range(2):
        vector = arm.vector(seed, None)
        theirs, _ = started(task, vector)
        ours, _ = arm.place(vector)
        assert np.abs(theirs - ours).max() < 5e-4


@pytest.mark.parametrize("task", [NEW, "drawer-open", "door-close"])
def test_a_used_simulator_is_as_good_as_a_new_one(task: str) -> None:
    world = MetaWorld(horizon=40)
    used, other = world.environment(task), world.environment(task)
    demonstrate(
        Simulators(world), episodes_of(world, task, 1, seed=9, purpose="test"), noise=1.0
    )  # leaves things moved
    used.reset(seed=5)
    used.step(np.ones(4, np.float32))
    fresh = Arm(task)
    vector = fresh.vector(1, None)
    seen, state = fresh.place(vector)
    observation, _ = used.reset(seed=1)
    assert np.array_equal(observation, seen.astype(np.float32))
    other.reset(seed=2)
    rng = np.random.default_rng(0)
    for _ in range(40):
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        other.step(-action)  # the same simulator, in between
        observation, _, _, _, info = used.step(action)
        seen, state, solved = fresh.step(state, action)
        assert np.array_equal(observation, seen.astype(np.float32))
        assert info["success"] == solved
    assert isinstance(used, ArmEnvironment)
    assert used.state is not None
    assert used.state.physics.tobytes() == state.physics.tobytes()


def test_a_rotation_is_what_scipy_makes_of_it() -> None:
    for rotation in Rotation.random(200, rng=np.random.default_rng(0)):
        matrix = rotation.as_matrix()
        assert np.array_equal(_quaternion(matrix.ravel().tolist()), Rotation.from_matrix(matrix).as_quat())


def test_the_seed_decides_the_start() -> None:
    environment, arm = MetaWorld().environment(NEW), arm_of(NEW)
    starts = [environment.reset(seed=seed)[0] for seed in (0, 1, 0)]
    assert np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0], starts[1])
    space = arm.sawyer._random_reset_space
    for seed in range(200):
        vector = arm.vector(seed, None)
        assert (vector >= space.low).all()
        assert (vector <= space.high).all()
        assert np.linalg.norm(vector[:2] - vector[3:5]) >= APART
    at_random = np.stack([arm.vector(seed, None) for seed in range(200)])
    assert np.abs(at_random[:, :2].mean(0) - (0, 0.65)).max() < 0.02  # the middle of its range, and a bit nearer
    # The goal, which is part of what is seen, and the puck are where the vector says.
    seen, _ = environment.reset(seed=7)
    assert np.allclose(seen[-3:], arm.vector(7, None)[3:], atol=1e-7)
    assert np.allclose(seen[4:6], arm.vector(7, None)[:2], atol=1e-7)


def test_a_grid_of_starts_is_a_grid_of_pucks() -> None:
    environment = MetaWorld().environment(NEW)
    pucks = []
    for episode in grid_of(MetaWorld(), NEW, 10, seed=0, purpose="test"):
        assert episode.cell is not None
        seen, _ = environment.reset(seed=episode.seed, options={"cell": episode.cell})
        pucks.append(seen[4:6])
    xs, ys = np.meshgrid(np.linspace(-0.09, 0.09, 10), np.linspace(0.605, 0.695, 10))
    assert np.allclose(pucks, np.stack([xs.ravel(), ys.ravel()], axis=1), atol=1e-6)


def test_processes_do_not_change_a_bit() -> None:
    world = MetaWorld(horizon=30)
    episodes = episodes_of(world, NEW, 6, seed=0, purpose="test")

    def bits(one: Demonstrated) -> tuple[Episode, bytes, bytes]:
        return one.episode, one.history.tobytes(), one.actions.tobytes()

    here = [bits(one) for one in demonstrate(Simulators(world), episodes, noise=0.3)]
    with Simulators(world, workers=2) as two:
        assert [bits(one) for one in demonstrate(two, episodes, noise=0.3)] == here


def test_every_task_has_a_rule_and_no_reward_but_success() -> None:
    assert set(RULES) == set(TASKS)
    environment = MetaWorld().environment("reach")
    environment.reset(seed=0)
    observation, reward, terminated, truncated, info = environment.step(np.zeros(4, np.float32))
    assert observation.shape == MetaWorld.observation_shape
    assert observation.dtype == np.float32
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"success": 0.0})


def test_where_it_is_not_installed_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    sentence = r"^This needs the extra \[robot\], and metaworld is missing: in the checkout of rlrazor, pip install -e"
    for build in (lambda: MetaWorld().environment(NEW), lambda: MetaWorld().expert(NEW)):
        with pytest.raises(MissingExtraError, match=sentence):
            build()
    assert MetaWorld().tasks == TASKS  # what needs no simulator works


def test_nothing_of_it_is_imported_before_it_is_needed() -> None:
    modules = ("metaworld", "frames", "rollout", "simulators", "tasks", "world")
    lines = [
        "import sys",
        "for name in ('metaworld', 'mujoco', 'gymnasium'): sys.modules[name] = None",
        *(f"import rlrazor.experiments.robot.{name}" for name in modules),
        "assert rlrazor.experiments.robot.metaworld.MetaWorld().horizon == 150",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
