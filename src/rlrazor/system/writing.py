"""Where we write: never over what is not ours, never over what is read, and each file whole or not at all.

Whether a file is ours is told by what is in it: a page names its generator, a figure does so in its metadata, and our
tables, logs and laws have columns and keys of their own.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import platformdirs

from rlrazor.errors import RazorError
from rlrazor.system import jsonl
from rlrazor.system.documents import loads
from rlrazor.system.files import LARGEST, kind_of, open_regular

Kind = Literal["page", "png", "svg", "notes", "json", "table", "log", "rows"]
Output = tuple[Path, Kind]

GENERATOR = "rlrazor"
NOTES = "Written by `razor report FOLDER --markdown`"
FOLDER_MARK = ".rlrazor"  # in a folder that is ours as a whole, such as a saved model

_HEAD = 4096  # bytes in which a mark has to be
_MARKS: dict[Kind, tuple[bytes, bytes]] = {  # how the file begins, and what is near its beginning
    "page": (b"<!DOCTYPE html>", f'<meta name="generator" content="{GENERATOR}">'.encode()),
    "png": (b"\x89PNG", f"Software\0{GENERATOR}".encode()),
    "svg": (b"<?xml", f"<dc:title>{GENERATOR}</dc:title>".encode()),
    "notes": (b"# Findings", NOTES.encode()),
}
_SUFFIXES: dict[str, Kind] = {
    ".html": "page", ".png": "png", ".svg": "svg", ".md": "notes", ".json": "json", ".parquet": "table",
    ".jsonl": "log",
}  # fmt: skip
_JSON_KEYS = (  # a law, a monitor's state, teachers, a round of samples, a noise floor
    *({"format", "law", "interval"}, {"run", "step", "state"}, {"run_id", "student"}),
    *({"reward", "positions", "completions"}, {"of", "how", "tasks", "mean"}),
)
_TABLE_COLUMNS = {"run_id", "method", "seed", "step"}
_LOG_KEYS = (  # rows of a monitor, those of its earlier versions, its failures; records
    *({"run", "step", "kl_forward"}, {"step", "prompts_hash", "kl_forward"}, {"run", "step", "error"}),
    {"run_id", "step", "drift"},
)
LOG_BEGINS = b'{"run": "'
_ROW_KEYS = {"prompt", "completion"}


def check(outputs: Iterable[Output], inputs: Iterable[Path | str | None] = ()) -> None:
    """Raise RazorError where a command should not write, before it computes anything.

    That is where a file is not ours, or cannot be written; where two outputs are one file; and where an output is an
    input, or a file in a folder that is one, by whatever name: files are told apart by the file system's own numbers.
    """
    outputs = list(outputs)
    check_apart([path for path, _ in outputs], inputs)
    for path, kind in outputs:
        check_writable(path, kind)


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path | str | None]) -> None:
    """The same but for what can be written: raise RazorError where an output is an input, or another output."""
    outputs = list(outputs)
    # A folder may hold many files, and one that is not there is none of them.
    read = _identities(inputs, inside=any(map(os.path.exists, outputs)))
    seen: dict[Any, Path] = {}
    for path in outputs:
        own = _identity(path)
        if own in read:
            raise RazorError(f"{path} would be written, and is read as well: choose another place to write to.")
        if own in seen:
            raise RazorError(f"{seen[own]} and {path} are one file, and both would be written: choose another place.")
        seen[own] = path


def check_folder(folder: Path, inputs: Iterable[Path | str | None] = ()) -> None:
    """Raise RazorError where an output folder is an input itself: what we add would be read as part of it."""
    if folder.exists() and _identity(folder) in _identities(inputs, inside=False):
        raise RazorError(f"{folder} would be written to, and is read as well: choose another place to write to.")


def check_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise RazorError where `path` could not be written: it is no file, not ours, or its folder takes no files."""
    with clear_io_errors(path.parent):
        _require_ours(path, kind)
        there = Path(os.path.realpath(path)).parent
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass


@contextmanager
def atomic_path(path: Path, kind: Kind | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well.

    `kind`: what the file has to be if it is there already; by default as its suffix says, and of other suffixes
    anything. A link stays one, and the file that it leads to is written. Raises RazorError where that file is not ours,
    and on a full disk.
    """
    with clear_io_errors(path.parent):
        _require_ours(path, kind)
        target = Path(os.path.realpath(path))
        # Short, as the name may be as long as names can be; the same each time, so that what a killed process has left
        # is written over.
        partial = target.with_name(f".rlrazor-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            yield partial
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, kind: Kind | None = None) -> None:
    """Write a text as UTF-8, whole or not at all; half of a surrogate pair, which has no UTF-8, as an escape."""
    with atomic_path(path, kind) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def cache_root() -> Path:
    """The user's cache folder for rlrazor, or the one that RLRAZOR_CACHE names."""
    return Path(os.environ.get("RLRAZOR_CACHE") or platformdirs.user_cache_path("rlrazor")).expanduser()


def write_cache(path: Path, contents: str | bytes) -> None:
    """Keep a text, or bytes, where it is only faster to have them: where that fails, it costs time, not results.

    Several processes may be writing the same.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:
            partial = Path(own) / path.name
            partial.write_text(contents) if isinstance(contents, str) else partial.write_bytes(contents)
            partial.replace(path)


def leftovers(folder: Path) -> Iterator[Path]:
    """What a killed process has left half-written in a folder, and in those in it."""
    for pattern in (".rlrazor-*.tmp", "*/.rlrazor-*.tmp"):
        yield from folder.glob(pattern)


def is_ours(path: Path, kind: Kind) -> bool:
    """Whether a file that is there has been written by us, as what `kind` says. Raises OSError as reading does."""
    if kind in _MARKS:
        begins, mark = _MARKS[kind]
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return head.startswith(begins) and mark in head
    return {"json": _is_our_json, "table": _is_our_table, "log": _is_our_log, "rows": _are_our_rows}[kind](path)


def mark_folder(folder: Path) -> None:
    """Say in a folder that it is ours as a whole."""
    (folder / FOLDER_MARK).write_text(f"Written by {GENERATOR}, which may replace this folder.\n", encoding="utf-8")


def require_our_folder(folder: Path, mark: str = FOLDER_MARK) -> None:
    """Raise RazorError where there is something of that name that we have not written and that is no empty folder."""
    with clear_io_errors(folder):
        if not os.path.lexists(folder) or (folder / mark).is_file():
            return
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            return
    raise _not_ours(folder)


@contextmanager
def clear_io_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about `folder` into one sentence."""
    try:
        yield
    except OSError as error:
        raise RazorError(
            f"Cannot write to {folder}: {error.strerror or error}. What is there already is kept; free some space or "
            "choose another place, then run the same command again."
        ) from error


def _require_ours(path: Path, kind: Kind | None) -> None:
    kind = kind or _SUFFIXES.get(path.suffix.lower())
    real = os.path.realpath(path)
    # By name as well: where standard output goes to a file, /dev/stdout is that file.
    if str(path.absolute()).startswith(("/dev/fd/", "/proc/")) or str(path.absolute().parent) == "/dev":
        raise RazorError(f"{path} is a device or lies among devices, where no file is written: name another place.")
    try:
        found = os.stat(real)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise RazorError(f"{path} is a folder, where a file would be written: name a file.")
    if kind_of(found.st_mode) is not None:
        raise RazorError(f"{path} is no file but a device or a pipe: name a file.")
    if kind is not None and not is_ours(Path(real), kind):
        raise _not_ours(path)


def _not_ours(path: Path) -> RazorError:
    return RazorError(
        f"{path} is there already, and was not written by this command: move it away, or choose another place to write "
        "to."
    )


def _identities(inputs: Iterable[Path | str | None], *, inside: bool) -> set[Any]:
    """Of each input, and `inside` of the files of each that is a folder. A hub id is none, nor is what is not there."""
    found = set()
    for given in inputs:
        if given is None or not os.path.exists(path := Path(given).expanduser()):
            continue
        found.add(_identity(path))
        if inside and path.is_dir():
            found |= {_identity(Path(folder, name)) for folder, _, names in os.walk(path) for name in names}
    return found


def _identity(path: Path) -> Any:
    """The same for all names of a file; of one that is not there, where it would be."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _beginning(path: Path) -> bytes:
    """As much as any document of ours has; of a log, rows enough to tell whose it is."""
    with open_regular(path) as file:
        return file.read(LARGEST)


def _is_our_json(path: Path) -> bool:
    try:
        value = loads(_beginning(path).decode("utf-8-sig"), nan=float, lenient=True)
    except ValueError:
        return False
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return False
    versions = value.get("versions")
    return any(keys <= set(value) for keys in _JSON_KEYS) or (isinstance(versions, dict) and GENERATOR in versions)


def _is_our_table(path: Path) -> bool:
    import polars as pl

    try:
        with path.open("rb") as file:
            return set(pl.read_parquet_schema(file)) >= _TABLE_COLUMNS
    except pl.exceptions.PolarsError:
        return False


def _is_our_log(path: Path) -> bool:
    """Any whole row will do: a killed process may leave half of one; and a run that died early leaves an empty log."""
    beginning = _beginning(path)
    lines = beginning.splitlines()
    if len(lines) < 2 and all(line.startswith(LOG_BEGINS) for line in lines):
        return True
    return any(keys <= _keys_of(row) for row in jsonl.lenient(beginning) for keys in _LOG_KEYS)


def _are_our_rows(path: Path) -> bool:
    """Prompts and completions beside a law of ours, every row of them."""
    law = path.with_name("law.json")
    return (
        law.is_file()
        and _is_our_json(law)
        and all("prompt" in (keys := _keys_of(row)) and keys <= _ROW_KEYS for row in jsonl.lenient(_beginning(path)))
    )


def _keys_of(row: Any) -> set[str]:
    return set(row) if isinstance(row, dict) else set()
