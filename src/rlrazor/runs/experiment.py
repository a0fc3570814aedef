"""What an experiment is to the runner: the runs to finish, phase by phase, how one is trained, and what it costs.

    Config --phases--> RunSpecs --train--> Checkpoints        (the runner stores them, and makes the tables)

An experiment is one folder: `config` (a frozen dataclass of settings, whose fields' metadata is the command line's
help, and presets), `methods`, its task or tasks, `train`, `evaluate`, and `experiment`, a class with the members below.
Nothing here is known of what is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlrazor.runs.records import JSON, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore, WeightsMode


@dataclass(frozen=True)
class Phase:
    """Runs to finish next: "finish these, then ask me again".

    What they start from or learn from need not be listed: the runner finishes that first. `keep`: whose weights a later
    phase will start from, where it is known before that phase. `table`: the file that the runs' records go into, with
    these `columns` beside them. `teachings`: who was chosen to teach these runs; see `teachers`.
    """

    title: str
    specs: Sequence[RunSpec]
    keep: WeightsMode = "none"
    table: str = "records"
    columns: Mapping[str, Any] = field(default_factory=dict)
    teachings: Sequence[JSON] = ()


@dataclass(frozen=True)
class Cost:
    """Of a run: its updates, and the checkpoints that are measured."""

    steps: int
    checkpoints: int


class Experiment(Protocol):
    """What the runner asks of an experiment; it must be picklable, as `train` runs in workers."""

    @property
    def name(self) -> str:
        """Of specs and files."""

    @property
    def title(self) -> str:
        """For people."""

    @property
    def config(self) -> type:
        """The frozen dataclass of settings; `methods` is one of them."""

    @property
    def presets(self) -> Mapping[str, Any]:
        """Configs by name."""

    @property
    def methods(self) -> Mapping[str, Any]:
        """Methods by name."""

    def phases(self, config: Any, store: RunStore | None) -> Iterator[Phase]:
        """The runs of a config: bases, the sweep, students of the best of it; or stage after stage.

        When it is asked to go on, the runs of the last phase are in the store. Without a store nothing is run, as in a
        dry run: what later runs depend on is stood in for.
        """

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Train a run, and measure it as it goes: the same spec gives the same bits.

        What the run starts from and whom it imitates is in the store. Raises sweep.DivergedError.
        """

    def cost(self, spec: RunSpec) -> Cost:
        """Of this run."""

    def describe(self, config: Any) -> Mapping[str, Any]:
        """What the report wants to know: `new_task`, `prior_task`, `labels`, `drift`, `data`, `versions` ..."""
