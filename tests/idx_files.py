"""Small image datasets in the files of MNIST and FashionMNIST, for tests that must not need the originals."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write `array` as an IDX file of unsigned bytes, gzipped if the name ends in `.gz`; makes the folder."""
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_dataset(data_dir: Path, *, train: int = 200, test: int = 100, seed: int = 0) -> Path:
    """Write `mnist` and `fashion-mnist` of `train` and `test` images each, with their SHA256SUMS; returns `data_dir`.

    An image is its class's template, a fixed random pattern of strokes and ground, plus noise: an MLP learns to tell
    the ten classes apart within an epoch or two. The classes are equally frequent, up to rounding.
    """
    for number, name in enumerate(("mnist", "fashion-mnist")):
        folder = data_dir / name
        rng = np.random.default_rng([seed, number])
        templates = np.where(rng.random((10, 28, 28)) < 0.2, 200.0, 10.0)
        for split, count in (("train", train), ("t10k", test)):
            labels = rng.permutation(np.arange(count) % 10)
            images = templates[labels] + rng.normal(0.0, 40.0, (count, 28, 28))
            write_idx(folder / f"{split}-images-idx3-ubyte", images.clip(0, 255).astype(np.uint8))
            write_idx(folder / f"{split}-labels-idx1-ubyte", labels.astype(np.uint8))
        write_sums(folder)
    return data_dir


def write_sums(folder: Path) -> None:
    """Declare the IDX files of `folder` in its SHA256SUMS, as `sha256sum *-ubyte > SHA256SUMS` does."""
    files = sorted(folder.glob("*-ubyte"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
