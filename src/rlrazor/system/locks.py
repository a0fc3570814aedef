"""Locks that the kernel drops with the process that holds them, so that none is left behind by `kill -9`."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.system.writing import clear_io_errors

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

_PAUSE = 0.01  # seconds between tries


@contextmanager
def locked(path: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there. Raises RazorError, with `busy`, where another does.

    `shared`: along with all others that hold it so.
    """
    with clear_io_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without following a link, emptying a file, or waiting for who reads a pipe: it may be somebody's.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        lock = os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0)
    with lock:
        if not _is_taken(lock, shared=shared):
            raise RazorError(busy)
        yield


@contextmanager
def open_alone(path: Path, patience: float) -> Iterator[FileIO]:
    """A file to be read and added to while nobody else has it open so; it is made if it is not there.

    It is the one that has the name now: who had it before may have put another in its place. Whoever waits for longer
    than `patience` seconds waits no more and has it all the same, as where the system tells an open file otherwise than
    its name. Raises OSError as opening does.
    """
    until, is_last = time.monotonic() + patience, False
    while True:
        with open(path, "a+b", buffering=0) as file:
            while not _is_taken(file) and time.monotonic() < until:
                time.sleep(_PAUSE)
            if is_last or _has_the_name(file, path):
                yield file
                return
        is_last = time.monotonic() >= until


def before_renaming(file: FileIO) -> None:
    """Close a file that another is about to take the place of, where there are no locks to lose: Windows wants it."""
    if fcntl is None:
        file.close()


def _has_the_name(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _is_taken(file: FileIO, *, shared: bool = False) -> bool:
    """Whether we hold its lock now; also where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks; renaming into place still holds
    return True
