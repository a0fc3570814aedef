"""Files that others have put there: opened at once, whatever they are, and read no further than they may be long.

A pipe that nobody writes into would be waited for, and a device may have no end.
"""

import os
import stat
import time
from io import BufferedReader
from pathlib import Path

from rlrazor.errors import RazorError

LARGEST = 256 * 2**20  # bytes of a document: the law of a hundred runs has 100 kB
_PART = 2**20  # bytes that are read at a time
_SECONDS = 10  # for somebody to begin to write into a pipe
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(mode: int) -> str | None:
    """What is no regular file, by its mode: "a pipe"; None for one that is."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def open_regular(path: Path) -> BufferedReader:
    """The file at `path` to read, at once: nothing is waited for.

    Raises RazorError for what is no regular file, and OSError as `open` does.
    """
    _require_regular(path, os.stat(path).st_mode)  # opening a device may do something, a socket cannot be opened
    file = open(_opened(path), "rb")  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)  # what was opened may be another one by now
    except RazorError:
        file.close()
        raise
    return file


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """What a file, or a pipe that somebody writes into, holds.

    Raises OSError, for more than `largest` bytes and for a device too.
    """
    descriptor = _opened(path)
    with open(descriptor, "rb", buffering=0):
        kind = kind_of(os.fstat(descriptor).st_mode)
        if kind not in (None, "a pipe"):
            raise OSError(f"it is {kind}, not a file")
        found, begun, until = bytearray(), kind is None, time.monotonic() + _SECONDS
        while len(found) <= largest:
            try:
                part = os.read(descriptor, _PART)
            except BlockingIOError:  # who writes into a pipe is there, and has nothing yet
                begun, part = True, None
            if part:
                begun = True
                found += part
            elif part is not None and begun:
                return bytes(found)
            elif part is not None and time.monotonic() > until:
                raise OSError("it is a pipe that nothing writes into")
            else:
                time.sleep(0.01)
    raise OSError(
        f"it has more than {largest // 2**20} MiB" if largest >= 2**20 else f"it has more than {largest:,} bytes"
    )


def _opened(path: Path) -> int:
    """A descriptor, without waiting for who would write into a pipe."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def _require_regular(path: Path, mode: int) -> None:
    if (kind := kind_of(mode)) is not None:
        raise RazorError(f"{path} is {kind}, and has to be a file. Put a file there.")
