"""What a person sees while a sweep runs: runs done and left, time left, the checkpoint just measured."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from rlrazor.records import Record, RunSpec
from rlrazor.terminal import PlainColumn

_LINE_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


class SweepProgress:
    """A progress bar for `sweep.run`, in checkpoints because runs differ in length; nothing is shown for no runs.

    Without a terminal (a log file, CI) it prints a line every 30 seconds instead.
    """

    def __init__(self, title: str, runs: int, checkpoints: int, console: Console) -> None:
        self.title, self.runs, self.console = title, runs, console
        self.done = 0
        self.bar = Progress(
            PlainColumn("{task.description}"),
            BarColumn(bar_width=24),
            _RunsColumn(),
            TimeRemainingColumn(compact=True),
            PlainColumn("{task.fields[current]}", style="dim"),
            console=console,
            disable=not console.is_terminal or runs == 0,
            # A long sweep: the estimate is the average over its last five minutes.
            speed_estimate_period=300,
        )
        self.task = self.bar.add_task(title, total=checkpoints, current="", runs=runs, runs_done=0)
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        """Show a checkpoint's accuracies and KL."""
        current = f"{spec.describe()}: new {record.new:.3f}, prior {record.prior_mean:.3f}"
        if "kl_forward" in record.drift:
            current += f", KL {record.drift['kl_forward']:.3f}"
        self.bar.update(self.task, advance=1, current=current)
        if not self.console.is_terminal and time.monotonic() - self.last_line > _LINE_EVERY:
            self.last_line = time.monotonic()
            self.console.print(f"{self.title}: {self.done} of {self.runs} runs done; {current}", soft_wrap=True)

    def finished(self, specs: Sequence[RunSpec]) -> None:
        """Count runs as done."""
        self.done += len(specs)
        self.bar.update(self.task, runs_done=self.done)


class _RunsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['runs_done']}/{task.fields['runs']} runs", style="progress.download")
