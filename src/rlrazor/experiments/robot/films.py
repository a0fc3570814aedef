"""Films of a policy, for the report: an episode of the new task and one of a prior task, kept beside the runs.

OUT/films/RUN/new.gif, prior.gif, sheet.png          of the run's last checkpoint, or of a base
OUT/films/missing.txt                                why there are none: nothing can be drawn here
"""

import shutil
import tempfile
from pathlib import Path

import torch

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.evaluate import Settings, lanes_for
from rlrazor.experiments.robot.frames import Frames, contact_sheet, frames_of, write_film
from rlrazor.experiments.robot.policy import Acting, Policy
from rlrazor.experiments.robot.rollout import roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import World
from rlrazor.runs.records import RunSpec
from rlrazor.system import phases
from rlrazor.system.writing import clear_io_errors

FOLDER = "films"
MISSING = "missing.txt"
FILMING = "filming"


def keep(folder: Path, spec: RunSpec, world: World, policy: Policy) -> None:
    """Film a run's policy in the first held-out episode of the new task and of the first prior one, sampled.

    Where nothing can be drawn, that is said, and kept for the report; it costs the films and no more.
    """
    settings = Settings.of(spec)
    tasks = {"new": settings.new_task, "prior": settings.prior_tasks[0]}
    films = folder / FOLDER
    phases.at(FILMING)
    try:
        filmed = {name: _film(world, settings, task, policy) for name, task in tasks.items()}
    except RazorError as error:
        phases.say(f"There will be no films: {error}")
        _write_missing(films, str(error))
        return
    with clear_io_errors(folder):
        films.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=films, prefix=".") as partial:
            own = Path(partial) / spec.run_id
            own.mkdir()
            for name, frames in filmed.items():
                write_film(own / f"{name}.gif", frames)
            contact_sheet(own / "sheet.png", {tasks[name]: frames for name, frames in filmed.items()})
            shutil.rmtree(films / spec.run_id, ignore_errors=True)
            own.rename(films / spec.run_id)


def _film(world: World, settings: Settings, task: str, policy: Policy) -> Frames:
    episodes = settings.held_out(world, task, 1)
    with Simulators(world) as simulators:
        (rolled,) = roll_out(simulators, episodes, Acting(policy), sampled=True, lanes=lanes_for(settings.episodes))
    actions = policy.actions_of(torch.from_numpy(rolled.tokens)).numpy()
    return frames_of(world, rolled.episode, actions)


def _write_missing(films: Path, sentence: str) -> None:
    with clear_io_errors(films.parent):
        films.mkdir(parents=True, exist_ok=True)
        (films / MISSING).write_text(f"{sentence}\n", "utf-8")
