"""A simulator's scene as an environment whose observations are images (height, width, 3) of uint8."""

from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError, cause_of

Image = NDArray[np.uint8]


class Scene(Protocol):
    """What a simulator has to do."""

    def start(self, seed: int) -> Image:
        """Begin an episode, all of whose start follows from the seed; what is seen."""
        ...

    def act(self, action: NDArray[np.float32]) -> tuple[Image, bool]:
        """A step: what is seen, and whether the task is done."""
        ...

    def close(self) -> None:
        """End the simulator."""
        ...


class SceneEnvironment(gymnasium.Env[Image, NDArray[np.float32]]):
    """See world.World.environment. A start lies on no grid: the option `cell` is passed over."""

    def __init__(self, scene: Scene, name: str, side: int) -> None:
        self.scene, self.name = scene, name
        self.observation_space = gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)
        self.seen: Image = np.zeros((side, side, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Image, dict[str, Any]]:
        """Begin an episode. Raises RazorError where the simulator cannot, as without a way to draw."""
        try:
            self._look(self.scene.start(int(seed or 0) % 2**31))
        except RazorError:
            raise
        except Exception as error:  # each simulator has its own
            raise RazorError(
                f"{self.name} cannot start an episode: {cause_of(error)} Where it cannot draw, set MUJOCO_GL to egl "
                "or, with the library OSMesa, to osmesa."
            ) from error
        return self.seen, {}

    def step(self, action: NDArray[np.float32]) -> tuple[Image, float, bool, bool, dict[str, Any]]:
        """A step; `info["success"]` tells whether the task is done."""
        image, success = self.scene.act(action)
        self._look(image)
        return self.seen, float(success), False, False, {"success": success}

    def render(self) -> Image:
        """What is seen, which is all that there is."""
        return self.seen

    def close(self) -> None:
        """End the simulator."""
        self.scene.close()

    def _look(self, image: Image) -> None:
        self.seen = np.ascontiguousarray(image, np.uint8)
        if self.seen.shape != self.observation_space.shape:
            raise RazorError(
                f"{self.name} draws images of {self.seen.shape}, and {self.observation_space.shape} was asked for."
            )
