"""Regular files alone: a pipe that nobody writes into is waited for, and a device may have no end."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from rlrazor.errors import RazorError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BufferedReader:
    """The file at `path` to read, at once: nothing is waited for.

    Raises RazorError for what is no regular file, and OSError as `open` does.
    """
    _check(path, os.stat(path).st_mode)  # opening a device may already do something, and a socket cannot be opened
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = open(descriptor, "rb")  # noqa: SIM115
    try:
        _check(path, os.fstat(descriptor).st_mode)  # what was opened may be another one by now
    except RazorError:
        file.close()
        raise
    return file


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise RazorError(f"{path} is {kind}, and has to be a file. Put a file there.")
