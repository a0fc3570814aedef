"""`razor watch`: each checkpoint of a run measured as it is saved, from another process, device or machine.

For trainers that take no `ForgettingMonitor`, or models whose layers are split over processes. Nothing is written into
a checkpoint, and no file of the run but the log, and beside it what a served base drew: a training run goes on whatever
happens here.

The log is the only memory. A checkpoint whose weights it has is not measured again, nor one of a step that a monitor
has in it; a row is written once all of it is known. What a monitor adds meanwhile, and what it takes out as training
resumes, is seen before each checkpoint; of one step it writes before the trainer saves.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrazor.analysis.forecast import FORWARD
from rlrazor.errors import RazorError, cause_of
from rlrazor.guard.base_side import kls_of
from rlrazor.guard.budget import Budget
from rlrazor.guard.log_schema import LogRow
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.measuring import ReadBase
from rlrazor.guard.reading import Reading
from rlrazor.guard.served import AddressedBase, ServedBase
from rlrazor.guard.verdict import Verdict
from rlrazor.guard.watch_command import OnBudgetCommand
from rlrazor.guard.watch_layout import StepFolder, model_in, steps_in, why_none
from rlrazor.guard.watch_log import WatchLog
from rlrazor.guard.watch_whole import (
    SETTLE,
    Files,
    files_of,
    is_finished,
    is_old,
    missing_of,
    training_of,
    weights_digest,
    with_config,
)
from rlrazor.lm import compute, encoding
from rlrazor.lm.kl import Drift
from rlrazor.lm.probes import probe_hash
from rlrazor.system import durations, interrupts
from rlrazor.system.locks import locked

_WHICH = " (folders such as checkpoint-50, global_step_50, step_50, step-50 or iter_0000050)"
GIVE_UP = 60.0  # seconds without a change after which what is missing of a checkpoint is said
Say = Callable[[str], None]


@dataclass(frozen=True)
class WatchRequest:
    """A run's folder, the log to add to, the base and what it is loaded as, and what is measured and judged.

    `every`: only checkpoints of steps that are multiples of it. `command`: run once, when the budget is exceeded.
    """

    folder: Path
    log: Path
    base: str | AddressedBase
    dtype: str
    on: MeasuredOn
    rule: Budget
    every: int = 1
    command: OnBudgetCommand | None = None


@dataclass(frozen=True)
class WatchedCheckpoint:
    """One to measure: its step, name, and the folder of its model or adapter; `weights` tells these from others'."""

    step: int
    name: str
    model: Path
    weights: str


@dataclass(frozen=True)
class Until:
    """How long is watched, and how often is looked: seconds. `once`: what is there, `idle`: without anything new."""

    interval: float = 10.0
    once: bool = False
    idle: float | None = None


@dataclass
class _Seen:
    """What is known of a step's folder. `since`: when its files last changed, by our clock.

    `closed` and `said`: the files with which it was done with, and about which something was said.
    """

    files: Files
    since: float
    closed: Files | None = None
    said: Files | None = None

    @property
    def is_closed(self) -> bool:
        return self.closed == self.files


def _read(request: WatchRequest) -> ReadBase | ServedBase:
    """The base's side, computed once."""
    if isinstance(request.base, AddressedBase):
        return ServedBase.of_source(request.base, request.dtype, request.on, request.log)
    return ReadBase.of_source(request.base, request.dtype, request.on, request.rule.law)


class Watch:
    """Measures the checkpoints of a run, in order of step. `say` hears sentences that are no readings.

    To be used within `begun`, which holds the log's lock and reads the base.
    """

    def __init__(self, request: WatchRequest, say: Say) -> None:
        self.request, self.say = request, say
        self.log: WatchLog
        self.read: ReadBase | ServedBase
        self.is_waiting = False  # for a checkpoint that is still being written, or may be
        self.is_over = False  # the trainer's last step was saved while we watched, and is measured
        self.active = time.monotonic()  # when a file last changed, a checkpoint was measured, or looking began
        self._seen: dict[str, _Seen] = {}
        self._at_first: frozenset[str] = frozenset()  # names of steps that were there as we began
        self._is_run = False  # the command
        self._ended = ""  # the newest checkpoint, if it was there as we began and is of the last step of its training
        self._notes: list[str] = []
        self._is_empty = True  # of steps, also of those that are no multiples of `every`
        self._is_away = False  # the folder, as a network's may be
        self._is_behind = False  # slower than checkpoints are deleted

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the log, read the base, and go on from what the log has.

        Raises RazorError for a base that cannot be loaded or is not the law's, a log that cannot be written, is
        another's or of another base, prompts or probe, and where another process watches.
        """
        request = self.request
        self._at_first = frozenset(step.name for step in steps_in(request.folder))
        busy = f"Another razor watch writes to {request.log}: wait for it, or give a --log of its own."
        with locked(request.log.with_name(f".{request.log.name}.lock"), busy):
            self.read = _read(request)
            compute.free()
            probe = probe_hash(request.on.settings, request.on.generic)
            provenance = {"base": self.read.digest, "probe": probe, "prompts_hash": request.on.prompts_hash}
            self.log = WatchLog(request.log, provenance, self.say)
            if isinstance(self.read, ServedBase):
                self._keep(self.read)
            self._go_on()
            self.active = time.monotonic()  # reading a large base takes longer than many an --idle
            yield

    def _keep(self, base: ServedBase) -> None:
        if base.is_drawn_anew and self.log.measured:
            self.say(
                f"[razor] {base.kept.path.name}, what the served base drew for this log, is not there or is of other "
                "settings: it has drawn anew, and KLs differ from those before by that as well."
            )
        base.keep()

    def _go_on(self) -> None:
        """Take up what the log has."""
        if (last := self.log.last) is not None:
            count = len({row.step for row in self.log.measured})
            readings = "a reading, of" if count == 1 else f"{count} readings, up to"
            self.say(f"[razor] {self.log.path.name} has {readings} step {last.step}: nothing is measured twice.")
            self._act_on(last)

    def _look_at_log(self) -> None:
        """Each row that a monitor has added is judged, like the last of those that were there at first."""
        for row in self.log.look_again():
            self._act_on(row)

    @property
    def verdict(self) -> Verdict | None:
        """On the last checkpoint in the log; None where there is none, or no budget."""
        return None if (last := self.log.last) is None else self._judged(last)

    def _judged(self, row: LogRow) -> Verdict | None:
        """By the budget of now, which need not be the one that it was logged with."""
        prompts = self.request.on.prompts_hash if row.whole else ""
        count = row.prompts.get(FORWARD, self.read.side.whole[FORWARD])
        return self.request.rule.judged(row.kls, prompts, count).verdict

    def _act_on(self, row: LogRow) -> None:
        """Run the command, if a row that we have not written ourselves is over the budget, and it was not run yet."""
        if self._is_due(self._judged(row)):
            whose = {name: getattr(row, name) for name in ("checkpoint", "weights") if getattr(row, name) is not None}
            of = {"run": self.log.run, "step": row.step, **whose, **self.log.provenance}
            self.log.add({**of, "on_budget": self._command.digest})
            ended = self._run_command(row.step, self._saved_at(row.step))
            self.say(f"[razor] step {row.step}, which is in the log, is over the budget: {ended}.")

    def _saved_at(self, step: int) -> Path | None:
        """The folder of a step's model; None where there is none, as before the trainer has saved it."""
        return next((model_in(one) for one in self._steps() or () if one.step == step), None)

    @property
    def _command(self) -> OnBudgetCommand:
        assert self.request.command is not None
        return self.request.command

    def _is_due(self, verdict: Verdict | None) -> bool:
        """Whether the command is to be run now: never twice, whatever restarts there are, and of whatever log."""
        if self.request.command is None or verdict is not Verdict.ABOVE or self._is_run:
            return False
        return all(row.on_budget != self.request.command.digest for row in self.log.rows)

    def _run_command(self, step: int, checkpoint: Path | None) -> str:
        self._is_run = True
        return self._command.run(step, checkpoint)

    def readings(self, until: Until) -> Iterator[tuple[Reading, dict[str, Any], str]]:
        """Of each checkpoint, as soon as it is whole: the reading, its row of the log, and what follows from it.

        Raises RazorError where the folder holds several runs, or with `once` no checkpoint at all.
        """
        is_told = False
        while True:
            if (one := self.next(once=until.once)) is not None:
                if (found := self.measure(one)) is not None:
                    yield *found, self._done_about(*found, one)
                continue
            if not self._seen and until.once and not self.is_waiting:
                raise RazorError(f"{self._nothing_in('')}.")
            if not self._seen and not is_told:
                is_told = True
                self.say(f"[razor] {self._nothing_in(' yet')}; waiting for the first.")
            if not self.is_waiting and (until.once or self.is_over):
                return
            if self._ended and not self.is_waiting:
                self.say(
                    f"[razor] {self._ended}, the last of its training, was there before watching began: watching goes "
                    "on, in case it is trained further. End it with Ctrl-C, or watch with --once or --idle."
                )
                self._ended = ""
            if until.idle is not None and time.monotonic() - self.active > until.idle:
                self.say(f"[razor] nothing new was saved for {durations.about(until.idle)}: watching ends here.")
                return
            time.sleep(min(until.interval, 1.0) if until.once else until.interval)

    def _nothing_in(self, yet: str) -> str:
        if self._is_empty:
            return f"{self.request.folder} has no checkpoints{yet}{_WHICH}"
        every = self.request.every
        return f"{self.request.folder} has checkpoints, and none{yet} of a step that is a multiple of --every {every}"

    # Looking

    def next(self, *, once: bool = False) -> WatchedCheckpoint | None:
        """The first checkpoint that is whole and not in the log. `once`: nothing is waited for but SETTLE seconds.

        Once one was deleted before it was measured it is the last, until none is left: whoever is slower than the
        trainer would look at those alone that are about to be deleted. Raises RazorError where the folder holds several
        runs, and where a monitor adds to the log what is measured otherwise.
        """
        self.is_waiting, names = False, set()
        if (command := self.request.command) is not None and (said := command.ended()) is not None:
            self.say(f"[razor] {said}.")
        if (steps := self._steps()) is None:
            return None
        self._look_at_log()  # after the folder: what is of a step that was in it then, the log has by now
        self._is_empty = not steps
        found: list[WatchedCheckpoint] = []
        for step in steps:
            names.add(step.name)
            if step.step % self.request.every == 0 and (one := self._look(step, once=once)) is not None:
                found.append(one)
        for name in [name for name in self._seen if name not in names]:
            if not self._seen.pop(name).is_closed:
                self._is_behind = True
                self.say(f"[razor] {name} was deleted before it was measured.")
        self._is_behind &= bool(found)
        return None if not found else found[-1 if self._is_behind else 0]

    def _steps(self) -> list[StepFolder] | None:
        try:
            found = steps_in(self.request.folder)
        except OSError as error:  # of a network's file system that is away for a moment, say
            if not self._is_away:
                self.say(f"[razor] {self.request.folder} cannot be read ({error.strerror or error}); looking again.")
            self._is_away = self.is_waiting = True
            return None
        self._is_away = False
        return found

    def _look(self, step: StepFolder, *, once: bool) -> WatchedCheckpoint | None:
        files, now = files_of(step), time.monotonic()
        seen = self._seen.get(step.name)
        if seen is None:
            seen = self._seen[step.name] = _Seen(files, now - max(SETTLE, GIVE_UP) if is_old(files) else now)
            self.active = now
        elif seen.files != files:
            seen.files, seen.since, self.active = files, now, now
        if seen.is_closed:
            return None
        quiet, model = now - seen.since, model_in(step)
        missing = None if model is None else missing_of(model)
        if model is None or missing is not None:
            self.is_waiting |= quiet < (SETTLE if once else GIVE_UP)
            if quiet >= (SETTLE if once else GIVE_UP) and seen.said != files:
                seen.said = files
                self.say(f"[razor] {step.name} is not measured: {missing or why_none(step)}.")
            return None
        if quiet < SETTLE and not is_finished(step, model):
            self.is_waiting = True
            return None
        return self._unless_logged(step, model, seen)

    def _unless_logged(self, step: StepFolder, model: Path, seen: _Seen) -> WatchedCheckpoint | None:
        try:
            weights = weights_digest(model)
        except (OSError, RazorError):  # it is being deleted
            self.is_waiting = True
            return None
        if self.log.has(step.step, weights):
            seen.closed = seen.files
            self._see_end(step.name, model)
            return None
        if any(row.step == step.step for row in self.log.measured) and seen.said != seen.files:
            seen.said = seen.files
            self.say(f"[razor] {step.name} was written anew since it was measured: it is measured again.")
        return WatchedCheckpoint(step.step, step.name, model, weights)

    # Measuring

    def measure(self, one: WatchedCheckpoint) -> tuple[Reading, dict[str, Any]] | None:
        """The reading of a checkpoint, and its row, which is in the log by now; None where there is none, as is said.

        Whatever fails is of that checkpoint, and the next one is looked at.
        """
        begun, notes = time.perf_counter(), len(self._notes)
        epoch, _ = training_of(one.model)
        try:
            drifts = self._drifts(one)
        except Exception as error:  # of any library, on files that others wrote
            interrupts.check()  # or what it makes of Ctrl-C
            self._failed(one, error)
            return None
        finally:
            compute.free()
        for note in self._notes[notes:]:
            self.say(f"[razor] {note}")
        if self._weights_now(one) not in (one.weights, None):  # None: what was read may be gone by now
            self.say(f"[razor] {one.name} was written to while it was measured: it is looked at again.")
            return None
        reading = self._reading(one, drifts, epoch, time.perf_counter() - begun)
        self._look_at_log()
        if self.log.has(one.step, one.weights):  # by a monitor, meanwhile
            self._close(one)
            return None
        row = self._row(one, reading)
        if self._is_due(reading.verdict):
            row["on_budget"] = self._command.digest
        self.log.add(row)
        self._close(one)
        return reading, row

    def _see_end(self, name: str, model: Path) -> None:
        is_last, was_there = training_of(model)[1], name in self._at_first
        self.is_over |= is_last and not was_there
        self._ended = name if is_last and was_there else ""

    def _done_about(self, reading: Reading, row: Mapping[str, Any], checkpoint: WatchedCheckpoint) -> str:
        """What follows from a reading: the command is run if it is due, and what it ended with is said."""
        if row.get("on_budget"):
            return self._run_command(reading.step, checkpoint.model)
        return self.request.rule.done_about(reading.verdict, None)

    def _drifts(self, one: WatchedCheckpoint) -> dict[str, Drift]:
        with tempfile.TemporaryDirectory(prefix="razor-watch-") as own:
            base = self.request.base  # a served one has no config to lend
            model = one.model if isinstance(base, AddressedBase) else with_config(one.model, base, Path(own))
            return self.read.measured(model, self._notes)

    def _reading(
        self, one: WatchedCheckpoint, drifts: Mapping[str, Drift], epoch: float | None, seconds: float
    ) -> Reading:
        kl, side = kls_of(drifts), self.read.side
        return Reading(
            one.step,
            epoch,
            kl,
            {name: drift.per_token.mean for name, drift in drifts.items()},
            {name: drift.n_prompts for name, drift in drifts.items()},
            True,
            self.request.rule.judged(kl, self.request.on.prompts_hash, side.whole[FORWARD]),
            seconds,
        )

    def _row(self, one: WatchedCheckpoint, reading: Reading) -> dict[str, Any]:
        own = {"checkpoint": one.name, "weights": one.weights}
        row = {"run": self.log.run, **reading.as_json(), **self.read.beside, **own, **self.log.provenance}
        if not self.log.rows:
            row["first_prompt"] = self.first_prompt
        if (law := self.request.rule.law) is not None:
            row["law_useful"], row["law_objection"] = law.useful, law.objection()
        return row

    @property
    def first_prompt(self) -> str:
        """As it is measured, with every special token."""
        return encoding.as_read(self.read.tokenizer, self.read.side.first_prompt)

    def _failed(self, one: WatchedCheckpoint, error: Exception) -> None:
        if (weights := self._weights_now(one)) != one.weights:
            how = "deleted" if weights is None else "written to"
            self._is_behind = weights is None
            self.say(f"[razor] {one.name} was {how} while it was measured.")
            self._seen.pop(one.name, None)  # if there is anything of it, it is looked at again
            return
        said = str(error) if isinstance(error, RazorError) else cause_of(error)
        self.say(f"[razor] {one.name} is not measured: {' '.join(said.split())}")
        row = {"run": self.log.run, "step": one.step, "checkpoint": one.name, "weights": one.weights, "error": said}
        last = next((row for row in reversed(self.log.rows) if row.step == one.step), None)
        if last is None or (last.weights, last.error) != (one.weights, said):
            self.log.add(row)
        self._close(one)

    def _weights_now(self, one: WatchedCheckpoint) -> str | None:
        """What tells the weights that are there now; None where there are none, or no whole ones."""
        try:
            return weights_digest(one.model)
        except (OSError, RazorError):
            return None

    def _close(self, one: WatchedCheckpoint) -> None:
        self.active = time.monotonic()
        self._seen[one.name].closed = self._seen[one.name].files
        self._see_end(one.name, one.model)
