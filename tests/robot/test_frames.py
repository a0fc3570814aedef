"""Frames of an episode, contact sheets and films; and where nothing can be drawn."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from PIL import Image, ImageSequence

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.frames import BAND, Frames, contact_sheet, frames_of, write_film
from rlrazor.experiments.robot.rollout import Demonstrated, demonstrate
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import World, episodes_of
from robot_worlds import Plane, Points


def shown(world: World, task: str, count: int = 24) -> tuple[Demonstrated, Frames]:
    (one,) = demonstrate(Simulators(world), episodes_of(world, task, 1, seed=1, purpose="test"))
    return one, frames_of(world, one.episode, one.actions, count)


def test_frames_are_of_the_start_the_end_and_between() -> None:
    one, frames = shown(Points(), "carry", count=5)
    assert frames.shape == (5, 32, 32, 3)
    steps = len(one.actions)
    for frame, step in zip(frames[:-1], np.linspace(0, steps, 5).round().astype(int)[:-1], strict=True):
        ((row, column),) = np.argwhere(frame[..., 0])
        x, y = one.history[step, -1, :2]  # where the point was, as the policy saw it
        assert (column, 31 - row) == (round((x + 1) / 2 * 31), round((y + 1) / 2 * 31))
    # It holds the box at the goal then.
    ((row, column),) = np.argwhere(frames[-1][..., 1])
    assert frames[-1][row, column, 0] == 255
    (goal,) = np.argwhere(frames[-1][..., 2])
    assert np.abs(goal - (row, column)).max() <= 3
    assert len(shown(Points(), "carry", count=500)[1]) == steps + 1


def test_a_contact_sheet_has_a_row_for_each_episode(tmp_path: Path) -> None:
    _, carried = shown(Points(), "carry")
    _, reached = shown(Points(), "reach")
    contact_sheet(tmp_path / "sheet.png", {"carried": carried, "reached": reached}, columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (32 + BAND), 4 * 32, 3)
    for row, frames in enumerate((carried, reached)):
        top = row * (32 + BAND)
        assert (sheet[top : top + BAND] < 128).any()  # its title
        for column, index in enumerate(np.linspace(0, len(frames) - 1, 4).round().astype(int)):
            cell = sheet[top + BAND : top + BAND + 32, 32 * column : 32 * (column + 1)]
            assert np.array_equal(cell, frames[index])


def test_a_film_shows_every_frame_and_stands_still_at_its_end(tmp_path: Path) -> None:
    _, frames = shown(Points(), "carry", count=6)
    write_film(tmp_path / "film.gif", frames, seconds=3.0)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.info["loop"] == 0
        shown_frames = [(np.asarray(one.convert("RGB")), one.info["duration"]) for one in ImageSequence.Iterator(film)]
    assert [duration for _, duration in shown_frames] == [500] * 5 + [1500]
    for (seen, _), frame in zip(shown_frames, frames, strict=True):
        assert np.abs(seen.astype(int) - frame).max() <= 4  # of the palette


class Dark(Plane):
    closed: ClassVar[list[str]] = []

    def render(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self.closed.append(self.task)


@dataclass(frozen=True)
class DarkWorld(Points):
    name: str = "dark"

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Dark(task)


def test_a_world_without_pictures_says_so_and_is_closed() -> None:
    (one,) = episodes_of(DarkWorld(), "carry", 1, seed=1, purpose="test")
    with pytest.raises(RazorError, match=r"^The world dark has no pictures: its environments do not render.$"):
        frames_of(DarkWorld(), one, np.zeros((2, 2), np.float32))
    assert Dark.closed == ["carry"]


def test_meta_world_is_drawn_or_it_is_said_why_not() -> None:
    """The drawer is open at the end: its green front has come to the left."""
    pytest.importorskip("metaworld")
    from rlrazor.experiments.robot.camera import HEIGHT, WIDTH, NoRenderingError
    from rlrazor.experiments.robot.metaworld import MetaWorld

    try:
        one, frames = shown(MetaWorld(), "drawer-open", count=2)
    except NoRenderingError as error:
        pytest.skip(str(error))
    assert one.success
    assert frames.shape == (2, HEIGHT, WIDTH, 3)
    red, green, blue = frames.astype(int).transpose(3, 0, 1, 2)
    drawer = (green > red + 20) & (green > blue + 20)
    assert 300 < drawer[0].sum() < drawer[1].sum()
    left = [np.quantile(np.argwhere(one)[:, 1], 0.15) for one in drawer]  # past the goal, a green ball
    assert left[1] < left[0] - 10  # pixels


NOWHERE = """
from rlrazor.experiments.robot.frames import frames_of
from rlrazor.experiments.robot.metaworld import MetaWorld
from rlrazor.experiments.robot.world import Episode
import numpy as np
try:
    frames_of(MetaWorld(), Episode("reach", 0, "reach"), np.zeros((1, 4), np.float32))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_where_nothing_can_be_drawn_is_one_sentence() -> None:
    pytest.importorskip("metaworld")
    # No vendor of EGL, no OSMesa where it looks for one: `MUJOCO_GL=osmesa` would break MuJoCo's own import.
    hidden = {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent", "MUJOCO_GL": "egl", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", NOWHERE]
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("NoRenderingError No frames can be rendered here (egl: ")
    assert done.stdout.endswith("for pictures; all else works without.\n")
    assert done.stderr == ""
