"""GGUF files, quantised for inference: each is converted once, to a folder of float32 safetensors in the cache."""

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import platformdirs
import torch

from rlrazor.errors import RazorError, cause_of
from rlrazor.extras import needs_extra, needs_package
from rlrazor.lm import loading, weight_files
from rlrazor.system.files import open_regular

_CONVERTED_FROM = ".gguf-sha256"  # in a conversion: of what


def convert(gguf: Path, out: Path | None = None) -> Path:
    """The folder of float32 safetensors for a GGUF file, by its content: the one that there is, or a new one.

    That is `out`, or one in the cache with the name of the file. Where it is made, standard error says so. Raises
    RazorError for what is no GGUF file or cannot be read as one, for an `out` that is something else, and where the
    folder cannot be written.
    """
    needs_extra("guard")
    needs_package("gguf", "A GGUF file")
    gguf = gguf.expanduser()
    if gguf.suffix != ".gguf" or not gguf.is_file():
        raise RazorError(f"{gguf} is not a .gguf file.")
    with loading.clear_errors(gguf), open_regular(gguf) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = _folder_for(gguf, digest) if out is None else out.expanduser()
    if _is_conversion(folder, digest):
        return folder
    if out is not None and folder.exists() and _made_of(folder) != digest:
        raise RazorError(f"{out} is there already and no conversion of {gguf}: name a folder that is not there.")
    _convert(gguf, folder, digest)
    print(f"{gguf} was converted into the folder {folder}.", file=sys.stderr)
    return folder


def converted(digest: str) -> Path | None:
    """The folder in the cache with the whole conversion of a GGUF file of this SHA-256, None where there is none."""
    return next((folder for folder in _made(digest) if _is_conversion(folder, digest)), None)


def _made(digest: str) -> list[Path]:
    return sorted(folder for folder in _cache().glob("*") if _made_of(folder) == digest)


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("rlrazor")) / "gguf"


def _folder_for(gguf: Path, digest: str) -> Path:
    """The folder in the cache that was made of this content, or the name of a new one."""
    if there := _made(digest):
        return there[0]
    cache = _cache()
    name = gguf.stem.lstrip(".")[:200] or "model"
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(cache / one for one in names if not (cache / one).exists())


def _made_of(folder: Path) -> str:
    """The SHA-256 of the GGUF file that a folder was made of, "" of another."""
    with contextlib.suppress(OSError, ValueError):
        return (folder / _CONVERTED_FROM).read_text(encoding="ascii")
    return ""


def _is_conversion(folder: Path, digest: str) -> bool:
    return _made_of(folder) == digest and _is_whole(folder)


def _convert(gguf: Path, folder: Path, digest: str) -> None:
    partial = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        with loading.clear_errors(gguf):
            model, tokenizer = _read_gguf(gguf)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / _CONVERTED_FROM).write_text(digest, encoding="ascii")
            if _made_of(folder) == digest and not _is_whole(folder):  # somebody tidied up in it
                shutil.rmtree(folder)
            partial.rename(folder)
        except Exception as error:  # a full disk is an OSError to some and not to others: safetensors has its own
            if not _is_conversion(folder, digest):  # else another process was faster: its folder has the same content
                raise RazorError(
                    f"The conversion of {gguf} cannot be written to {folder.parent}: {cause_of(error)} Free some "
                    "space, or make that folder one that can be written to."
                ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file, the weights as plain float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with gguf.open("rb") as file:
        tensors = int.from_bytes(file.read(16)[8:], "little")  # after the magic number and the version
    weight_files.check_described(config.to_dict(), gguf, tensors)
    loading.check_size(AutoModelForCausalLM, config, 8 * gguf.stat().st_size)
    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **loading.in_dtype(torch.float32), output_loading_info=True
    )
    loading.require_all_weights(info, model)
    # Transformers still takes them for quantised and will not save them.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        with contextlib.suppress(AttributeError):
            delattr(model, attribute)
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _is_whole(folder: Path) -> bool:
    """Whether a saved model has all of its files: config, tokenizer, and each file of weights that its index names."""
    try:
        has_weights = bool(weight_files.paths_of(folder))
    except RazorError:
        return False
    return has_weights and all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
