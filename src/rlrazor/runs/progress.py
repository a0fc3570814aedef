"""What a person sees while a sweep runs: how far it is, what each run is at, and the time left."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from rlrazor.runs import sweep
from rlrazor.runs.records import Record, RunSpec
from rlrazor.system import durations
from rlrazor.system.phases import TRAINING
from rlrazor.system.progress import counted, repeated
from rlrazor.system.terminal import PlainColumn


class SweepProgress(sweep.Progress):
    """The progress of `sweep.run`, in checkpoints because runs differ in length; nothing is shown for no runs.

    `count` is how many checkpoints a run has, by default one. On a terminal a bar; without one (a log file, CI) a line
    at the start and every 30 seconds, with the same facts, also while a run has nothing to tell.
    """

    def __init__(
        self,
        title: str,
        runs: int,
        checkpoints: int,
        console: Console,
        count: Callable[[RunSpec], int] = lambda spec: 1,
    ) -> None:
        self.title, self.runs, self.checkpoints, self.console, self.count = title, runs, checkpoints, console, count
        self.done = 0
        self.shares: dict[str, float] = {}  # of runs in progress, in checkpoints
        self.measured: dict[str, int] = {}
        self.steps: dict[str, str] = {}
        self.now: dict[str, str] = {}  # what each run in progress is at
        self.said: set[str] = set()
        self.whole = 0.0  # of finished runs, in checkpoints
        self.bar = Progress(
            PlainColumn("{task.description}"),
            BarColumn(bar_width=24),
            PlainColumn("{task.fields[runs_done]}/{task.fields[runs]} runs", style="progress.download"),
            TimeRemainingColumn(compact=True),
            PlainColumn("{task.fields[current]}", style="dim"),
            console=console,
            disable=not console.is_terminal or runs == 0,
            # A long sweep: the estimate is the average over its last five minutes.
            speed_estimate_period=300,
        )
        self.task = self.bar.add_task(title, total=checkpoints, current="", runs=runs, runs_done=0)
        self.began = time.monotonic()
        self.lines = ExitStack()

    def __enter__(self) -> Self:
        self.bar.start()
        if not self.console.is_terminal and self.runs:
            self._print(f"{self.title}: {_many(self.runs, 'run')}, {_many(self.checkpoints, 'checkpoint')} to measure")
            self.lines.enter_context(repeated(lambda: self._print(self.line)))
        return self

    def __exit__(self, *error: object) -> None:
        self.lines.close()
        self.bar.stop()

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        """Show a checkpoint's accuracies and KL."""
        current = f"new {record.new:.3f}" + (f", prior {record.prior_mean:.3f}" if record.prior else "")
        if "kl_forward" in record.drift:
            current += f", KL {record.drift['kl_forward']:.3f}"
        self.measured[spec.run_id] = self.measured.get(spec.run_id, 0) + 1
        self._show(spec, current, self.measured[spec.run_id])

    def at(self, spec: RunSpec, phase: str, done: int, total: int) -> None:
        """Show what a run is at; the bar advances with the steps of its training."""
        what, share = counted(phase, done, total), 0.0
        if phase == TRAINING and total:
            share = self.count(spec) * done / total
            what = self.steps[spec.run_id] = f"step {done} of {total}, checkpoint {int(share)} of {self.count(spec)}"
        elif spec.run_id in self.steps:
            what = f"{self.steps[spec.run_id]}, {what}"
        self._show(spec, what, share)

    def say(self, sentence: str) -> None:
        """Print a sentence once, whichever run it is from."""
        if sentence not in self.said:
            self.said.add(sentence)
            self._print(sentence, style="yellow")

    def finished(self, specs: Sequence[RunSpec]) -> None:
        """Count runs as done."""
        self.done += len(specs)
        for spec in specs:
            self.now.pop(spec.run_id, None)
            self.shares.pop(spec.run_id, None)
        self.whole += max(map(self.count, specs))  # the others are its beginnings
        self.bar.update(self.task, runs_done=self.done, completed=self.completed)

    @property
    def completed(self) -> float:
        """Checkpoints' worth of what is done."""
        return self.whole + sum(self.shares.values())

    @property
    def line(self) -> str:
        """The facts of the bar as a sentence."""
        left = ""
        if (share := self.completed / max(1, self.checkpoints)) > 0.01:
            left = f", about {durations.about((time.monotonic() - self.began) * (1 - share) / share)} left"
        return f"{self.title}: {self.done} of {_many(self.runs, 'run')} done{left}" + "".join(
            f"; {what}" for what in list(self.now.values())
        )

    def _show(self, spec: RunSpec, what: str, share: float) -> None:
        self.shares[spec.run_id] = max(self.shares.get(spec.run_id, 0.0), share)
        self.now[spec.run_id] = f"{spec.describe()}: {what}"
        self.bar.update(self.task, completed=self.completed, current=self.now[spec.run_id])

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
