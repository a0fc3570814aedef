"""What the runs of a command would take: counted here, from timings of a few updates and measurements.

An experiment times what is its own (`Timed.trial`); the counting is the same for all.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rlrazor.errors import RazorError
from rlrazor.runs.experiment import Cost, Experiment, Phase
from rlrazor.runs.records import JSON, RunSpec
from rlrazor.runs.runner import with_roots
from rlrazor.runs.store import Keep, WeightsMode
from rlrazor.runs.sweep import trajectories
from rlrazor.system import cores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RUN_BYTES = 4 * 4096  # small files' share of the disk


@dataclass(frozen=True)
class Sizes:
    """Bytes. `memory`: of a process; `record`: of a checkpoint's record, in its run and in the table; `weights`: of a
    checkpoint's; `base`: of a base's that is kept; `model`: of the model that a run leaves; `passing`: of what there is
    while a process trains, for an interrupted run to go on from.
    """

    memory: int
    record: int
    weights: int
    base: int
    model: int = 0
    passing: int = 0


@dataclass(frozen=True)
class Trial:
    """What was timed: `run`, the seconds of one run; `once`, by what it is, the seconds of what a process does once for
    all its runs that need the same; `error`, the share by which they may be off; `threads` of a process; `timed`, in
    words.
    """

    run: Callable[[RunSpec, Cost], float]
    error: float
    sizes: Sizes
    timed: str
    once: Callable[[RunSpec], Mapping[Hashable, float]] = lambda spec: {}
    threads: int = 1


class Timed(Experiment, Protocol):
    """An experiment that can say what it would take."""

    def trial(self, config: Any) -> Trial:
        """Train and measure a little. Raises RazorError, with the reason, where that cannot be done here."""


@dataclass(frozen=True)
class Counts:
    """How much there is to do; runs in the folder are not looked for. `trained`: those that begin no longer one."""

    runs: int
    trained: int
    steps: int
    checkpoints: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Measured:
    """What that takes. Wall seconds on this machine as busy as it is now, give or take `error`, a share;
    `memory_bytes` of each process; `disk_bytes` of what stays; `passing_bytes` while it trains.
    """

    seconds: float
    error: float
    memory_bytes: int
    disk_bytes: int
    passing_bytes: int
    timed: str

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.seconds + other.seconds,
            max(self.error, other.error),
            max(self.memory_bytes, other.memory_bytes),
            self.disk_bytes + other.disk_bytes,
            max(self.passing_bytes, other.passing_bytes),
            "; ".join(dict.fromkeys([*self.timed.split("; "), *other.timed.split("; ")])),
        )


@dataclass(frozen=True)
class DryRun:
    """Counts, and what they take; None where nothing could be timed, and then `missing` says why."""

    counts: Counts
    measured: Measured | None
    missing: str = ""

    def as_json(self) -> JSON:
        """All in one object; null what was not measured."""
        fields = Measured.__dataclass_fields__
        found = dict.fromkeys(fields) | {"timed": ""} if self.measured is None else asdict(self.measured)
        return {**asdict(self.counts), **found, "missing": self.missing}

    def __add__(self, other: "DryRun") -> "DryRun":
        both = None if self.measured is None or other.measured is None else self.measured + other.measured
        return DryRun(self.counts + other.counts, both, self.missing or other.missing)


def planned(experiment: Experiment, config: Any) -> list[Phase]:
    """All phases of a config, as far as they are known before any run is trained."""
    return list(experiment.phases(config, None))


def specs_of(phases: Iterable[Phase]) -> list[RunSpec]:
    """The runs of these phases, and those that they begin with, each once."""
    return with_roots([spec for phase in phases for spec in phase.specs])


def estimate(
    experiment: Timed, config: Any, phases: Sequence[Phase], *, jobs: int = 1, weights: WeightsMode = "none"
) -> DryRun:
    """Count the runs of these phases, and time a little. Runs that are prefixes of others cost nothing."""
    specs = specs_of(phases)
    trained = [(one.longest, experiment.cost(one.longest)) for one in trajectories(specs)]
    counts = Counts(
        runs=len(specs),
        trained=len(trained),
        steps=sum(cost.steps for _, cost in trained),
        checkpoints=sum(cost.checkpoints for _, cost in trained),
    )
    stored = sum(experiment.cost(spec).checkpoints for spec in specs)
    try:
        trial = experiment.trial(config)
    except RazorError as error:
        return DryRun(counts, None, str(error))
    bases = sum(not spec.chain for spec in specs)
    seconds = sum(trial.run(spec, cost) for spec, cost in trained)
    processes = jobs + 1 if jobs > 1 else 1  # the workers, and the one that measures the bases
    seconds += _once(trial, [spec for spec, _ in trained], processes)
    at_once = min(jobs, max(1, len(trained) - bases), max(1, cores.available() // trial.threads))
    tuned, sizes = len(specs) - bases, trial.sizes
    kept = sum(_kept(experiment, phases, weights).values())
    disk = len(specs) * RUN_BYTES + stored * sizes.record + bases * sizes.base + tuned * sizes.model
    measured = Measured(
        seconds=seconds / at_once,
        error=trial.error,
        memory_bytes=sizes.memory,
        disk_bytes=disk + kept * sizes.weights,
        passing_bytes=sizes.passing * jobs,
        timed=trial.timed,
    )
    return DryRun(counts, measured)


def _once(trial: Trial, trained: Iterable[RunSpec], processes: int) -> float:
    """The seconds of what each process does once, or as many of them as there are runs that need it."""
    needed: dict[Hashable, list[float]] = {}
    for spec in trained:
        for what, seconds in trial.once(spec).items():
            needed.setdefault(what, []).append(seconds)
    return sum(max(of) * min(processes, len(of)) for of in needed.values())


def _kept(experiment: Experiment, phases: Sequence[Phase], weights: WeightsMode) -> dict[RunSpec, int]:
    """Of how many checkpoints of each run the weights stay, but for bases, whose last ones always do."""
    kept: dict[RunSpec, int] = {}
    for phase in phases:
        keep = Keep.mode(phase.keep) | Keep.mode(weights)
        for spec in phase.specs:
            own = experiment.cost(spec).checkpoints if keep.all else int(keep.last)
            kept[spec] = max(kept.get(spec, 0), own if spec.chain else 0)
    return kept


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
