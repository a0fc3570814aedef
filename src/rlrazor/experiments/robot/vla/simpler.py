"""SimplerEnv (arXiv:2405.05941): Google's robot at a table and a cabinet, simulated by ManiSkill: the paper's world."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

PREFIX = "google_robot_"
CAMERA = "overhead_camera"
NEW = "pick_coke_can"
_DRAWERS = [f"{what}_{which}_drawer" for what in ("open", "close") for which in ("top", "middle", "bottom")]
TASKS: Mapping[str, Task] = {name: Task(name, (name.replace("_", " "),)) for name in (NEW, *_DRAWERS)}
"""Those with one instruction each, SimplerEnv's own."""

REACH, TURN = 0.25, 0.6
"""Of a step at most: metres and radians. Nearly all of RT-1's demonstrations' steps are smaller."""


@dataclass(frozen=True)
class Simpler:
    """Google's robot; see `World`. Images are scaled to `side` pixels a side. It has `recordings`, no experts."""

    side: int = 128
    recordings: Path | None = None
    name = "simpler"
    horizon = 113  # SimplerEnv's own for drawers; it gives the can 80
    tasks = TASKS

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of an image."""
        return (self.side, self.side, 3)

    @property
    def action_low(self) -> Floats:
        """The hand's three directions and turns, and the gripper."""
        return -self.action_high

    @property
    def action_high(self) -> Floats:
        """The same the other way."""
        return np.array([REACH] * 3 + [TURN] * 3 + [1], np.float32)

    def environment(self, task: str) -> "gymnasium.Env[Any, Any]":
        """Raises MissingExtraError where SimplerEnv is not installed."""
        from rlrazor.experiments.robot.vla.scene import SceneEnvironment

        return SceneEnvironment(SimplerScene(task, self.side), f"SimplerEnv's {task}", self.side)

    def expert(self, task: str, route: str = FIRST) -> Expert:
        """Raises RazorError: there is none."""
        raise RazorError("SimplerEnv has no scripted experts: name a folder of recorded episodes, --recordings DIR.")

    def recorded(self, task: str, route: str = FIRST) -> Iterator[Demonstrated]:
        """The recorded episodes of a task; see `recordings`."""
        return recorded_in(self.recordings, self, self.tasks[task], route)


class SimplerScene:
    """See scene.Scene."""

    def __init__(self, task: str, side: int) -> None:
        needs_package("simpler_env", "SimplerEnv", "-e its checkout")
        try:
            self.simulator = import_module("simpler_env").make(PREFIX + task)
        except ImportError as error:
            raise RazorError(f"SimplerEnv cannot be imported: {cause_of(error)} See docs/robot/README.md.") from error
        self.side = side

    def start(self, seed: int) -> NDArray[np.uint8]:
        """See scene.Scene."""
        seen, _ = self.simulator.reset(seed=seed)
        return self._image(seen)

    def act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], bool]:
        """See scene.Scene."""
        seen, _, done, _, info = self.simulator.step(action)
        return self._image(seen), bool(info.get("success", done))

    def close(self) -> None:
        """See scene.Scene."""
        self.simulator.close()

    def _image(self, seen: Mapping[str, Any]) -> NDArray[np.uint8]:
        from PIL import Image

        whole = Image.fromarray(np.asarray(seen["image"][CAMERA]["rgb"])[..., :3].astype(np.uint8))
        return np.asarray(whole.resize((self.side, self.side), Image.Resampling.LANCZOS))
