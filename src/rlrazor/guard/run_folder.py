"""The output folder of a Trainer: the checkpoints of one training run in it, and what a monitor logged of that run.

A folder may hold the checkpoints of several runs, and a log the rows of several. A monitor gives its run an id, which
is in every row and in the razor.json of the checkpoints saved while it watches. Of other checkpoints their own logs
tell: what was logged up to one checkpoint of a run is how the log of a later one begins.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.guard.log_schema import Label, LogRow, TrainerState, is_monitors
from rlrazor.guard.outputs import LOG, MARK, STATE, hash_of
from rlrazor.lm.weight_files import check_weights
from rlrazor.system import jsonl
from rlrazor.system.documents import checked, parse_json, read_json, read_text

MEASURE = "measure the checkpoints here, with --base and --prompts"
ANEW = "measure the checkpoints anew"
_NUMBER = re.compile(r"checkpoint-0*(\d+)$")
_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")
_SAVING = 60_000_000_000  # nanoseconds from the weights to the trainer's state of one save, or one copy


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder that a Trainer saved at a step. `history`: what it had logged until then, a mapping for each entry.

    `run`: the id of the run that was watched as it was saved. `overwritten`: it says so, and yet another run that was
    not watched has written over it since. `settings`: of its Trainer; `written`: when, in nanoseconds.
    """

    path: Path
    step: int
    history: Sequence[Mapping[str, Any]]
    run: str | None
    overwritten: bool
    settings: Mapping[str, Any]
    written: int


@dataclass(frozen=True)
class Run:
    """The checkpoints of a run in order of training, all with weights; those left out are in `notes`, with the reason.

    `log`: of the monitor, whether it is there or not. `history`: what the run had logged when the last was saved, of
    which every one's own log is the beginning. `id`: of the monitor that watched it, None where none did as far as its
    checkpoints say. `labelled`: whether any checkpoint of the folder says.
    """

    folder: Path
    log: Path
    id: str | None
    labelled: bool
    checkpoints: Sequence[SavedCheckpoint]
    history: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def run_in(folder: Path, wanted: str | None = None, log: Path | None = None) -> Run:
    """The run that `wanted` is the id of, or else the one that wrote last. `log`: a monitor's that is not LOG in it.

    Raises RazorError where there is none, or no checkpoint of it is whole, or there is no such log.
    """
    if log is not None and not log.is_file():
        raise RazorError(f"There is no log {log}: name the file that a ForgettingMonitor was given as its log.")
    log = log or folder / LOG
    found, notes = _read_all(folder)
    if not found and notes:
        raise RazorError(f"No checkpoint of {folder} can be read. {' '.join(notes)}")
    if not found:
        raise RazorError(
            f"{folder} has no checkpoint-N folder with a {STATE}, and no records.parquet of a sweep. Give the output "
            "folder of a Trainer that saved checkpoints."
        )
    newest = _newest(folder, log, found, wanted)
    members, run, last = _of_its_run(newest, found)
    others = [one for one in found if one not in members]
    tied = [one for one in others if (one.written, one.run) == (newest.written, newest.run)]
    if tied and wanted is None:
        raise RazorError(
            f"{newest.path.name} and {tied[0].path.name} are of two runs, and the times of their files do not say "
            "which is the later: move the checkpoints of the other away."
        )
    notes += [*_why_left_out(others, newest, run), *_doubts(members, newest)]
    whole = []
    for one in sorted(members, key=lambda one: (one.step, one.path.name)):
        try:
            check_weights(one.path, "it")
            whole.append(one)
        except (RazorError, OSError) as error:
            notes.append(f"{one.path.name} is left out: {error}")
    if not whole:
        raise RazorError(f"No checkpoint of {folder} can be taken. {' '.join(notes)}")
    labelled = any(one.run is not None or one.overwritten for one in found)
    return Run(folder, log, run or wanted, labelled, whole, last.history, notes)


def rows_of(run: Run) -> tuple[list[LogRow], list[str]]:
    """What is logged of a run, in the order it was written, and cautions.

    A row of `razor watch` tells by its weights which checkpoint it is of, whatever run that is of; a monitor's is of
    the run that it names. Raises RazorError where there are none, or those of several runs cannot be told apart.
    """
    if not run.log.exists() and run.id is None:
        raise RazorError(
            f"There is no {run.log}, so nothing is known of forgetting: train with a ForgettingMonitor, let `razor "
            f"watch` measure the run, or {MEASURE}."
        )
    rows = rows_in(run.log) if run.log.exists() else []
    watched = [row for row in rows if row.weights is not None]
    try:
        monitored, notes = _monitors_rows(run, [row for row in rows if is_monitors(row)])
    except RazorError:
        if not watched:
            raise
        monitored, notes = [], []
    return [*monitored, *watched], notes


def _monitors_rows(run: Run, rows: list[LogRow]) -> tuple[list[LogRow], list[str]]:
    """Of the rows that monitors wrote, those of the run."""
    path = run.log
    ids = _ids(rows)
    chosen, notes = run.id, []
    if chosen is None and run.labelled:
        others = f"; --run {ids[0]} takes the checkpoints of the run that was" if ids else ""
        raise RazorError(
            f"{run.checkpoints[-1].path.name} is of a run that no monitor watched, so nothing is known of its "
            f"forgetting: {MEASURE}{others}."
        )
    if chosen is None and ids:
        chosen = ids[0]
        more = f", the last of {len(ids)} runs in it," if len(ids) > 1 else ""
        notes.append(
            f"No checkpoint says which run it is of: the rows of the run {chosen}{more} are taken from {path.name}."
        )
    if chosen is not None:
        # Of an earlier version's log that the run went on with, the first rows have no id.
        rows = [row for row in rows if row.run in (chosen, None)]
        for earlier in sorted(path.parent.glob(f"{escape(path.stem)}-of-earlier-run-*{escape(path.suffix)}")):
            with suppress(RazorError):
                rows = [row for row in rows_in(earlier) if row.run == chosen] + rows
        if not rows:
            has = f"has those of {', '.join(ids)}" if ids else "has none"
            raise RazorError(f"There are no rows of the run {chosen}: {path} {has}. To do without, {MEASURE}.")
    _check_one_monitors(rows, path)
    if chosen is None and _is_older(path, rows, run.checkpoints):
        notes.append(
            f"{path.name} is older than the checkpoints: unless the folder was copied, it is of another run than they "
            "are."
        )
    return rows, notes


# Reading


def _read_all(folder: Path) -> tuple[list[SavedCheckpoint], list[str]]:
    """The checkpoints that can be read, each once, and why others cannot."""
    found: list[SavedCheckpoint] = []
    notes: list[str] = []
    seen: set[str] = set()
    # A link to another checkpoint is the same one; the plain folders come first.
    paths = sorted(folder.glob("checkpoint-*"), key=lambda path: (path.is_symlink(), path.name))
    for path in paths:
        if not (path.is_dir() or path.is_symlink()) or os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        try:
            one = _read(path)
        except FileNotFoundError:
            notes.append(f"{path.name} is left out: it has no {STATE}, which a Trainer writes last.")
            continue
        except (OSError, RazorError) as error:
            notes.append(f"{path.name} is left out: its {STATE} is damaged ({error}).")
            continue
        number = _NUMBER.match(path.name)
        if number and int(number[1]) != one.step:
            notes.append(f"{path.name} is of step {one.step}, by its {STATE}.")
        found.append(one)
    return found, notes


def _read(path: Path) -> SavedCheckpoint:
    """Raises FileNotFoundError where there is no state, and RazorError where it is damaged."""
    file = path / STATE
    written = file.stat().st_mtime_ns
    # NaN is equal to nothing, not to itself as another checkpoint has it: its name is.
    state = parse_json(read_text(file), file, nan_as_text=True)
    checked(TrainerState, state, file)
    history = [entry for entry in state["log_history"] if "step" in entry]
    number = _NUMBER.match(path.name)
    step = state.get("global_step", int(number[1]) if number else None)
    if step is None:
        raise RazorError("it has no global_step.")
    run, overwritten = _label(path, step)
    return SavedCheckpoint(
        path, step, history, run, overwritten, {name: state.get(name) for name in _SETTINGS}, written
    )


def _label(path: Path, step: int) -> tuple[str | None, bool]:
    """The run that a checkpoint says it is of, and whether that is no longer so.

    A run without a label that wrote over the checkpoint has saved another state of its trainer there.
    """
    try:
        label = read_json(path / MARK, Label)
        overwritten = label.step != step or label.state != hash_of(path / STATE)
    except (OSError, RazorError):
        return None, False
    return None if overwritten else label.run, overwritten


def rows_in(path: Path) -> list[LogRow]:
    """All that a log holds. A last line that a killed process left half-written is not one."""

    def damaged(where: str, error: ValueError) -> RazorError:
        return RazorError(f"{where} is damaged, as {error}: {ANEW}.")

    rows: list[LogRow] = []
    for where, row in jsonl.strict(read_text(path, mend=ANEW), path, say=damaged, torn=True):
        if isinstance(row, dict) and "step" not in row:
            raise damaged(where, ValueError("it lacks 'step'"))
        rows.append(checked(LogRow, row, where, mend=ANEW))
    return rows


def _ids(rows: Sequence[LogRow]) -> list[str]:
    """The runs that rows are of, the last to write first."""
    return list(dict.fromkeys(row.run for row in reversed(rows) if row.run is not None))


def _is_older(path: Path, rows: Sequence[LogRow], checkpoints: Sequence[SavedCheckpoint]) -> bool:
    """Whether a checkpoint was written after rows of later steps were."""
    last = max((row.step for row in rows), default=0)
    return any(one.step < last and path.stat().st_mtime_ns < one.written for one in checkpoints)


# Telling runs apart


def _newest(folder: Path, log: Path, found: Sequence[SavedCheckpoint], wanted: str | None) -> SavedCheckpoint:
    """The checkpoint that was written last, of the run that is wanted if any says which it is of."""
    labels = sorted({one.run for one in found if one.run is not None})
    ids: list[str] = []
    if wanted is not None and labels:
        if wanted not in labels:
            raise RazorError(f"No checkpoint of {folder} is of the run {wanted}. There are {', '.join(labels)}.")
        found = [one for one in found if one.run == wanted]
    else:
        with suppress(RazorError):  # which is raised where the rows are needed
            ids = _ids(rows_in(log))
        if set(ids) & set(labels):
            # The rows of other runs have been moved away for a later one, whatever the times of copied files say.
            found = [one for one in found if one.run in (None, *ids)]
    return max(found, key=lambda one: (one.written, one.run in ids[:1], one.step))


def _of_its_run(
    newest: SavedCheckpoint, found: Iterable[SavedCheckpoint]
) -> tuple[list[SavedCheckpoint], str | None, SavedCheckpoint]:
    """The checkpoints of the run that wrote one of them, the run's id, and the last of them."""
    members, run, last = [newest], newest.run, newest
    for one in sorted(found, key=lambda one: (one.written, one.step), reverse=True):
        if one is newest or (run and one.run and run != one.run) or not _go_together(one, last):
            continue
        members.append(one)
        run = run or one.run
        last = max(last, one, key=lambda one: (one.step, len(one.history)))
    return members, run, last


def _go_together(one: SavedCheckpoint, other: SavedCheckpoint) -> bool:
    """Whether two checkpoints are of one run: the log of the later one goes on where that of the earlier one ends.

    Where both say that they are, it is enough that their logs do not speak against it. Logs are little evidence where
    nothing was logged yet.
    """
    earlier, later = sorted((one, other), key=lambda one: (one.step, len(one.history)))
    begins = later.history[: len(earlier.history)] == earlier.history
    if not begins or any(entry["step"] < earlier.step for entry in later.history[len(earlier.history) :]):
        return False
    out_of_order = earlier.step < later.step and earlier.written > later.written
    doubts = (not earlier.history, earlier.settings != later.settings, out_of_order)
    return (one.run is not None and one.run == other.run) or sum(doubts) < 2


def _why_left_out(others: Sequence[SavedCheckpoint], newest: SavedCheckpoint, run: str | None) -> Iterator[str]:
    """Checkpoints of other runs, by name."""
    than = newest.path.name + (f" (run {run})" if run else ", the newest")
    for label in dict.fromkeys(one.run for one in sorted(others, key=lambda one: one.step)):
        names = _names([one for one in others if one.run == label])
        if label is None:
            yield f"Left out: {names}, whose own logs are not those of the run of {than}."
        elif label == run:
            yield (
                f"Left out: {names}, whose own logs are not those of the run of {than}, though it has the same id: "
                "training was started again from an earlier checkpoint, or another run has written over them."
            )
        else:
            yield f"Left out: {names}, of another run than {than}; --run {label} takes that run."


def _doubts(members: Sequence[SavedCheckpoint], newest: SavedCheckpoint) -> Iterator[str]:
    """What the times of files say against the checkpoints that are taken."""
    if old := [one for one in members if one.step > newest.step and one.written < newest.written]:
        yield (
            f"Written before {newest.path.name}: {_names(old)}. If training was started again from an earlier "
            "checkpoint, that is of the first try."
        )
    # A Trainer writes its state after the weights: a state that is much older is of another save.
    if cut_short := [one for one in members if _weights_written(one.path) > one.written + _SAVING]:
        yield (
            f"Weights newer than the {STATE} beside them: {_names(cut_short)}. Unless the folder was copied, a save "
            "was cut short, and the scores are of the weights before."
        )


def _weights_written(folder: Path) -> int:
    """When the last of them was, in nanoseconds; 0 without any."""
    return max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors") if path.is_file()), default=0)


def _names(checkpoints: Sequence[SavedCheckpoint]) -> str:
    return ", ".join(one.path.name for one in sorted(checkpoints, key=lambda one: one.step))


def _check_one_monitors(rows: Sequence[LogRow], path: Path) -> None:
    """Raise RazorError where rows are of two monitors, or of two runs without ids."""
    measured = [row for row in rows if row.error is None]
    steps = [row.step for row in measured if row.run is None]
    if any(later <= step for step, later in itertools.pairwise(steps)):
        raise RazorError(f"{path} has rows of several runs, which cannot be told apart: {MEASURE}.")
    if len({(row.prompts_hash, row.probe) for row in measured}) > 1:
        raise RazorError(f"{path} has rows of several monitors, of other prompts or another probe: {MEASURE}.")
