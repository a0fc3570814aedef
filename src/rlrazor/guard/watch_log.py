"""The log of a run as `razor watch` knows it, while a monitor in the training run may be adding to it.

It is read, and rows are added to its end. What is there already stays as it is, whoever has written it.
"""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.guard.log import Log, Row, Say, require_same, rows_in_log
from rlrazor.guard.log_schema import LogRow, is_monitors
from rlrazor.system.documents import checked
from rlrazor.system.writing import check_writable

_WAY_OUT = "go on with what the run began with, give `razor watch` a --log of its own"


class WatchLog:
    """Its rows, with those that others have added when it was last looked at. `provenance`: what ours are measured on.

    Raises RazorError where it cannot be written, is another's, or is of another base, other prompts or another probe.
    """

    def __init__(self, path: Path, provenance: Mapping[str, str], say: Say) -> None:
        self.path, self.provenance = path, provenance
        check_writable(path, "log")
        self._log, self._own, self._as_of = Log(path, say), uuid.uuid4().hex[:12], self._state()
        self._take(self._required(rows_in_log(path)))

    @property
    def run(self) -> str:
        """The id of the run: the monitor's, or else that of whoever wrote last; of an empty log our own."""
        ids = [row.run for row in sorted(self.rows, key=is_monitors) if row.run is not None]
        return ids[-1] if ids else self._own

    @property
    def measured(self) -> list[LogRow]:
        """Rows that say how far a checkpoint, or a step, has moved."""
        return [row for row in self.rows if row.kls]

    @property
    def last(self) -> LogRow | None:
        """Of the newest step that was measured, what was written last; None before any was."""
        return max(reversed(self.measured), key=lambda row: row.step, default=None)

    def has(self, step: int, weights: str) -> bool:
        """Whether a checkpoint is measured. A monitor's row does not tell weights: there, one of the step is enough."""
        return any(row.step == step and row.weights in (weights, None) for row in self.measured)

    def look_again(self) -> list[LogRow]:
        """Know it as it is now: the rows that were measured and are new, in order. As a monitor resumes some may go.

        Raises RazorError where a monitor measures otherwise than we do.
        """
        if (state := self._state()) in (self._as_of, None):
            return []
        try:
            rows = rows_in_log(self.path)
        except RazorError:  # a network's file system that is away for a moment, say
            return []
        self._as_of, known = state, {repr(row) for row in self.rows}
        self._take([*self._required(rows), *self._log.pending])
        return [row for row in self.measured if repr(row) not in known]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._log.add(row)
        self.rows.append(checked(LogRow, row, self.path))

    def finish(self) -> None:
        """Raises RazorError where rows could not be written, and still cannot."""
        self._log.finish()

    def _take(self, rows: Sequence[Row]) -> None:
        self.rows = [checked(LogRow, row, self.path) for row in rows]

    def _required(self, rows: Sequence[Row]) -> Sequence[Row]:
        require_same([row for row in rows if "kl_forward" in row], self.path, self.provenance, _WAY_OUT)
        return rows

    def _state(self) -> tuple[int, int, int] | None:
        """What is another where the file is; None where there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
