"""Run folders that survive a crash: a run is there whole or not at all.

    OUT/
      config.json, records.parquet, report.html, figures/     written by the experiment and the report
      studies/NAME.json, studies/NAME.parquet                 the same for an analysis with runs of its own
      runs/<run_id>/spec.json                                 what was run
                    records.jsonl                             a line per checkpoint
                    items.parquet                             what became of each item of its prior tasks: see `items`
                    questions.parquet                         of a base: what these items ask
                    seconds.json                              wall time, torch, machine: apart, as these may differ
                    weights/step-000938.safetensors           of the checkpoints that the store keeps
      .lock, .locks/<trajectory>                              who writes: one command, or many, each a run of its own

A run folder is written under a temporary name and renamed when complete, so killing the process at any moment loses
only the unfinished run, and what has the final name can be trusted. One that it replaces, because more weights are
wanted, steps aside until then, and is read there: other processes may be reading it, or the process may be killed.

Whose weights are kept is told to the store, before a run is trained, by `RunStore.keep`: those that later runs start
from or learn from, and those that a user has asked for.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import polars as pl
from safetensors import SafetensorError

from rlrazor.errors import RazorError
from rlrazor.runs import items as items_file
from rlrazor.runs.records import SCHEMA_VERSION, Record, RunSpec
from rlrazor.system import processes
from rlrazor.system.documents import checked, parse_json, read_json, read_text
from rlrazor.system.locks import locked
from rlrazor.system.machine import MACHINE
from rlrazor.system.writing import Output, atomic_path, clear_io_errors, leftovers, require_our_folder

if TYPE_CHECKING:
    from torch import Tensor  # which takes seconds to import, and a report needs no weights

TABLES = ("records", "sensitivity")
"""Of an experiment's own runs."""

WeightsMode = Literal["none", "final", "all"]
_ASIDE = ".old"
_PARTIAL = re.compile(rf"\.[0-9a-f]{{16}}(\.\d+|{re.escape(_ASIDE)})")  # a run that is written, by whom, or is replaced
_TRIES = 3  # to read a run: it may step aside after we looked for it, and be replaced after we looked there
_LOCKS = ".locks"
Weights = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Checkpoint:
    """What a training loop yields: the record, and what gives the weights it was measured on (name -> tensor).

    They are asked for before training goes on, and only where they are kept. Where they lie elsewhere there are none,
    and what is kept is an empty file. `items`: what became of each item of the prior tasks, of the columns
    `items.BESIDE`; None where that is not known. `questions`: of a base what these ask, of the columns `items.ASKED`.
    """

    record: Record
    weights: Callable[[], Weights] = dict
    items: pl.DataFrame | None = field(default=None, compare=False, repr=False)
    questions: pl.DataFrame | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Keep:
    """Of which checkpoints of a run the weights are kept: of all, of the last, and of those at these steps."""

    all: bool = False
    last: bool = False
    steps: frozenset[int] = frozenset()

    @classmethod
    def mode(cls, mode: WeightsMode) -> Self:
        """As the option --weights names it."""
        return cls(all=mode == "all", last=mode == "final")

    def __or__(self, other: Self) -> Self:
        return replace(self, all=self.all or other.all, last=self.last or other.last, steps=self.steps | other.steps)

    def wants(self, step: int, *, last: bool) -> bool:
        """Whether the weights of this step are kept; `last`: it is the run's last one."""
        return self.all or (self.last and last) or step in self.steps


@dataclass(frozen=True)
class FinishedRun:
    """A run as read back. `diverged_at` is the step at which the loss stopped being finite, if it did."""

    spec: RunSpec
    records: Sequence[Record]
    diverged_at: int | None


_held: set[Path] = set()  # folders that this process is writing to


class RunStore:
    """The runs of one output folder. `kept`: by run id, whose weights it keeps."""

    def __init__(self, folder: Path, kept: Mapping[str, Keep] | None = None) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.kept = dict(kept or {})

    def keep(self, spec: RunSpec, keep: Keep) -> None:
        """Keep these weights of a run too, when it is trained; until then it is not finished."""
        self.kept[spec.run_id] = self.keeps(spec) | keep

    def keeps(self, spec: RunSpec) -> Keep:
        """Which weights of a run are kept."""
        return self.kept.get(spec.run_id, Keep())

    @contextmanager
    def open_for_writing(self) -> Iterator[None]:
        """Make the folder, hold its lock, and clear what a killed process left half-written.

        Raises RazorError when the folder cannot be written or another process is writing to it. The kernel drops the
        lock with the process, so none is left behind by `kill -9`. Of several processes of one run the first holds it
        for all. Within such a block of this process another one changes nothing.
        """
        folder = self.folder.resolve()
        if folder in _held:
            yield
            return
        with ExitStack() as held:
            processes.in_first(lambda: held.enter_context(self._locked()))
            _held.add(folder)
            held.callback(_held.discard, folder)
            yield

    @contextmanager
    def open_for_runs(self, specs: Sequence[RunSpec]) -> Iterator[None]:
        """The same for these runs of one trajectory only: other processes may write other runs at the same time.

        Raises RazorError when another process trains them, or one has the whole folder by `open_for_writing`.
        """
        name, folder = specs[0].trajectory, self.folder.resolve()
        busy = f"Another razor process is training {specs[0].describe()} in {self.folder}: wait for it."
        with self._open(shared=True), locked(self.folder / _LOCKS / name, busy):
            own = {spec.run_id for spec in specs}
            self._clear(path for path in self._half_written() if path.name[1:17] in own)
            _held.add(folder)
            try:
                yield
            finally:
                _held.discard(folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._open():
            # Nobody else is here, so nobody holds these.
            self._clear([*self._half_written(), *leftovers(self.folder), *self.folder.glob(_LOCKS)])
            yield

    @contextmanager
    def _open(self, *, shared: bool = False) -> Iterator[None]:
        with clear_io_errors(self.folder):
            self.runs.mkdir(parents=True, exist_ok=True)
        busy = f"Another razor process is writing to {self.folder}. Wait for it, or choose another --out."
        with locked(self.folder / ".lock", busy, shared=shared):
            for path in islice(self.runs.glob("*/spec.json"), 1):  # no folder holds runs of two versions
                stored = None
                with suppress(RazorError, OSError):  # a damaged one is told of where it is read
                    stored = parse_json(read_text(path), path)
                _check_version(path, stored)
            yield

    def _half_written(self) -> list[Path]:
        with clear_io_errors(self.folder):
            return [path for path in self.runs.iterdir() if _PARTIAL.fullmatch(path.name)]

    def _clear(self, paths: Iterable[Path]) -> None:
        with clear_io_errors(self.folder):
            for path in paths:
                if path.suffix == _ASIDE and not os.path.lexists(run := self.runs / path.stem[1:]):
                    path.rename(run)  # the process was killed before the new one took its place
                else:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @property
    def outputs(self) -> list[Output]:
        """The files that an experiment writes beside its runs."""
        studies = self.folder / "studies"
        there = [path for path in studies.glob("*") if path.suffix in (".json", ".parquet")]
        files = [self.folder / name for name in ("config.json", "teachers.json", *(f"{one}.parquet" for one in TABLES))]
        return [(path, "json" if path.suffix == ".json" else "table") for path in (*files, *there)]

    def is_finished(self, spec: RunSpec) -> bool:
        """Whether the run is there, with the weights that are kept of it."""
        return any(self._is_there(spec) for _ in range(_TRIES))

    def _is_there(self, spec: RunSpec) -> bool:
        if not (self._folder_of(spec) / "records.jsonl").exists():
            return False
        if (keep := self.keeps(spec)) == Keep():
            return True
        records = self.read(spec).records
        wanted = [record.step for record in records if keep.wants(record.step, last=record is records[-1])]
        return all(self.weights_path(spec, step).exists() for step in {*wanted, *keep.steps})

    def write(
        self, spec: RunSpec, checkpoints: Sequence[Checkpoint], *, seconds: float, diverged_at: int | None = None
    ) -> None:
        """Write a finished run, replacing an earlier one of the same spec; raises RazorError when the disk is full."""
        from safetensors.torch import save

        stored = {"schema_version": SCHEMA_VERSION, **spec.as_json(), "diverged_at": diverged_at}
        keep, last = self.keeps(spec), checkpoints[-1]
        kept = [one for one in checkpoints if keep.wants(one.record.step, last=one is last)]
        with self._made(spec.run_id) as folder:
            _write_bytes(folder / "spec.json", json.dumps(stored, indent=1, allow_nan=False).encode())
            took = {"seconds": round(seconds, 3), "torch": version("torch"), "machine": MACHINE}
            _write_bytes(folder / "seconds.json", json.dumps(took).encode())
            lines = [json.dumps(asdict(checkpoint.record), allow_nan=False) for checkpoint in checkpoints]
            _write_bytes(folder / "records.jsonl", "".join(f"{line}\n" for line in lines).encode())
            items = items_file.of_run((one.record.step, one.items) for one in checkpoints)
            for name, of_items in ((items_file.NAME, items), (items_file.QUESTIONS, last.questions)):
                if of_items is not None:
                    _write_bytes(folder / name, items_file.to_bytes(of_items))
            if kept:
                (folder / "weights").mkdir()
            for checkpoint in kept:
                # Bytes of our own writing rather than safetensors' save_file, for the fsync and the clear error.
                path = folder / "weights" / _weights_name(checkpoint.record.step)
                _write_bytes(path, save(dict(checkpoint.weights())))

    def files(self, run_id: str, steps: Iterable[int] | None = None) -> dict[str, bytes]:
        """The files of a finished run, by their names in its folder; of weights those of `steps`, by default all."""
        folder, names = self.runs / run_id, None if steps is None else {_weights_name(step) for step in steps}
        found = [path for path in folder.rglob("*") if path.is_file()]
        wanted = [path for path in found if names is None or path.suffix != ".safetensors" or path.name in names]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in wanted}

    def take(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Write a run that was finished elsewhere, of its `files`; otherwise as `write`."""
        with self._made(run_id) as folder:
            for name, data in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                _write_bytes(folder / name, data)

    @contextmanager
    def _made(self, run_id: str) -> Iterator[Path]:
        """A folder that becomes the run's when the block ends well."""
        target, aside = self.runs / run_id, self._aside(run_id)
        partial = target.with_name(f".{run_id}.{os.getpid()}")
        with clear_io_errors(self.folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                yield partial
                require_our_folder(target, "spec.json")
                if target.exists():
                    target.rename(aside)
                partial.rename(target)
            finally:
                with suppress(RazorError):  # whoever writes next clears it
                    self._clear(path for path in (partial, aside) if os.path.lexists(path))

    def read(self, spec: RunSpec) -> FinishedRun:
        """Read a finished run back; raises RazorError when a file of it is damaged."""
        for _ in range(_TRIES - 1):
            with suppress(RazorError):
                return self._read(spec)
        return self._read(spec)

    def _read(self, spec: RunSpec) -> FinishedRun:
        from rlrazor.runs.run_files import StoredSpec, read_records

        folder = self._folder_of(spec)
        with self._told(folder):
            stored = parse_json(read_text(folder / "spec.json"), folder / "spec.json")
        _check_version(folder / "spec.json", stored)
        with self._told(folder):
            found = checked(StoredSpec, stored, folder / "spec.json")
            if found.spec().run_id != spec.run_id:
                raise RazorError("spec.json is of another run.")
            records = read_records(folder / "records.jsonl")
            if any(record.run_id != spec.run_id for record in records):
                raise RazorError("records.jsonl has a record of another run.")
            return FinishedRun(spec, records, found.diverged_at)

    def has_items(self, run_id: str) -> bool:
        """Whether it is known what became of each item of the run's prior tasks."""
        return (self.runs / run_id / items_file.NAME).exists()

    def items(self, run_id: str) -> pl.DataFrame:
        """What became of each item at the run's checkpoints, of the columns `items.SCHEMA`.

        Raises RazorError where the file of it is damaged, or there is none: see `has_items`.
        """
        folder = self.runs / run_id
        if not self.has_items(run_id):
            raise RazorError(
                f"Of the run {folder} it is not known what became of each item of its prior tasks: it has none, or was "
                f"made by an rlrazor that did not keep that. In the latter case delete the folder {self.runs}, and run "
                "the same command again."
            )
        with self._told(folder):
            return items_file.read(folder / items_file.NAME)

    def questions(self, run_id: str) -> pl.DataFrame | None:
        """What the items ask, of the columns `items.ASKED`; None where the run's folder does not say.

        Raises RazorError where the file of it is damaged.
        """
        path = self.runs / run_id / items_file.QUESTIONS
        with self._told(path.parent):
            return items_file.read(path, items_file.ASKED) if path.exists() else None

    def seconds(self, spec: RunSpec) -> float:
        """Wall time of the training that served this run, measuring included; a prefix has that of the whole.

        Raises RazorError when the file of it is damaged.
        """
        from rlrazor.runs.run_files import StoredSeconds

        folder = self._folder_of(spec)
        with self._told(folder):
            return read_json(folder / "seconds.json", StoredSeconds).seconds

    def made_by(self, specs: Iterable[RunSpec] | None = None) -> list[tuple[str, str]]:
        """With which torch on which machines these runs were made, or all that are there, as far as they say."""
        from rlrazor.runs.run_files import StoredSeconds

        folders = self.runs.glob("[!.]*") if specs is None else map(self._folder_of, specs)
        found = set()
        for folder in folders:
            with suppress(RazorError):
                took = read_json(folder / "seconds.json", StoredSeconds)
                found |= {(took.torch, took.machine)} if took.torch and took.machine else set()
        return sorted(found)

    @staticmethod
    @contextmanager
    def _told(folder: Path) -> Iterator[None]:
        """Say of what is wrong with a file of a run what to do about it."""
        try:
            yield
        except RazorError as error:
            raise RazorError(
                f"The run folder {folder} cannot be read. {error} Delete it and run the same command again."
            ) from error

    def weights_path(self, spec: RunSpec, step: int) -> Path:
        """Where the weights of a checkpoint are, if they were kept."""
        return self._folder_of(spec) / "weights" / _weights_name(step)

    def kept_steps(self, spec: RunSpec) -> frozenset[int]:
        """The steps of a run whose weights are there."""
        steps = (
            path.stem.removeprefix("step-") for path in (self._folder_of(spec) / "weights").glob("step-*.safetensors")
        )
        return frozenset(int(step) for step in steps if step.isdecimal())  # not a copy that somebody has put there

    def load_weights(self, spec: RunSpec, step: int) -> "dict[str, Tensor]":
        """The weights of a checkpoint, from safetensors; raises RazorError when missing or damaged."""
        from safetensors.torch import load_file

        path = self.weights_path(spec, step)
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise RazorError(
                f"The weights {path} cannot be read ({error}). Delete the folder {path.parents[1]} and run the same "
                "command again."
            ) from error

    def write_table(self, name: str, table: pl.DataFrame) -> Path:
        """Write `name`.parquet atomically."""
        path = self.folder / f"{name}.parquet"
        # Through memory: polars reports a full disk as an error of its own, which says less.
        parquet = io.BytesIO()
        table.write_parquet(parquet)
        with atomic_path(path) as partial:
            _write_bytes(partial, parquet.getvalue())
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write `name`.json atomically."""
        path = self.folder / f"{name}.json"
        with atomic_path(path) as partial:
            _write_bytes(partial, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
        return path

    def remove(self, *names: str) -> None:
        """Remove files of the output folder that no longer apply; missing ones are none's concern."""
        with clear_io_errors(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def partial_folder(self, spec: RunSpec) -> Path:
        """Where a trainer keeps what an unfinished run goes on from, removed when the run is stored."""
        return self.folder / ".unfinished" / spec.run_id

    def discard_unfinished(self) -> None:
        """Remove what runs of other settings, or of an earlier command, would have gone on from."""
        if processes.rank() == 0:
            shutil.rmtree(self.folder / ".unfinished", ignore_errors=True)

    def _folder_of(self, spec: RunSpec) -> Path:
        """Of a run that is just being replaced, or was when its process was killed, the earlier one's."""
        folder, aside = self.runs / spec.run_id, self._aside(spec.run_id)
        return aside if not folder.exists() and aside.exists() else folder

    def _aside(self, run_id: str) -> Path:
        return self.runs / f".{run_id}{_ASIDE}"


def _check_version(path: Path, stored: Any) -> None:
    """Raise RazorError where a spec.json has another schema than ours."""
    found = stored.get("schema_version") if isinstance(stored, dict) else None
    if type(found) is int and found != SCHEMA_VERSION:
        raise RazorError(
            f"The run folder {path.parent} has schema version {found}, this rlrazor reads {SCHEMA_VERSION}. Choose "
            "another --out."
        )


def _weights_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
