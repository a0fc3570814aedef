"""What the experiments' commands share: training what is missing and counting it, teachers, who made a folder."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.report import Results
from rlrazor.runs import sweep
from rlrazor.runs.records import RunSpec
from rlrazor.runs.store import RunStore, WeightsMode
from rlrazor.system import processes
from rlrazor.system.documents import parse_json, read_text
from rlrazor.system.progress import SweepProgress

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MACHINE = f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}"


@dataclass(frozen=True)
class Reproduction:
    """What a command made. `trained` and `kept` count runs; `diverged` describes those that were cut short."""

    results: Results
    report: Path
    trained: int
    kept: int
    diverged: Sequence[str]
    seconds: float


class Work:
    """The runs of one command: where they go, how they are trained, how many checkpoints each has, and the count."""

    def __init__(
        self,
        folder: Path,
        trainer: sweep.Train,
        count_checkpoints: Callable[[RunSpec], int],
        console: Console,
        *,
        jobs: int = 1,
        weights: WeightsMode = "none",
    ) -> None:
        self.store, self.trainer, self.console = RunStore(folder), trainer, console
        self.count_checkpoints, self.jobs, self.weights = count_checkpoints, jobs, weights
        self.asked: set[RunSpec] = set()
        self.trained: set[RunSpec] = set()
        self.diverged: list[str] = []

    @property
    def kept(self) -> int:
        """Runs that were there before."""
        return len(self.asked) - len(self.trained)

    def finish(
        self,
        specs: Sequence[RunSpec],
        title: str,
        weights: WeightsMode | None = None,
        trainer: sweep.Train | None = None,
    ) -> None:
        """Train those of the runs that are missing; `weights` and `trainer` instead of the command's own."""
        weights = weights or self.weights
        todo = sweep.missing(specs, self.store, weights)
        self.asked.update(specs)
        self.trained.update(todo)
        total = sum(self.count_checkpoints(trajectory.longest) for trajectory in sweep.trajectories(todo))
        with SweepProgress(title, len(todo), total, self.console, self.count_checkpoints) as progress:
            sweep.run(specs, trainer or self.trainer, self.store, jobs=self.jobs, weights=weights, progress=progress)

    def discard_unfinished(self) -> None:
        """Remove what runs of other settings, or of an earlier command, would have gone on from."""
        if processes.rank() == 0:
            shutil.rmtree(self.store.partial_folder(), ignore_errors=True)

    def account_for(self, specs: Sequence[RunSpec]) -> dict[str, Any]:
        """What these finished runs took, and which were cut short."""
        diverged = [spec.describe() for spec in specs if self.store.read(spec).diverged_at is not None]
        self.diverged += diverged
        seconds = sum(self.store.seconds(trajectory.longest) for trajectory in sweep.trajectories(specs))
        return {"core_seconds": round(seconds), "diverged": diverged}


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def choose_teachers(
    specs: Sequence[RunSpec], store: RunStore, method: str, accuracy: float
) -> dict[int, dict[str, Any]]:
    """Per seed the best policy that `method` trained, as the `teacher` param of the runs that imitate it.

    The best: of the checkpoints with a new-task score of at least `accuracy`, the one with the highest prior score; if
    none gets there, the one with the highest new-task score. Ties go to the first in the grid.
    """
    teachers = {}
    for seed in dict.fromkeys(spec.seed for spec in specs):
        runs = [store.read(spec) for spec in specs if spec.method == method and spec.seed == seed]
        candidates = [(run.spec, record) for run in runs for record in run.records]
        good = [(spec, record) for spec, record in candidates if record.new >= accuracy]
        if good:
            spec, record = max(good, key=lambda candidate: candidate[1].prior_mean)
        else:
            spec, record = max(candidates, key=lambda candidate: candidate[1].new)
        teachers[seed] = {"method": spec.method, "params": dict(spec.params), "seed": seed, "step": record.step}
    return teachers


def spec_of(teacher: Mapping[str, Any], experiment: str) -> RunSpec:
    """The teacher's own run."""
    return RunSpec(experiment, teacher["method"], teacher["params"], teacher["seed"])


def teaching(teacher: Mapping[str, Any], experiment: str, student: str) -> dict[str, Any]:
    """A teacher and the method that imitates it, for teachers.json."""
    run_id = spec_of(teacher, experiment).run_id
    return {**{key: teacher[key] for key in ("seed", "method", "step")}, "run_id": run_id, "student": student}


def with_teachers(table: pl.DataFrame, specs: Sequence[RunSpec], experiment: str) -> pl.DataFrame:
    """The table of these runs, with the checkpoint that a run imitates as `teacher`: "RUN_ID/STEP", null for none.

    As it is where none of the runs has a teacher.
    """
    taught = {spec.run_id: spec.params["teacher"] for spec in specs if "teacher" in spec.params}
    if not taught:
        return table
    names = {run_id: f"{spec_of(of, experiment).run_id}/{of['step']}" for run_id, of in taught.items()}
    return table.with_columns(teacher=pl.col("run_id").replace_strict(names, default=None, return_dtype=pl.String))


def versions_of(*packages: str) -> dict[str, str]:
    """Python's and these packages' versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("rlrazor", "torch", *packages)}}


def warn_of_another_machine(store: RunStore, console: Console) -> None:
    """Say so when the folder's earlier runs were made elsewhere: the same spec gives the same bits on one machine."""
    path = store.folder / "config.json"
    try:
        earlier = parse_json(read_text(path), path)
        made_by = (earlier["versions"]["torch"], earlier["machine"])
    except (RazorError, KeyError, TypeError):  # which the report says, if it is still so
        return
    if made_by != (version("torch"), MACHINE):
        console.print(
            f"The runs in {store.folder} were made with torch {made_by[0]} on {made_by[1]}, these will be with torch "
            f"{version('torch')} on {MACHINE}: their last digits may differ.",
            style="yellow",
        )
