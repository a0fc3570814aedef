"""Meta-World (arXiv:1910.10897): a Sawyer arm at a table, simulated by MuJoCo, and what it is asked to do."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrazor.experiments.robot.tasks import TASKS
from rlrazor.experiments.robot.world import FIRST, Expert, Floats, Task
from rlrazor.extras import needs_extra

if TYPE_CHECKING:
    import gymnasium

HORIZON = 150
"""Steps: what takes the scripted experts longest, opening a door, takes them 115."""


@dataclass(frozen=True)
class MetaWorld:
    """See `World`. Needs the extra [robot], which is looked for when the first environment is built."""

    horizon: int = HORIZON
    name = "meta-world"
    observation_shape = (39,)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All nine."""
        return TASKS

    @property
    def action_low(self) -> Floats:
        """The hand's three directions and the gripper, open."""
        return np.full(4, -1, np.float32)

    @property
    def action_high(self) -> Floats:
        """The same, and the gripper, closed."""
        return np.full(4, 1, np.float32)

    def environment(self, task: str) -> "gymnasium.Env[Any, Any]":
        """Raises MissingExtraError where the simulator is not installed."""
        needs_extra("robot")
        with _no_renderer_chosen():
            from rlrazor.experiments.robot.arm import ArmEnvironment
        return ArmEnvironment(task)

    def expert(self, task: str, route: str = FIRST) -> Expert:
        """Meta-World's own, or `SideGrasp`, which places the puck by another route."""
        needs_extra("robot")
        with _no_renderer_chosen():
            from rlrazor.experiments.robot.experts import expert_of

            return expert_of(task, route)


@contextmanager
def _no_renderer_chosen() -> Iterator[None]:
    """MuJoCo cannot be imported where MUJOCO_GL names what does not work here. `camera` finds out, when it is asked."""
    before = os.environ.pop("MUJOCO_GL", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MUJOCO_GL"] = before
