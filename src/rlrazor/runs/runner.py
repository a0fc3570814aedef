"""Running an experiment: what is missing is trained, counted, and put into tables. Running it again continues it.

    run(experiment, config, options)
      for phase in experiment.phases(config, store):
          whose weights have to be kept?          a base's last ones, always; what `phase.keep` and --weights say
          what do the phase's runs start or learn from, and is it there with its weights?      else train that first
          train what is missing of the phase      `sweep`, in one process or several
      records.parquet and other tables, teachers.json, config.json

Knows an experiment by its protocol only, and no report.
"""

import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.runs import lines, sweep
from rlrazor.runs.experiment import Experiment, Phase
from rlrazor.runs.progress import SweepProgress
from rlrazor.runs.records import JSON, RunSpec, to_table
from rlrazor.runs.store import TABLES, Keep, RunStore, WeightsMode
from rlrazor.system import processes
from rlrazor.system.documents import parse_json, read_text
from rlrazor.system.machine import MACHINE

if TYPE_CHECKING:
    from rlrazor.runs.ray_cluster import Cluster, RayWorkers

SEVERAL = "; "  # between machines, where runs were made on several


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the result of a run.

    `jobs`: processes, where there is no `cluster`. `line`: train this one only.
    """

    out: Path
    jobs: int = 1
    weights: WeightsMode = "none"
    preset: str = ""
    command: str = ""
    line: int | None = None
    cluster: "Cluster | None" = None

    def workers(self) -> "sweep.Workers | RayWorkers":
        """Who trains: processes of this machine, or tasks of a cluster."""
        if self.cluster is None:
            return sweep.Workers(self.jobs)
        from rlrazor.runs.ray_cluster import RayWorkers

        return RayWorkers(self.cluster)


@dataclass(frozen=True)
class Done:
    """What a command did: the runs that it is about, those of them that it trained, and what was cut short."""

    runs: frozenset[RunSpec] = frozenset()
    new: frozenset[RunSpec] = frozenset()
    diverged: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def trained(self) -> int:
        """Runs trained."""
        return len(self.new)

    @property
    def kept(self) -> int:
        """Runs that were there before."""
        return len(self.runs) - len(self.new)

    def __add__(self, other: "Done") -> "Done":
        diverged = tuple(dict.fromkeys([*self.diverged, *other.diverged]))
        return Done(self.runs | other.runs, self.new | other.new, diverged, self.seconds + other.seconds)


class Runner:
    """Finishes the runs of an experiment, and counts them. `phases`: those that are finished."""

    def __init__(self, experiment: Experiment, options: Options, console: Console) -> None:
        self.experiment, self.options, self.console = experiment, options, console
        self.store = RunStore(options.out)
        self.phases: list[Phase] = []
        self.asked: set[RunSpec] = set()
        self.trained: set[RunSpec] = set()
        self.diverged: list[str] = []
        self.started = time.perf_counter()

    def finish(self, phases: Iterable[Phase]) -> list[RunSpec]:
        """Finish these phases, one after another; returns all of their runs, in order."""
        specs: dict[RunSpec, None] = {}
        with self.options.workers() as workers:
            for phase in phases:
                self._keep(phase.specs, Keep.mode(phase.keep))
                self._prepare(phase.title, self._missing(phase.specs), workers)
                self._train(phase.title, phase.specs, workers)
                self.asked.update(of.spec for spec in phase.specs for of in spec.chain)
                specs |= dict.fromkeys(phase.specs)
                self.phases.append(phase)
        if self.options.cluster is not None:
            warn_of_several_machines(self.store, list(self.asked), self.console)
        return list(specs)

    def _keep(self, specs: Iterable[RunSpec], keep: Keep) -> None:
        """Tell the store what to keep of these runs. A base is what others start from: its last weights stay."""
        for spec in specs:
            self.store.keep(spec, keep | Keep.mode(self.options.weights) | Keep(last=not spec.chain))

    def _prepare(self, title: str, specs: Sequence[RunSpec], workers: "sweep.Workers | RayWorkers") -> None:
        """Finish what these runs start from and whom they imitate, with the weights of that step."""
        lacking = self._missing(self._keep_ancestors(specs))
        if lacking:
            self._keep_again(lacking)
            self._prepare(title, lacking, workers)
            self._train(f"weights for {title}", lacking, workers)

    def _keep_ancestors(self, specs: Iterable[RunSpec]) -> list[RunSpec]:
        """Tell the store to keep the weights that these runs start or learn from; returns the runs of these."""
        found = lines.ancestors(specs)
        for of in found:
            self._keep([of.spec], Keep(steps=frozenset({of.step})))
        return list(dict.fromkeys(of.spec for of in found))

    def _keep_again(self, specs: Iterable[RunSpec]) -> None:
        """Tell the store to keep what was kept of runs that are trained again."""
        for spec in specs:
            self.store.keep(spec, Keep(steps=self.store.kept_steps(spec)))

    def finish_line(self, line: lines.Line, phases: Iterable[Phase]) -> None:
        """Finish the run of a line, while other processes may be at others. What it needs has to be there.

        Raises RazorError where it is not, or another process is training it. One that is finished is left as it is.
        """
        waves = lines.Waves(self.options.weights)
        for at, phase in enumerate(phases):
            self._keep(phase.specs, Keep.mode(phase.keep))
            here = waves.of(phase)
            if at < line.phase:  # which decides what comes next
                self._require(line, phase.specs)
                continue
            # All of them before anything is trained: a teacher of two levels keeps the weights of both steps.
            before = list(phase.specs)
            while before:
                before = self._keep_ancestors(before)
            wave = here[-1 - line.back] if line.back < len(here) else []
            for trajectory in wave[line.place : line.place + 1]:
                specs = trajectory.specs
                self._require(line, [of.spec for of in lines.ancestors(specs)])
                with self.store.open_for_runs(specs), sweep.Workers(1) as workers:
                    self._keep_again(specs)
                    self._train(f"line {line.number}", specs, workers)
            return

    def _require(self, line: lines.Line, specs: Sequence[RunSpec]) -> None:
        if lacking := self._missing(specs):
            raise RazorError(
                f"Line {line.number} needs {lacking[0].describe()}, which is not finished in {self.store.folder}: wait "
                "for the lines above it."
            )

    def _missing(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        return processes.in_first(lambda: sweep.missing(specs, self.store))

    def _train(self, title: str, specs: Sequence[RunSpec], workers: "sweep.Workers | RayWorkers") -> None:
        """Train those of the runs that are missing."""

        def count(spec: RunSpec) -> int:
            return self.experiment.cost(spec).checkpoints

        todo = self._missing(specs)
        self.asked.update(specs)
        self.trained.update(todo)
        total = sum(count(trajectory.longest) for trajectory in sweep.trajectories(todo))
        with SweepProgress(title, len(todo), total, self.console, count) as progress:
            workers.run(specs, self.experiment.train, self.store, progress)

    def account_for(self, specs: Sequence[RunSpec]) -> JSON:
        """What these finished runs took, and which were cut short."""
        diverged = [spec.describe() for spec in specs if self.store.read(spec).diverged_at is not None]
        self.diverged += diverged
        seconds = sum(self.store.seconds(trajectory.longest) for trajectory in sweep.trajectories(specs))
        machines = dict.fromkeys(machine for _, machine in self.store.made_by(specs)) or [MACHINE]
        return {"core_seconds": round(seconds), "diverged": diverged, "machine": SEVERAL.join(machines)}

    def describe(self, config: Any, specs: Sequence[RunSpec]) -> JSON:
        """What is stored beside a table of these runs: the settings, the command, names for the report."""
        return {
            "experiment": self.experiment.name,
            "title": self.experiment.title,
            "preset": self.options.preset,
            "command": self.options.command,
            "config": asdict(config),
            "versions": versions_of(),
            **self.experiment.describe(config),
            **self.account_for(specs),
        }

    def done(self) -> Done:
        """The count."""
        runs, new = frozenset(self.asked), frozenset(self.trained)
        return Done(runs, new, tuple(self.diverged), time.perf_counter() - self.started)


def run(experiment: Experiment, config: Any, options: Options, console: Console) -> Done:
    """Train what is missing of a config's runs in `options.out`; write its tables and its description.

    Of a single line, see `lines`, only its run is trained, and nothing is written beside it.

    Raises RazorError when the folder is another experiment's or cannot be written, or a worker dies: finished runs
    stay.
    """
    runner = Runner(experiment, options, console)
    if options.line is not None:
        line = lines.find(list(experiment.phases(config, None)), options.line, options.weights)
        require_own(runner.store, experiment)
        warn_of_another_machine(runner.store, options, console)
        runner.finish_line(line, experiment.phases(config, runner.store))
        return runner.done()
    with runner.store.open_for_writing():
        require_own(runner.store, experiment)
        warn_of_another_machine(runner.store, options, console)
        runner.finish(experiment.phases(config, runner.store))
        runner.store.discard_unfinished()
        _write_findings(runner, config)
    return runner.done()


def _write_findings(runner: Runner, config: Any) -> None:
    """All together at the end: until then the folder describes the command before."""
    store = runner.store
    phases = {name: [one for one in runner.phases if one.table == name] for name in TABLES}
    # An earlier command's, which may not fit this one.
    store.remove("teachers.json", *(f"{name}.parquet" for name, own in phases.items() if not own))
    for name, own in phases.items():
        if own:
            store.write_table(name, table_of(own, store, config.methods))
    teachings = [teaching for phase in phases["records"] for teaching in phase.teachings]
    if teachings:
        store.write_json("teachers", teachings)
    swept = with_roots([spec for phase in phases["records"] for spec in phase.specs])
    store.write_json("config", runner.describe(config, swept))


def table_of(phases: Sequence[Phase], store: RunStore, methods: Sequence[str]) -> pl.DataFrame:
    """The records of these phases' runs, bases first, then seed by seed and method by method.

    Phases with other columns come one after another, each with its bases.
    """
    tables = []
    columns = [dict(phase.columns) for phase in phases]
    order = {name: number for number, name in enumerate(methods)}
    staged = any(len(spec.chain) > 1 for phase in phases for spec in phase.specs)
    since = {"before": lambda spec: spec.starts_from} if staged else {}
    for own in [one for number, one in enumerate(columns) if one not in columns[:number]]:
        specs = [spec for phase in phases if phase.columns == own for spec in phase.specs]
        specs.sort(key=lambda spec: (spec.seed, order.get(spec.method, -1)))
        rows = with_roots(specs)
        stages = [before.spec for spec in specs for before in spec.chain[1:]]  # some are of other phases
        known = dict.fromkeys([*rows, *stages])
        table = to_table(((spec, store.read(spec).records) for spec in known), since)
        table = table.filter(pl.col("run_id").is_in([spec.run_id for spec in rows])) if stages else table
        tables.append(table.with_columns(**{name: pl.lit(value) for name, value in own.items()}))
    return pl.concat(tables, how="diagonal_relaxed")


def with_roots(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """The runs that these begin with, and these."""
    return list(dict.fromkeys([*(spec.root for spec in specs), *specs]))


def versions_of(*packages: str) -> dict[str, str]:
    """Python's and these packages' versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("rlrazor", "torch", *packages)}}


def _described(store: RunStore) -> dict[str, Any]:
    """What an earlier command has written beside its table; empty where that cannot be read, as the report will say."""
    path = store.folder / "config.json"
    try:
        return dict(parse_json(read_text(path), path))
    except (RazorError, TypeError, ValueError):
        return {}


def require_own(store: RunStore, experiment: Experiment) -> None:
    """Raise RazorError where the tables in the folder, and its report, are another experiment's."""
    earlier = _described(store)
    if (name := earlier.get("experiment", experiment.name)) != experiment.name:
        raise RazorError(
            f"{store.folder} has the tables of another experiment, {earlier.get('title', name)!s:.60}, which these "
            "would replace: choose another --out."
        )


def warn_of_another_machine(store: RunStore, options: Options, console: Console) -> None:
    """Say so when the folder's earlier runs were made elsewhere: the same spec gives the same bits on one machine.

    On a cluster it is not known before where the next ones will be: see `warn_of_several_machines`.
    """
    made_by = store.made_by()
    if not made_by:
        with suppress(KeyError, TypeError):
            earlier = _described(store)
            made_by = [(earlier["versions"]["torch"], earlier["machine"])]
    own = (version("torch"), MACHINE)
    if options.cluster is None and set(made_by) - {own}:
        console.print(
            f"The runs in {store.folder} were made {_in_words(made_by)}, these will be {_in_words([own])}: their last "
            "digits may differ.",
            style="yellow",
        )


def warn_of_several_machines(store: RunStore, specs: Iterable[RunSpec], console: Console) -> None:
    """Say so where these runs are there, and not all of them from one kind of machine."""
    if len(made_by := store.made_by(specs)) > 1:
        console.print(
            f"The runs in {store.folder} were made {_in_words(made_by)}: their last digits may differ.", style="yellow"
        )


def _in_words(made_by: Iterable[tuple[str, str]]) -> str:
    return " and ".join(f"with torch {torch} on {machine}" for torch, machine in made_by)
