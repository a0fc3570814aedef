"""Locks that the kernel drops with the process that holds them, so that none is left behind by `kill -9`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.system.writing import clear_io_errors

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]


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
        if fcntl is not None:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RazorError(busy) from error
            except OSError:
                pass  # a file system without locks; renaming into place still holds
        yield
