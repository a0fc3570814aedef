"""Frames of a simulation without a screen, by EGL or, where that does not work, by OSMesa, in this process.

MuJoCo decides which of them it is when it is imported, by the variable MUJOCO_GL, and does not look whether it works.
Here it is tried, the first that works is taken, and MUJOCO_GL is heard where it is set.
"""

import atexit
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlrazor.errors import RazorError

HEIGHT, WIDTH = 150, 200
WAYS = ("egl", "osmesa")
AT, DISTANCE, AZIMUTH, ELEVATION = (0.0, 0.7, 0.12), 1.25, 160, -30  # m and degrees: table, gripper, drawer and door

TIMEOUT = 60  # seconds for a trial, which takes one

Frame = NDArray[np.uint8]

_TRIAL = """
import sys
from importlib import import_module
import mujoco
try:
    context = import_module(f"mujoco.{sys.argv[1]}").GLContext(8, 8)
    context.make_current()
    mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
    context.free()
except Exception as error:
    print(" ".join(str(error).split()).rstrip(".") + ".")
    sys.exit(1)
"""


class NoRenderingError(RazorError):
    """Neither EGL nor OSMesa works here: pictures are all that this costs."""


class Camera:
    """Looks at the table of one model, from the side."""

    def __init__(self, model: Any) -> None:
        _context().make_current()
        self.model = model
        self.scene = mujoco.MjvScene(model, 1000)
        for costly in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scene.flags[costly] = 0
        self.drawn = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self.options, self.camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self.camera.lookat[:], self.camera.distance = AT, DISTANCE
        self.camera.azimuth, self.camera.elevation = AZIMUTH, ELEVATION

    def see(self, data: Any) -> Frame:
        """A frame (HEIGHT, WIDTH, 3) of RGB, of a state whose positions are worked out."""
        _context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.drawn)
        everything, place = mujoco.mjtCatBit.mjCAT_ALL, mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        mujoco.mjv_updateScene(self.model, data, self.options, None, self.camera, everything, self.scene)
        mujoco.mjr_render(place, self.scene, self.drawn)
        frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, place, self.drawn)
        return np.ascontiguousarray(frame[::-1])  # OpenGL begins with the lowest row


@cache
def _context() -> Any:
    """Where this process draws; raises NoRenderingError, with what each way says, where none works."""
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    reasons = []
    for way in (asked,) if asked in WAYS else WAYS:
        if (failure := _tried(way)) is None:
            os.environ["PYOPENGL_PLATFORM"] = way
            context = import_module(f"mujoco.{way}").GLContext(WIDTH, HEIGHT)
            atexit.register(context.free)  # before MuJoCo ends EGL, which is registered already
            return context
        reasons.append(f"{way}: {failure}")
    raise NoRenderingError(
        f"No frames can be rendered here ({' '.join(reasons)}). Install Mesa's EGL (libegl1 and libgl1-mesa-dri) or "
        "OSMesa (libosmesa6) for pictures; all else works without."
    )


def _tried(way: str) -> str | None:
    """Why this way does not work, if it does not, found out in another process.

    A driver may crash, and MuJoCo and PyOpenGL stay with the first library that they have loaded.
    """
    environment = {**os.environ, "PYOPENGL_PLATFORM": way, "MUJOCO_GL": "disable"}
    command = [sys.executable, "-c", _TRIAL, way]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {TIMEOUT} s."
    if done.returncode == 0:
        return None
    said = done.stdout.strip() if done.returncode == 1 else ""
    return said or f"ended a process with exit code {done.returncode}."
