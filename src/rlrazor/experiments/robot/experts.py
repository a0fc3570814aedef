"""Scripted experts of Meta-World's tasks: its own, and a second one for pick-and-place, which takes another route.

An observation begins with the hand (3), how far the gripper is open (1, from 0 to 1) and the object (3), and ends with
the goal (3), in m.
"""

import warnings
from importlib import import_module
from typing import Any

import numpy as np

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.tasks import NEW
from rlrazor.experiments.robot.world import FIRST, SECOND, Expert, Floats


def expert_of(task: str, route: str) -> Expert:
    """An expert for one episode; raises RazorError for a route that the task does not have."""
    if route == FIRST:
        return Scripted(task)
    if route == SECOND and task == NEW:
        return SideGrasp()
    raise RazorError(
        f"No expert solves {task!r} by the route {route!r}: {NEW!r} has 'first' and 'second', others 'first'."
    )


class Scripted:
    """Meta-World's own expert of a task."""

    def __init__(self, task: str) -> None:
        name = "".join(part.capitalize() for part in task.split("-"))
        self.policy: Any = getattr(import_module("metaworld.policies"), f"Sawyer{name}V3Policy")()

    def act(self, observation: Floats, rng: np.random.Generator) -> Floats:
        """See `Expert`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it asks for more than the arm can do
            action: Floats = self.policy.get_action(observation.astype(np.float64))
        return np.clip(action, -1, 1)


class SideGrasp:
    """Comes from the side at the puck's height, with open fingers, and carries it up, across and down onto the goal.

    Meta-World's own comes from above, with fingers half closed, closes them while it still comes down, and carries the
    puck straight to the goal.
    """

    GAIN = 10.0
    ASIDE = 0.1  # m from the puck, along the table's edge, across which the fingers open
    LIFT = 0.15  # m, the height up to which it lifts straight
    OVER = 0.1  # m above the goal, from where it comes down
    GRIP = 0.8  # with .6 the puck slips out at one of eight starts under noise of .1
    WAIT = 8  # steps to close the fingers for
    AT, LOST = 0.02, 0.06  # m from the puck: near enough to close the fingers, and without it

    def __init__(self) -> None:
        self.beside = self.lifted = self.over = False
        self.closing = 0

    def act(self, observation: Floats, rng: np.random.Generator) -> Floats:
        """See `Expert`."""
        hand, puck, goal = observation[:3], observation[4:7], observation[-3:]
        aim, grip = self._aim(hand, puck, goal)
        action: Floats = np.clip([*(self.GAIN * (aim - hand)), grip], -1, 1).astype(np.float32)
        return action

    def _aim(self, hand: Floats, puck: Floats, goal: Floats) -> tuple[Floats, float]:
        low = puck + np.array([0, 0, 0.03], np.float32)
        if self.closing == self.WAIT and np.linalg.norm(hand - low) > self.LOST:  # it has slipped out: once more
            self.beside = self.lifted = self.over = False
            self.closing = 0
        if self.closing == 0:
            aside = low + np.array([np.copysign(self.ASIDE, -puck[0]), 0, 0], np.float32)
            self.beside = self.beside or bool(np.linalg.norm(hand - aside) < 0.03)
            if not self.beside:
                return aside, -1.0
            if np.linalg.norm(hand - low) > self.AT:
                return low, -1.0
        if self.closing < self.WAIT:
            self.closing += 1
            return low, self.GRIP
        self.lifted = self.lifted or bool(hand[2] > self.LIFT)
        if not self.lifted:
            return np.array([*hand[:2], self.LIFT + 0.1], np.float32), self.GRIP
        above = goal + np.array([0, 0, self.OVER], np.float32)
        self.over = self.over or bool(np.linalg.norm(hand[:2] - above[:2]) < 0.03)
        return (goal if self.over else above), self.GRIP
