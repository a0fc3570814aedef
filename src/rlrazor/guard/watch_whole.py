"""Whether a checkpoint is whole, while whatever writes it may still be at it, and what tells it from another.

It is whole where its weights are: the files that an index names are all there, and each is as long as its header says.
A trainer goes on after that, with a tokenizer or an optimizer's state. So either a file is there that trainers write
last, or nothing in the folder has changed for SETTLE seconds, by our own clock: that of a file server may be off.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.guard.outputs import STATE
from rlrazor.guard.watch_layout import StepFolder
from rlrazor.lm import weight_files
from rlrazor.lm.sources import folder_of
from rlrazor.system.documents import parse_json, read_text

SETTLE = 10.0  # seconds without a change
OLD = 600.0  # seconds since the last change, by the file's clock, after which nobody is writing any more
LAST = (STATE, "ckpt_contents.json")  # written last: by transformers' Trainer; by verl on Megatron
_BLOCKS, _BLOCK = 64, 16_384  # of a file of weights that are hashed, and bytes of one

Files = tuple[tuple[str, int, int], ...]


def files_of(step: StepFolder) -> Files:
    """Names, sizes and times of all files of a step: if these are the same, nothing was written meanwhile."""
    return tuple(sorted((str(path), found.st_size, found.st_mtime_ns) for path, found in step.files()))


def is_old(files: Files) -> bool:
    """Whether the last change was so long ago that nobody is writing any more."""
    return bool(files) and time.time() - max(at for _, _, at in files) / 1e9 > OLD


def missing_of(model: Path) -> str | None:
    """What a model's or an adapter's weights lack to be whole, in a sentence; None where they are."""
    try:
        weight_files.check_weights(model, "it")
    except RazorError as error:
        return str(error).rstrip(".")
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def is_finished(step: StepFolder, model: Path) -> bool:
    """Whether a file that the trainer writes last is there, and as young as the weights: older ones are of another."""
    try:
        weights = max(path.stat().st_mtime_ns for path in _weights(model))
        last = [path.stat().st_mtime_ns for path in _lasts(step, model)]
    except (OSError, RazorError, ValueError):
        return False
    return bool(last) and max(last) >= weights


def weights_digest(model: Path) -> str:
    """What tells a checkpoint's weights from others: 16 hexadecimal digits of a SHA-256 of parts of its files.

    The same wherever it is copied to. Of each file its length, its header and blocks spread over it: all of one of a
    few megabytes. Raises OSError and RazorError where they cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(_weights(model)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        places = range(0, size, max(_BLOCK, size // _BLOCKS))
        with path.open("rb") as file:
            for place in places:
                file.seek(place)
                digest.update(file.read(_BLOCK))
            file.seek(max(0, size - _BLOCK))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def training_of(model: Path) -> tuple[float | None, bool]:
    """The epoch that a Trainer says it was at, None where none does, and whether that was its last step."""
    try:
        state = parse_json(read_text(model / STATE), model / STATE, nan_as_text=True)
        epoch, step, most = (state.get(name) for name in ("epoch", "global_step", "max_steps"))
    except (RazorError, AttributeError):
        return None, False
    is_last = isinstance(step, int) and isinstance(most, int) and 0 < most <= step
    return (float(epoch) if isinstance(epoch, int | float) else None), is_last


def with_config(model: Path, base: str, folder: Path) -> Path:
    """A model without config.json, as torchtitan saves it, in `folder` beside its base's, whose shape it has.

    Any other as it is. Raises RazorError as `folder_of` the base does.
    """
    if weight_files.is_adapter(model) or (model / "config.json").exists():
        return model
    of_base = folder_of(base)
    for path in (*_weights(model), *model.glob("*.json")):
        os.symlink(path.resolve(), folder / path.name)
    for name in ("config.json", "generation_config.json"):
        if (of_base / name).is_file() and not (folder / name).exists():
            config = json.loads((of_base / name).read_text(encoding="utf-8"))
            config.pop("transformers_weights", None)  # the base's own files
            (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _lasts(step: StepFolder, model: Path) -> Iterator[Path]:
    """The files that trainers write last, beside the weights or in a folder around them."""
    for place in (model, *model.parents):
        yield from (place / name for name in LAST if (place / name).is_file())
        if place in step.folders:
            return


def _weights(model: Path) -> Sequence[Path]:
    """The files of its weights. Raises RazorError, or OSError, where they are not there."""
    adapter = weight_files.is_adapter(model)
    if found := [model / weight_files.ADAPTER_WEIGHTS] if adapter else weight_files.paths_of(model):
        return found
    raise RazorError(f"{model} has no weights.")
