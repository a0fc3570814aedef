"""Recorded episodes, for worlds that have no scripted expert: FOLDER/TASK/*.npz, of each an episode that succeeded.

An array `images` (T, height, width, 3) of uint8 has what was seen before each step, one `actions` (T, A) what was done,
within the world's bounds. Of another route, such as another policy's, they lie in FOLDER/TASK/ROUTE.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.cache import DAMAGE
from rlrazor.experiments.robot.rollout import HISTORY, Demonstrated
from rlrazor.experiments.robot.world import FIRST, Episode, Task, World


def recorded_in(folder: Path | None, world: World, task: Task, route: str = FIRST) -> Iterator[Demonstrated]:
    """The recordings of a task, in the order of their names; instructions take turns.

    Raises RazorError where there are none, or one is damaged or of another world.
    """
    if folder is None:
        raise RazorError(f"{world.name} has no scripted experts: name a folder of recorded episodes, --recordings DIR.")
    own = folder / task.name if route == FIRST else folder / task.name / route
    paths = sorted(own.glob("*.npz"))
    if not paths:
        raise RazorError(f"There are no recorded episodes in {own}: put them there as .npz files.")
    for number, path in enumerate(paths):
        instruction = task.paraphrases[number % len(task.paraphrases)]
        yield _read(path, world, Episode(task.name, number, instruction))


def _read(path: Path, world: World, episode: Episode) -> Demonstrated:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, actions = file["images"], file["actions"].astype(np.float32)
    except DAMAGE as error:
        raise RazorError(f"{path} is no recorded episode with images and actions: delete it.") from error
    shape = (len(actions), *world.observation_shape)
    if images.shape != shape or images.dtype != np.uint8 or actions.shape[1:] != world.action_low.shape:
        raise RazorError(
            f"{path} is of another world: images are {images.shape} of {images.dtype} and actions {actions.shape}, "
            f"where {shape} of uint8 and {(len(actions), *world.action_low.shape)} are needed."
        )
    if not np.isfinite(actions).all():
        raise RazorError(f"{path} has an action that is not a number: delete it.")
    before = [np.maximum(np.arange(len(images)) - back, 0) for back in reversed(range(HISTORY))]
    history = np.stack([images[rows] for rows in before], axis=1)
    within = np.clip(actions, world.action_low, world.action_high)
    return Demonstrated(episode, history, within, within, success=True)
