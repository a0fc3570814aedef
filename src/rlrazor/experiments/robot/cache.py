"""What takes long to make and is the same each time: kept on the disk, with a digest of all that is in it.

A file that is damaged, or not whole, is made again; where none can be written, that costs time and no results. What
several processes need at the same time, one of them makes.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrazor.system import phases
from rlrazor.system.writing import cache_root, write_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Arrays = Mapping[str, NDArray[Any]]
WAITING = "waiting for another run to make what both need"

_DIGEST = "digest"
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What reading a file of arrays raises that is not whole, or no such file."""


def default_folder() -> Path:
    """In the user's cache folder for rlrazor, or in the one that RLRAZOR_CACHE names."""
    return cache_root() / "robot"


def cached(folder: Path, kind: str, made_of: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """What `make` gives, or has given before for the same `kind` and `made_of`: all that it depends on, JSON values."""
    text = json.dumps(dict(made_of), sort_keys=True, allow_nan=False)
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    found = _read(path)
    if found is None:
        with _locked(path):
            found = _read(path)  # another process may have made it in the meantime
            if found is None:
                found = make()
                _write(path, found)
    return found


def digest_of(arrays: Arrays) -> str:
    """SHA-256 of names, kinds, shapes and contents."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Arrays | None:
    """What is in a file, or None where it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        said = str(found.pop(_DIGEST))
    except DAMAGE:
        return None
    return found if said == digest_of(found) else None


def _write(path: Path, arrays: Arrays) -> None:
    contents = io.BytesIO()
    np.savez(contents, **arrays, **{_DIGEST: np.array(digest_of(arrays))})  # type: ignore[arg-type]
    write_cache(path, contents.getvalue())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is making this file, and keep others from it within the block.

    The kernel drops the lock with the process, however that ends; the empty, hidden file of it stays. Where no file can
    be written, and on file systems without locks, each makes its own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without following a link, or waiting for who reads a pipe: it may be somebody's.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        lock = os.open(path.with_name(f".{path.stem}.lock"), flags, 0o666)
    except OSError:
        yield
        return
    try:
        if fcntl is not None:
            with suppress(OSError):
                _wait_for(lock)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        phases.at(WAITING)
        fcntl.flock(lock, fcntl.LOCK_EX)
