"""The log of a run, to which a monitor and `razor watch` may add at the same time, from two processes.

There is one log, and whose a row is, is told by the row. Both add whole rows to its end, and it is written anew in one
case only: as a monitor resumes, without the rows of the steps that are to come again. Either is done by who has the
file alone, for that moment. Whoever was stopped while having it is not waited for: a watcher costs training nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.guard.log_schema import LogRow, is_monitors
from rlrazor.guard.outputs import move_aside
from rlrazor.lm.digests import is_digest, is_same_base
from rlrazor.system.documents import checked, loads
from rlrazor.system.locks import before_renaming, open_alone
from rlrazor.system.writing import LOG_BEGINS, atomic_path, check_writable, clear_io_errors

Row = Mapping[str, Any]
Say = Callable[[str], None]

PATIENCE = 0.5  # seconds to wait for the other, who has the file for as long as it takes to write a row
_BLOCK = 65_536  # bytes that are read at once, from a log's end


class Log:
    """A JSON Lines file with a row a measurement. Rows that cannot be written wait until they can."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        self.pending: list[Row] = []

    def begin(self, kept: Callable[[Sequence[Row]], Sequence[Row]] | None) -> Sequence[Row]:
        """Go on with what is there: `kept` chooses among its whole rows, and those that it leaves out are taken out.

        None: of a fresh run there is nothing to go on with, and what is there is moved away. Returns the rows that are
        there now. Raises RazorError where the file cannot be written or what is there is no log, and as `kept` does.
        """
        check_writable(self.path, "log")
        self.pending = []
        with clear_io_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_alone(self.path, PATIENCE) as file:
                content = _content(file)
                if kept is None:
                    if content:
                        before_renaming(file)
                        move_aside(self.path, self.say)
                        self.path.touch()
                    return []
                rows = kept(_whole(content, self.path))
                if (text := "".join(map(_line, rows)).encode()) != content:
                    with atomic_path(self.path, "log") as partial:
                        partial.write_bytes(text)
                        # Of somebody who did not wait for us.
                        with partial.open("ab") as end:
                            end.write(_content(file)[len(content) :])
                        before_renaming(file)
                return rows

    def add(self, row: Row) -> None:
        """Append a row, or all that is missing."""
        was_behind = bool(self.pending)
        self.pending.append(row)
        try:
            self._write()
        except OSError as error:
            if not was_behind:
                why = error.strerror or error
                self.say(f"[razor] {self.path} cannot be written ({why}): what is measured is added as soon as it can.")

    def finish(self) -> None:
        """Try once more to write what is missing. Raises RazorError where that still cannot be done."""
        try:
            if self.pending:
                self._write()
        except OSError as error:
            raise RazorError(
                f"{self.path} cannot be written ({error.strerror or error}), and lacks the last {len(self.pending)} of "
                "what was measured: make room, or name another file, then run the same command again."
            ) from error

    def _write(self) -> None:
        with open_alone(self.path, PATIENCE) as file:
            _append(file, "".join(map(_line, self.pending)).encode())
        self.pending = []


def _content(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()


def _append(file: FileIO, lines: bytes) -> None:
    """All of it or, as where the disk is full, nothing; and not behind half a row, which a killed process has left."""
    end, tail = file.seek(0, os.SEEK_END), b""
    while b"\n" not in tail and len(tail) < end:
        file.seek(max(0, end - len(tail) - _BLOCK))
        tail = file.read(end - len(tail) - file.tell()) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if tail and _is_half_a_row(tail):
        end -= len(tail)
        file.truncate(end)
    elif tail:
        lines = b"\n" + lines
    try:
        written = 0
        while written < len(lines):
            written += file.write(lines[written:])
    except OSError:
        if file.seek(0, os.SEEK_END) == end + written:  # and nobody has added a row behind it, who did not wait for us
            file.truncate(end)
        raise


def _is_half_a_row(tail: bytes) -> bool:
    """Of what has no line end, whether that is ours; what else is there, somebody has written."""
    try:
        loads(tail.decode())
    except ValueError:
        return tail[: len(LOG_BEGINS)] == LOG_BEGINS[: len(tail)]
    return False


def rows_in_log(path: Path) -> list[Row]:
    """All whole rows that a log has now. Raises RazorError for a file that is there and cannot be read."""
    try:
        return _whole(path.read_bytes(), path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RazorError(f"The log {path} cannot be read ({error.strerror}): name a file by `log`.") from error


def _whole(content: bytes, path: Path) -> list[Row]:
    """Without a line that a killed process left half-written, or that is none of ours."""
    rows = []
    for line in content.decode(errors="replace").split("\n"):
        with suppress(ValueError, RazorError):
            row = loads(line)
            if checked(LogRow, row, path).model_fields_set >= {"step"}:
                rows.append(row)
    return rows


def rows_until(rows: Sequence[Row], step: int, needed: Sequence[str]) -> list[Row]:
    """What a run goes on with that resumes at a step: its rows up to there that have `needed`, and those of failures.

    Those of `razor watch` at any step: they tell whose weights they are of, and which command was run.
    """
    return [
        row
        for row in rows
        if not is_monitors(row) or (row["step"] <= step and (set(needed) <= set(row) or "error" in row))
    ]


def require_same(rows: Sequence[Row], path: Path, provenance: Mapping[str, str], way_out: str) -> None:
    """Raise RazorError where rows of a log were measured otherwise: of another base, other prompts, another probe.

    `way_out`: what can be done about it, other than moving the file away.
    """
    for row in (row for row in rows if "error" not in row):
        if not is_digest(str(row.get("base"))):
            raise RazorError(
                f"This would go on with the KLs in {path}, which are of another version of rlrazor: move that file "
                "away."
            )
        same = {name: row.get(name) == value for name, value in provenance.items()}
        same["base"] = is_same_base(str(row.get("base")), provenance["base"])
        if not all(same.values()):
            raise RazorError(
                f"This would go on with the KLs in {path}, which are of another base, other prompts or another probe: "
                f"{way_out}, or move that file away."
            )


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
