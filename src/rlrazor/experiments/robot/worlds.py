"""The worlds by their names."""

from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.config import LIBERO_SUITES, META_WORLD, SIMPLER
from rlrazor.experiments.robot.world import World


def world_of(name: str, recordings: Path | None = None) -> World:
    """The world of this name; `recordings`, for one without experts, is a folder of recorded episodes.

    Imports no simulator. Raises RazorError for an unknown name.
    """
    if name == META_WORLD:
        from rlrazor.experiments.robot.metaworld import MetaWorld

        return MetaWorld()
    if name == SIMPLER:
        from rlrazor.experiments.robot.vla.simpler import Simpler

        return Simpler(recordings=recordings)
    if name in LIBERO_SUITES:
        from rlrazor.experiments.robot.vla.libero import Libero

        return Libero(name, recordings=recordings)
    raise RazorError(f"Unknown world {name!r:.60}. Worlds: {META_WORLD}, {', '.join(LIBERO_SUITES)}, {SIMPLER}.")
