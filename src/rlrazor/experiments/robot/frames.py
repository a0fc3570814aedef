"""What an episode looks like: its frames, a contact sheet of several episodes, and a short film of one.

An episode is simulated again, with the actions that were taken, to the same bits; frames are made of that.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.simulators import denormals
from rlrazor.experiments.robot.world import Episode, Floats, World

if TYPE_CHECKING:
    import gymnasium

COUNT = 24
COLOURS = 64  # of a film's palette: a third of the bytes of 256, and wood is still wood
BAND = 14  # pixels for the line above an episode's frames

Frames = NDArray[np.uint8]
"""(F, height, width, 3) of RGB."""


def frames_of(world: World, episode: Episode, actions: Floats, count: int = COUNT) -> Frames:
    """At most `count` frames of an episode that took these actions (T, A): its start, its end, and evenly between.

    Raises RazorError, a sentence, where nothing can be rendered: `camera.NoRenderingError` in Meta-World. Raises
    RazorError too where the world has no pictures.
    """
    wanted = {round(step) for step in np.linspace(0, len(actions), count).tolist()}
    frames = []
    with denormals(), closing(world.environment(episode.task)) as environment:
        environment.reset(seed=episode.seed, options={"cell": episode.cell})
        for step in range(len(actions) + 1):
            if step in wanted:
                frames.append(_frame(world, environment))
            if step < len(actions):
                environment.step(actions[step])
    return np.stack(frames)


def _frame(world: World, environment: "gymnasium.Env[Any, Any]") -> Frames:
    try:
        frame = environment.render()
    except NotImplementedError:
        frame = None
    if not isinstance(frame, np.ndarray):
        raise RazorError(f"The world {world.name} has no pictures: its environments do not render.")
    return frame


def contact_sheet(path: Path, episodes: Mapping[str, Frames], columns: int = 6) -> None:
    """Write a PNG: a row for each episode, its title above `columns` of its frames, from the first to the last."""
    height, width = next(iter(episodes.values())).shape[1:3]
    sheet = Image.new("RGB", (columns * width, len(episodes) * (height + BAND)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, frames) in enumerate(episodes.items()):
        top = row * (height + BAND)
        draw.text((2, top + 1), title, fill="black")
        for column, index in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(frames[index]), (column * width, top + BAND))
    sheet.save(path, optimize=True)


def write_film(path: Path, frames: Frames, seconds: float = 3.0) -> None:
    """Write a GIF that takes so long, stands still at its end for a second, and starts again."""
    pictures = [Image.fromarray(frame).quantize(COLOURS) for frame in frames]
    each = max(20, round(1000 * seconds / len(pictures)))  # ms; browsers slow down what is faster
    still = [*[each] * (len(pictures) - 1), each + 1000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=still, loop=0, optimize=True)
