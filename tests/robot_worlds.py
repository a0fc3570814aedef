"""A tiny world with the robot's interface: a point in the plane that reaches, touches and carries, in plain numpy.

The three tasks look the same: the instruction alone says what is asked for. A straight expert solves each in 10 to 25
steps, and a second one carries around a bend.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.world import FIRST, SECOND, Expert, Floats, Task

NEAR = 0.15
STRIDE = 0.1
TASKS = {
    "carry": Task(
        "carry", ("carry the box to the goal", "take the box to the goal", "bring the box where the goal is")
    ),
    "reach": Task("reach", ("go to the goal", "move to the goal point")),
    "touch": Task("touch", ("touch the box", "go and find the box")),
}


class Plane(gymnasium.Env[Floats, Floats]):
    """Observation (7,): the point, the box, the goal, all within [-1, 1] squared, and whether the box is held."""

    observation_space = gymnasium.spaces.Box(-2, 2, (7,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task: str) -> None:
        self.task = task
        self.point, self.box, self.goal = np.zeros((3, 2))
        self.held = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        placed = np.random.default_rng(seed).uniform(-1, 1, (2, 2))
        cell = (options or {}).get("cell")
        if cell is not None:
            column, row, side = cell
            placed[0] = (np.array([column, row]) + 0.5) / side * 2 - 1
        self.point, (self.box, self.goal), self.held = np.zeros(2), placed, False
        return self._seen(), {}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self.point = np.clip(self.point + STRIDE * np.clip(action, -1, 1).astype(np.float64), -1, 1)
        self.held = self.held or _near(self.point, self.box)
        if self.held and self.task == "carry":
            self.box = self.point
        success = {
            "carry": self.held and _near(self.box, self.goal),
            "reach": _near(self.point, self.goal),
            "touch": self.held,
        }[self.task]
        return self._seen(), float(success), False, False, {"success": float(success)}

    def render(self) -> NDArray[np.uint8]:
        """32 x 32: the point red, the box green, the goal blue."""
        picture = np.zeros((32, 32, 3), np.uint8)
        for colour, place in enumerate((self.point, self.box, self.goal)):
            column, row = ((place + 1) / 2 * 31).round().astype(int)
            picture[31 - row, column, colour] = 255
        return picture

    def _seen(self) -> Floats:
        return np.concatenate([self.point, self.box, self.goal, [self.held]]).astype(np.float32)


@dataclass
class Walker:
    """Goes where the task asks for; `around`: by a point beside the goal once it holds the box."""

    task: str
    around: bool = False
    passed: bool = False

    def act(self, observation: Floats, rng: np.random.Generator) -> Floats:
        point, box, goal, held = observation[:2], observation[2:4], observation[4:6], observation[6] > 0
        aim = box if self.task == "touch" or (self.task == "carry" and not held) else goal
        if self.around and held and not self.passed:
            beside = np.clip(goal + np.array([0.6, -0.6], np.float32), -1, 1)
            self.passed = _near(point, beside)
            aim = aim if self.passed else beside
        action: Floats = np.clip((aim - point) / STRIDE, -1, 1).astype(np.float32)
        return action


@dataclass(frozen=True)
class Points:
    """The world of the three."""

    name: str = "points"
    horizon: int = 40
    observation_shape: tuple[int, ...] = (7,)
    tasks: Mapping[str, Task] = field(default_factory=lambda: dict(TASKS))

    @property
    def action_low(self) -> Floats:
        return np.full(2, -1, np.float32)

    @property
    def action_high(self) -> Floats:
        return np.full(2, 1, np.float32)

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Plane(task)

    def expert(self, task: str, route: str = FIRST) -> Expert:
        if route == SECOND and task != "carry":
            raise RazorError(f"There is one expert for {task}; a second route has carry alone.")
        return Walker(task, around=route == SECOND)


def _near(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return bool(np.linalg.norm(one - other) < NEAR)
