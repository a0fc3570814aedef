"""The tasks in Meta-World: which is new, which are prior, fixed in advance, and how one asks for each.

Each has an environment of that name in Meta-World ("drawer-open-v3") and a scripted expert that solves it.
"""

from collections.abc import Mapping

from rlrazor.experiments.robot.world import Task

NEW = "pick-place"
PAPER_PRIOR = ("drawer-open", "drawer-close")
"""The paper's prior tasks (arXiv:2509.04259, Robotics)."""

PRIOR = (*PAPER_PRIOR, "reach", "push", "door-open", "door-close", "window-open", "window-close")

_TASKS = (
    Task(
        "pick-place",
        (
            "pick up the puck and place it at the goal",
            "lift the puck to the target",
            "grasp the puck and bring it to the goal",
            "take the puck and put it where the goal is",
            "carry the puck to the target position",
        ),
    ),
    Task(
        "drawer-open",
        (
            "open the drawer",
            "pull the drawer open",
            "pull out the drawer by its handle",
            "slide the drawer out",
            "get the drawer open",
        ),
    ),
    Task(
        "drawer-close",
        (
            "close the drawer",
            "push the drawer shut",
            "push the drawer in by its handle",
            "slide the drawer back in",
            "shut the drawer",
        ),
    ),
    Task(
        "reach",
        (
            "reach the goal with the gripper",
            "move the hand to the target",
            "bring the gripper to the goal position",
            "go to the goal and leave the puck alone",
            "touch the target point with the hand",
        ),
    ),
    Task(
        "push",
        (
            "push the puck to the goal",
            "slide the puck along the table to the target",
            "shove the puck to where the goal is",
            "move the puck over the table to the goal",
            "push the puck onto the target",
        ),
    ),
    Task(
        "door-open",
        (
            "open the door",
            "pull the door open",
            "pull the door by its handle",
            "swing the door open",
            "get the door open",
        ),
    ),
    Task(
        "door-close",
        (
            "close the door",
            "push the door shut",
            "shut the door",
            "swing the door closed",
            "press the door closed by its handle",
        ),
    ),
    Task(
        "window-open",
        (
            "open the window",
            "slide the window open",
            "push the window open by its handle",
            "get the window open",
            "move the window pane to the open side",
        ),
    ),
    Task(
        "window-close",
        (
            "close the window",
            "slide the window shut",
            "push the window closed by its handle",
            "shut the window",
            "move the window pane to the closed side",
        ),
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
