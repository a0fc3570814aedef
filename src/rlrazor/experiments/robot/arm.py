"""Meta-World's arm as an environment that is cheap to have many of: one simulator per task and process serves them all.

What Meta-World itself does in `reset` and `step`, without what costs most there and decides nothing here:

- The hand is moved to where it starts from, 2 x 50 steps of simulation at each reset: here once, and then remembered.
- `reset(seed=)` is ignored there. Here the seed decides the start: it draws what Meta-World calls the random vector.
- The shaped reward, which takes up to two thirds of a step, is left out. Success follows by the same rule.
- What is seen is put together without looking each part up by its name, and without a check that a rotation is one.

An environment holds its state as numbers, which are put into the simulator before a step and taken out of it after.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from numpy.typing import NDArray

from rlrazor.experiments.robot.camera import Camera, Frame
from rlrazor.experiments.robot.world import Floats

APART = 0.15
"""Object and goal are drawn anew until they are as far from each other on the table, in m, as in Meta-World."""

Doubles = NDArray[np.float64]
Rule = Callable[["Arm", Doubles], bool]
"""Whether an observation (39,) is a success."""


def _within(radius: float) -> Rule:
    return lambda arm, seen: bool(np.linalg.norm(seen[4:7] - arm.target) <= radius)


def _along_x(radius: float) -> Rule:
    return lambda arm, seen: bool(abs(seen[4] - arm.target[0]) <= radius)


def _by_hand(radius: float) -> Rule:
    return lambda arm, seen: bool(np.linalg.norm(arm.sawyer.tcp_center - arm.target) <= radius)


RULES: Mapping[str, Rule] = {
    "pick-place": _within(0.07),
    "push": _within(0.05),
    "reach": _by_hand(0.05),
    "drawer-open": _within(0.03),
    "drawer-close": _within(0.065),
    "door-open": _along_x(0.08),
    "door-close": _within(0.08),
    "window-open": _along_x(0.05),
    "window-close": _along_x(0.05),
}
"""How Meta-World judges each task, in m: the object, or the hand, within so much of the goal."""


TURNED: Mapping[str, str] = {
    "pick-place": "objGeom",
    "push": "objGeom",
    "reach": "objGeom",
    "door-open": "handle",
    "door-close": "handle",
}
"""The shape whose rotation is seen, as a quaternion; of the other tasks Meta-World has what costs nothing."""


@dataclass
class State:
    """All that a simulation goes on from: MuJoCo's state, what the start has moved, and the last observation's half."""

    physics: Doubles
    bodies: Doubles
    sites: Doubles
    target: Doubles
    previous: Doubles


class Arm:
    """The simulator of one task. It remembers no episode."""

    def __init__(self, task: str) -> None:
        self.sawyer: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.model, self.data, self.rule = self.sawyer.model, self.sawyer.data, RULES[task]
        self.sawyer._partially_observable = False  # the goal is part of what is seen
        self.sawyer.__dict__.pop("sawyer_observation_space", None)  # it was worked out for a hidden goal
        bounds = self.sawyer.sawyer_observation_space
        self.low, self.high = bounds.low, bounds.high
        self.sawyer._freeze_rand_vec = True  # the vector is ours
        self.hand, self.fingers = self.data.body("hand"), [self.data.body(f"{side}claw") for side in ("right", "left")]
        self.turned = self.data.geom(TURNED[task]) if task in TURNED else None
        self.camera: Camera | None = None
        self.bodies, self.sites = self.model.body_pos.copy(), self.model.site_pos.copy()
        self.clear()
        self.sawyer._reset_hand()
        self.rested = self._physics()
        self.sawyer._reset_hand = self._rest

    @property
    def target(self) -> Doubles:
        """Where the goal is, (3,) in m."""
        target: Doubles = self.sawyer._target_pos
        return target

    def vector(self, seed: int, cell: tuple[int, int, int] | None) -> Doubles:
        """Where things are placed, as the seed decides it; a cell of a grid decides the first two of the numbers."""
        rng, space = np.random.default_rng(seed), self.sawyer._random_reset_space
        while True:
            share = rng.random(space.low.size)
            if cell is not None:
                share[:2] = (np.array(cell[:2]) + 0.5) / cell[2]
            vector: Doubles = space.low + share * (space.high - space.low)
            if vector.size < 6 or np.linalg.norm(vector[:2] - vector[3:5]) >= APART:
                return vector

    def place(self, vector: Doubles) -> tuple[Doubles, State]:
        """A start: what is seen (39,), and the state."""
        self.clear()
        self.sawyer._last_rand_vec = vector
        self.sawyer.reset_model()
        self.sawyer.reset_model()  # again, as in Meta-World: now all is where the first has put it
        seen = self.sawyer._get_obs()
        seen[18:36] = seen[:18]
        return seen, self._state()

    def step(self, state: State, action: Floats) -> tuple[Doubles, State, bool]:
        """What is seen (39,) after an action (4,), the state then, and whether the task is solved."""
        self.restore(state)
        moved = self.data.mocap_pos + np.minimum(np.maximum(action[:3], -1), 1) * self.sawyer.action_scale
        self.data.mocap_pos[:] = np.minimum(np.maximum(moved, self.sawyer.mocap_low), self.sawyer.mocap_high)
        self.data.mocap_quat[:] = 1, 0, 1, 0
        self.data.ctrl[:] = action[-1], -action[-1]
        mujoco.mj_step(self.model, self.data, nstep=self.sawyer.frame_skip)
        mujoco.mj_forward(self.model, self.data)
        seen = self._look(state.previous)
        self.sawyer._prev_obs = seen[:18].copy()
        seen = np.minimum(np.maximum(seen, self.low), self.high)
        return seen, self._state(), self.rule(self, seen)

    def _look(self, previous: Doubles) -> Doubles:
        """What is seen: hand, gripper, object now and before, and the goal; as `SawyerXYZEnv._get_obs` has it."""
        seen = np.zeros(39)
        seen[:3] = self.hand.xpos
        seen[3] = min(float(np.linalg.norm(self.fingers[0].xpos - self.fingers[1].xpos)) / 0.1, 1.0)
        seen[4:7] = self.sawyer._get_pos_objects()
        seen[7:11] = self.sawyer._get_quat_objects() if self.turned is None else _quaternion(self.turned.xmat.tolist())
        seen[18:36] = previous
        seen[36:] = self.target
        return seen

    def picture(self, state: State) -> Frame:
        """A frame of a state."""
        self.restore(state)
        mujoco.mj_forward(self.model, self.data)
        if self.camera is None:
            self.camera = Camera(self.model)
        return self.camera.see(self.data)

    def clear(self) -> None:
        """Forget whatever was simulated before."""
        self.model.body_pos[:], self.model.site_pos[:] = self.bodies, self.sites
        mujoco.mj_resetData(self.model, self.data)

    def restore(self, state: State) -> None:
        """Put a state into the simulator."""
        self.model.body_pos[:], self.model.site_pos[:] = state.bodies, state.sites
        mujoco.mj_setState(self.model, self.data, state.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.sawyer._target_pos, self.sawyer._prev_obs = state.target, state.previous

    def _state(self) -> State:
        return State(
            self._physics(),
            self.model.body_pos.copy(),
            self.model.site_pos.copy(),
            np.array(self.target),
            self.sawyer._prev_obs,
        )

    def _physics(self) -> Doubles:
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, physics, kind)
        return physics

    def _rest(self) -> None:
        """In place of Meta-World's own: the hand is where it starts from."""
        mujoco.mj_setState(self.model, self.data, self.rested, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(self.model, self.data)
        self.sawyer.init_tcp = self.sawyer.tcp_center


def _quaternion(m: Sequence[float]) -> Doubles:
    """(x, y, z, w) of a rotation matrix, nine numbers row by row, as scipy's `Rotation` has it, to the same bits."""
    trace = m[0] + m[4] + m[8]
    largest = max((m[0], 0), (m[4], 1), (m[8], 2), (trace, 3), key=lambda one: one[0])[1]
    if largest == 3:
        q = [m[7] - m[5], m[2] - m[6], m[3] - m[1], 1 + trace]
    else:
        i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
        q = [0.0] * 4
        q[i] = 1 - trace + 2 * m[4 * i]
        q[j], q[k] = m[3 * j + i] + m[3 * i + j], m[3 * k + i] + m[3 * i + k]
        q[3] = m[3 * k + j] - m[3 * j + k]
    return np.array(q) / math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])


class ArmEnvironment(gymnasium.Env[Floats, Floats]):
    """An environment of one task: observations (39,); actions (4,) in [-1, 1], the hand's and the gripper's.

    It never ends by itself, and has no reward but success.
    """

    def __init__(self, task: str) -> None:
        self.arm = arm_of(task)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.state: State | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """The start that the seed decides, and with `options["cell"]` a cell of a grid."""
        vector = self.arm.vector(seed or 0, (options or {}).get("cell"))
        seen, self.state = self.arm.place(vector)
        return seen.astype(np.float32), {}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """One step, 1/80 s."""
        assert self.state is not None, "an episode begins with reset"
        seen, self.state, success = self.arm.step(self.state, action)
        return seen.astype(np.float32), float(success), False, False, {"success": float(success)}

    def render(self) -> Frame:
        """A frame (150, 200, 3) of RGB; raises NoRenderingError where neither EGL nor OSMesa works."""
        assert self.state is not None, "an episode begins with reset"
        return self.arm.picture(self.state)


@cache
def arm_of(task: str) -> Arm:
    """The simulator of a task, which takes up to a second to build, in this process."""
    return Arm(task)
