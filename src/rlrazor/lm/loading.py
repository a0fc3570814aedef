"""What transformers and PEFT let pass, or only print, as they load a model, and what they raise, in one sentence.

They make at random what a file lacks, drop what a config leaves out, and take bits for numbers: all of it is refused.
"""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlrazor.errors import RazorError, cause_of, is_panic
from rlrazor.lm import compute, offloading, quantised, weight_files

_NUMBER = re.compile(r"\d+")
_INTEGER = re.compile(r"[IU]\d+|BOOL")
_LISTED = re.compile(r"\[(?:'[^']*'(?:, )?){3,}\]")
_SIZES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\) from checkpoint, .*?torch\.Size\((.*?)\)")
_ESCAPE = re.compile(r"\x1b\[[\d;]*m")
_SHAPES = re.compile(r"(\S.*?)\s*\|.*ckpt: torch\.Size\((.*?)\) vs model: *torch\.Size\((.*?)\)")


@contextlib.contextmanager
def clear_errors(source: str | Path) -> Iterator[None]:
    """Say in one sentence what the libraries raise at a damaged or unsupported model."""
    try:
        yield
    except RazorError:
        raise
    except BaseException as error:  # tokenizers raise nothing more specific, others a dozen types
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise RazorError(f"The model in {source} cannot be loaded: {cause_of(_with_few_names(error))}") from error


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT asks transformers for an attribute by its old name; a user can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of `from_pretrained` that loads weights in this dtype: `torch_dtype`, since 4.56 `dtype`."""
    from transformers import PretrainedConfig

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def check_size(auto: Any, config: Any, most: int) -> None:
    """Raise ValueError where a config describes many more than `most` weights: transformers would make them all."""
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except Exception:  # which loading will raise again
        return
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * most:
        raise ValueError(
            f"its config describes {described:,} weights, and its files have room for {most:,}: they do not belong "
            "together"
        )


def require_all_weights(info: Mapping[str, Any], model: Any) -> None:
    """Transformers draws what a file lacks at random, with a warning, and drops the layers that a config leaves out."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {weight_files.some(missing)} which its config.json describes")
    if beyond := beyond_layers(info["unexpected_keys"], model.state_dict()):
        raise ValueError(f"it has {weight_files.some(beyond)} in layers that its config.json leaves out")


def require_floats(model: Any, weights: weight_files.WeightFiles) -> None:
    """Transformers makes numbers of whatever bits a file says are integers, where nothing is quantised."""
    if quantised.scheme_of(model.config):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and _INTEGER.fullmatch(weights.dtypes.get(name, "")):
            raise ValueError(f"its {name} is stored as {weights.dtypes[name]}, which is no number of a weight")


def check_finite(model: Any, source: str | Path) -> None:
    """Raise RazorError for weights that are no numbers."""
    for path, module in model.named_modules():
        if quantised.is_quantised(module):
            continue  # bits are all of them numbers
        for name in [name for name, parameter in module._parameters.items() if parameter is not None]:
            if not compute.is_finite(offloading.brought_weight(module, name).detach()):
                full = f"{path}.{name}" if path else name
                raise RazorError(f"The weights of {source} are damaged: {full} is NaN or infinite in places.")


def beyond_layers(left_out: Iterable[str], names: Iterable[str]) -> list[str]:
    """Of weights that were left out, those that differ from a model's own by a number only: of layers beyond."""
    kinds = {_NUMBER.sub("N", name) for name in names}
    return [name for name in left_out if _NUMBER.sub("N", name) in kinds]


def mismatch(error: RuntimeError, report: Sequence[str]) -> Exception:
    """What transformers has only printed of shapes that do not fit."""
    if "ignore_mismatched_sizes" not in str(error):
        return error
    lines = [line for text in report for line in _ESCAPE.sub("", text).splitlines()]
    return ValueError(_unfitting([row.groups() for row in map(_SHAPES.match, lines) if row]))


def _unfitting(found: Sequence[tuple[str | Any, ...]]) -> str:
    """Of weights that do not fit their names, the shape in the file and the one by the config: the first of them."""
    text = "its weights do not have the shapes that its config describes"
    if found:
        name, stored, described = min(found)
        text += f": {name} is {stored}, not {described}" + (f", and {len(found) - 1} more" if len(found) > 1 else "")
    return text


def _with_few_names(error: BaseException) -> BaseException:
    """The same without all of the names that it lists: of PEFT's that can be a thousand characters."""
    text = _LISTED.sub(lambda found: weight_files.some(re.findall(r"'([^']*)'", found[0])).rstrip(","), str(error))
    if sizes := _SIZES.findall(text):
        text = _unfitting(sizes)
    return error if text == str(error) else Exception(text)
