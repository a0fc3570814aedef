"""Base policies: any causal LM from the hub, a folder or a GGUF file, in float32 or bfloat16, with or without LoRA.

Weights are read from safetensors only and a model's own code is never run: a pickle or a remote module executes
whatever its author put in. A GGUF file, quantised for inference, is converted once to a folder of float32 safetensors
in the cache.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of, disk_error_in, is_panic
from rlrazor.extras import needs_extra, needs_package
from rlrazor.lm import compute, hub, trials, weight_files
from rlrazor.lm.adapters import adapter_disabled, base_weights, unwrapped
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.versions import in_dtype
from rlrazor.lm.weight_files import check_adapter as check_adapter
from rlrazor.lm.weight_files import check_weights as check_weights
from rlrazor.lm.weight_files import is_adapter as is_adapter
from rlrazor.lm.weight_files import named_base as named_base
from rlrazor.system.regular import open_regular

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PACKED = 16  # weights in a number of a quantised file, at most
_NUMBER = re.compile(r"\d+")
_INTEGER = re.compile(r"[IU]\d+|BOOL")
_LISTED = re.compile(r"\[(?:'[^']*'(?:, )?){3,}\]")
_SIZES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\) from checkpoint, .*?torch\.Size\((.*?)\)")
_ESCAPE = re.compile(r"\x1b\[[\d;]*m")
_SHAPES = re.compile(r"(\S.*?)\s*\|.*ckpt: torch\.Size\((.*?)\) vs model: *torch\.Size\((.*?)\)")
# Any of these makes a tokenizer. Transformers itself may make an empty one out of nothing.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal LM and its tokenizer. `fingerprint` is a SHA-256 of all that defines it: same hex, same policy."""

    model: Any
    tokenizer: Any
    source: str
    fingerprint: str

    @classmethod
    def in_memory(cls, model: Any, tokenizer: Any, source: str) -> "LanguageModel":
        """One that was made rather than loaded, checked and set up in the same way."""
        digest = hashlib.sha256(f"{model.config.to_json_string()}\n{sorted(tokenizer.get_vocab().items())}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        _check_finite(model, source)
        _set_padding(model, tokenizer, source)
        return cls(model.to(compute.device()).eval(), tokenizer, source, digest.hexdigest())


def load(
    source: str | Path,
    *,
    adapter: Path | None = None,
    dtype: str = "float32",
    cache_dir: Path | None = None,
    tokenizer: Any = None,
) -> LanguageModel:
    """Load a policy from a hub id, a local folder in the hub's layout, or a `.gguf` file, onto `compute.device()`.

    `adapter` is a folder that PEFT saved. `dtype` is a name in `DTYPES`. `cache_dir` is where converted GGUF files are
    kept; by default the user's cache folder. `tokenizer`, the base's, is that of a source without one: a Trainer saves
    none that it was not given. Raises RazorError for a source that is not there or cannot be reached, has no
    safetensors, no tokenizer, needs code of its own or is something else than a causal language model, and for
    weights that are not finite.
    """
    needs_extra("guard")
    from rlrazor.lm import suitable  # it needs this module

    if dtype not in DTYPES:
        raise RazorError(f"Unknown dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    folder = _folder_of(str(source), cache_dir)
    weights = weight_files.weights_of(folder, source)
    weight_files.check_config(folder, source, weights)
    weight_files.require_causal(folder, source)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and tokenizer is None:
        raise RazorError(
            f"{source} has no tokenizer (a Trainer without processing_class saves none): put the tokenizer's files of "
            "the model that it was fine-tuned from beside its weights."
        )
    with _loading(source), ThreadPoolExecutor(1) as beside:
        tried = beside.submit(trials.try_tokenizer, folder)
        model = _model_of(folder, weights, dtype)
        tried.result()
        if has_tokenizer:
            tokenizer = _tokenizer_in(folder)
    folders = [folder]
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        model = _with_adapter(model, adapter)
        folders.append(adapter)
    _check_finite(model, source)
    _set_padding(model, tokenizer, source)
    name = str(source) if adapter is None else f"{source} + {adapter}"
    model = model.to(compute.device()).eval()
    suitable.require_measurable(model, tokenizer)
    return LanguageModel(model, tokenizer, name, _fingerprint(folders))


@dataclass(frozen=True)
class Vocabulary:
    """What token ids mean to a model: its outputs, and the tokenizer's ids by token."""

    source: str
    outputs: int
    tokens: Mapping[str, int]

    @classmethod
    def of(cls, lm: LanguageModel) -> "Vocabulary":
        """A model's, which need not be kept in memory for it."""
        return cls(lm.source, len(lm.model.get_output_embeddings().weight), lm.tokenizer.get_vocab())


def check_same_vocabulary(base: Vocabulary, tuned: Vocabulary) -> None:
    """Raise RazorError unless token ids mean the same in both: KL compares probabilities id by id.

    A tokenizer may have gained tokens, such as one to pad with, for outputs that the model had already.
    """
    if base.outputs != tuned.outputs or not base.tokens.items() <= tuned.tokens.items():
        raise RazorError(
            f"{tuned.source} and {base.source} have different vocabularies ({tuned.outputs} and {base.outputs} "
            f"outputs, {len(tuned.tokens)} and {len(base.tokens)} tokens). Compare a model with its own base."
        )


def add_lora(model: Any, rank: int) -> Any:
    """A PEFT model that trains a LoRA of `rank` on every linear layer but the head, scaled by alpha / rank = 2.

    The layers of `model` are replaced in place. One factor starts at zero, so that the policy is the base's; the other
    is drawn from torch's global generator.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with _without_peft_warning():
        return get_peft_model(model, config)


class SavedWeights(Mapping[str, Tensor]):
    """The tensors of a model's folder by name, read one at a time as they are asked for.

    Of the files that transformers loads it from, whatever else is beside them. A file is mapped for each tensor anew:
    what stays mapped, and was read, counts as the process's memory.
    """

    def __init__(self, source: str | Path, cache_dir: Path | None = None) -> None:
        """Of a hub id, a folder or a GGUF file, as `load` takes them; raises its errors."""
        from safetensors import safe_open

        paths = weight_files.weights_of(_folder_of(str(source), cache_dir), source).files
        self._files: dict[str, Path] = {}
        with _loading(source):
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def tokenizer_of(tuned: LanguageModel, source: str | Path, base: Vocabulary) -> Any:
    """The tokenizer of the tuned model from `source`: of an adapter the one saved beside it, or else the base's.

    Raises RazorError for a damaged one, and where the base's token ids mean something else to it.
    """
    folder, tokenizer = Path(source).expanduser(), tuned.tokenizer
    saved = all((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if weight_files.is_adapter(folder) and saved:
        trials.try_tokenizer(folder)
        with _loading(folder):
            tokenizer = _tokenizer_in(folder)
    check_same_vocabulary(base, replace(Vocabulary.of(tuned), source=str(source), tokens=tokenizer.get_vocab()))
    return tokenizer


def _tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder, tried: some settings are looked at only as it is used."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer("")
    return tokenizer


DIGEST_TOKENS = 128
DIGEST_VALUES = 32  # log-probabilities that are kept of them
SAME_WEIGHTS = 1e-9  # of their norm: what the order of a sum in float64 may change
# Nats by which a log-probability may differ between machines and libraries, whose weights are the same.
SAME_LOGITS = {"float32": 5e-3}
SAME_LOGITS_IN_HALF = 0.15


@torch.no_grad()
def token_log_probs(model: Any, precision: str | None = None, *, adapted: bool = False) -> Tensor:
    """What a model thinks of fixed tokens, spread over its vocabulary: log pi of each but the first, in nats, float64.

    Of a PEFT model without its adapter, or with `adapted` with it; in its weights' own precision unless one is named.
    """
    model = unwrapped(model)
    rows = len(model.get_input_embeddings().weight)
    length = min(DIGEST_TOKENS, context_length(model) or DIGEST_TOKENS)
    ids = [(7919 * at * at + 104729 * at + 1) % rows for at in range(length)]
    ids_T = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
    off = nullcontext() if adapted else adapter_disabled(model)
    with compute.measuring(model, precision or compute.precision_of(model)), off:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, -length:]
    logp_TV = logits_TV[:-1].double().log_softmax(dim=-1)
    logp_T: Tensor = logp_TV.gather(1, ids_T[1:, None].to(logp_TV.device))[:, 0].cpu()
    return logp_T


@torch.no_grad()
def base_digest(model: Any, precision: str | None = None) -> str:
    """What tells bases apart, and an adapter's base from another: all of its weights, and what they compute.

    The sum and the norm of the weights, rounded to bfloat16, so that a base loaded in float32 and in bfloat16 is one;
    and log-probabilities of fixed tokens in the named precision. Neither depends on the names, the order or the fusing
    of weights, nor on those of settings, which change with the version of a library. To be compared by `is_same_base`,
    as last digits depend on the machine. Raises NotFiniteError.
    """
    total, square = 0.0, 0.0
    for weight in base_weights(model).values():
        rounded = weight.detach().to(torch.bfloat16) if weight.is_floating_point() else weight.detach().float()
        total += float(rounded.sum(dtype=torch.float64))
        square += float(torch.linalg.vector_norm(rounded, dtype=torch.float64)) ** 2
    logp_T = token_log_probs(model, precision)
    if not logp_T.isfinite().all():
        raise NotFiniteError("logits are not finite")
    chosen = np.linspace(0, len(logp_T) - 1, min(len(logp_T), DIGEST_VALUES)).astype(int)
    values = " ".join(f"{value:.4f}" for value in logp_T.numpy()[chosen])
    return f"{precision or compute.precision_of(model)} {total:.12e} {math.sqrt(square):.12e} {values}"


def is_digest(text: str) -> bool:
    """Whether this is a digest of this version's."""
    return len(text.split()) > 3 and text.split()[0] in compute.PRECISIONS


def is_same_base(one: str, other: str) -> bool:
    """Whether two digests are of one base: the same weights, and log-probabilities that differ by rounding only."""
    if not is_digest(one) or not is_digest(other):
        return False
    (precision, *numbers), (other_precision, *other_numbers) = one.split(), other.split()
    if len(numbers) != len(other_numbers):
        return False
    try:
        (total, norm, *values), (other_total, other_norm, *other_values) = (
            [float(number) for number in some] for some in (numbers, other_numbers)
        )
    except ValueError:
        return False
    if max(abs(total - other_total), abs(norm - other_norm)) > SAME_WEIGHTS * max(abs(total), norm):
        return False
    tolerance = max(SAME_LOGITS.get(name, SAME_LOGITS_IN_HALF) for name in (precision, other_precision))
    apart = sorted(abs(a - b) for a, b in zip(values, other_values, strict=True))
    return apart[len(apart) // 2] <= tolerance  # of a mixture of experts a few may be routed otherwise


def tokenizer_digest(tokenizer: Any) -> str:
    """A SHA-256 of what it makes of a prompt: the id of each token, the chat template, eos; 16 hexadecimal digits."""
    defining = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None), tokenizer.eos_token]
    return hashlib.sha256(str(defining).encode()).hexdigest()[:16]


# What configs call the most positions, the first that there is.
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "model_max_length",
)  # fmt: skip


def context_length(model: Any) -> int | None:
    """The most tokens a sequence may have; None where the config sets no limit.

    RoBERTa and its kin count positions from behind the padding row of their table, which holds so many fewer.
    """
    try:
        config = model.config.get_text_config(decoder=True)
    except ValueError:  # a config of several parts, of which transformers will not choose
        config = model.config
    limits = [limit for name in _CONTEXTS if isinstance(limit := getattr(config, name, None), int) and limit > 0][:1]
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        table = isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[-1]
        if table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def _folder_of(source: str, cache_dir: Path | None) -> Path:
    """The local folder with the model: itself, a GGUF file's conversion, or the hub's download."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return convert(path, cache_dir)
    if path.is_dir():
        return path
    if path.exists():
        raise RazorError(f"{source} is neither a folder with a model nor a .gguf file.")
    if path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise RazorError(f"There is no {source}. Give a hub id, a folder with a model, or a .gguf file.")
    return _downloaded(source)


def _downloaded(repository: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(weight_files.POLICY_FILES)))
    except GatedRepoError as error:
        raise RazorError(
            f"The hub shows {repository} only to those who have agreed to its terms. Agree to them on its page, then "
            "log in with `hf auth login`."
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise RazorError(
            f"The hub has no model {repository}, or does not show it to you. Check the name; one that is private needs "
            "`hf auth login`."
        ) from error
    except Exception as error:
        if (disk := disk_error_in(error)) is not None:
            raise RazorError(
                f"{repository} cannot be kept in {constants.HF_HUB_CACHE}: {disk.strerror}. Free some space there, or "
                "set HF_HOME to a folder that can be written to."
            ) from error
        if hub.is_unreachable(error):
            raise RazorError(
                f"There is no folder {repository}, the hub cannot be reached, and its cache does not have it. Try "
                "again with a connection, or give a local folder or .gguf file."
            ) from error
        status = hub.answer_in(error)
        who = "Downloading it failed" if status is None else f"The hub answered {status}"
        raise RazorError(f"There is no folder {repository}. {who}: {cause_of(error)}") from error


_CONVERTED_FROM = ".gguf-sha256"  # in a conversion: of what


def convert(gguf: Path, cache_dir: Path | None = None, out: Path | None = None) -> Path:
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
    with _loading(gguf), open_regular(gguf) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = cache_dir or Path(platformdirs.user_cache_dir("rlrazor")) / "gguf"
    folder = _folder_for(gguf, digest, cache) if out is None else out.expanduser()
    if _is_conversion(folder, digest):
        return folder
    if out is not None and folder.exists() and _made_of(folder) != digest:
        raise RazorError(f"{out} is there already and no conversion of {gguf}: name a folder that is not there.")
    _convert(gguf, folder, digest)
    print(f"{gguf} was converted into the folder {folder}.", file=sys.stderr)
    return folder


def _folder_for(gguf: Path, digest: str, cache: Path) -> Path:
    """The folder in the cache that was made of this content, or the name of a new one."""
    there = sorted(folder for folder in cache.glob("*") if _made_of(folder) == digest)
    if there:
        return there[0]
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
        with _loading(gguf):
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
    _check_size(config, 8 * gguf.stat().st_size)
    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **in_dtype(torch.float32), output_loading_info=True
    )
    _require_all_weights(info, model)
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


def _model_of(folder: Path, weights: weight_files.Weights, dtype: str) -> Any:
    """The model in a folder, all of its weights and no others. Raises anything."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    packed = _PACKED if getattr(config, "quantization_config", None) else 1
    _check_size(config, weights.count * packed)
    with _reported() as report:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, **in_dtype(DTYPES[dtype]), use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise _mismatch(error, report) from error
    _require_all_weights(info, model)
    _require_floats(model, weights)
    return model


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter of PEFT's around its layers, all of it."""
    weight_files.check_adapter(adapter)
    from peft import PeftModel

    with _loading(adapter), _without_peft_warning():
        # PEFT leaves at zero, with a warning, what a file lacks.
        warnings.filterwarnings("error", "Found missing adapter keys")
        trials.try_patterns(weight_files.patterns_of(adapter), [name for name, _ in model.named_modules()])
        adapted = PeftModel.from_pretrained(model, adapter)
        # And it leaves out, without one, what the model has no layer for.
        own = {name.replace(".default", "") for name in adapted.state_dict()}
        stored = weight_files.weights_of(adapter, adapter, weight_files.ADAPTER_WEIGHTS).shapes
        if beyond := _beyond([name for name in stored if name not in own], own):
            raise ValueError(f"it has {weight_files.some(beyond)} for layers that the model does not have")
    return adapted


def _beyond(left_out: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those weights that differ from a model's own by a number only: they are of layers that it does not have."""
    kinds = {_NUMBER.sub("N", name) for name in names}
    return [name for name in left_out if _NUMBER.sub("N", name) in kinds]


def _check_size(config: Any, most: int) -> None:
    """Raise ValueError where a config describes many more than `most` weights: transformers would make them all."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # which loading will raise again
        return
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * most:
        raise ValueError(
            f"its config describes {described:,} weights, and its files have room for {most:,}: they do not belong "
            "together"
        )


def _require_all_weights(info: Mapping[str, Any], model: Any) -> None:
    """Transformers draws what a file lacks at random, with a warning, and drops the layers that a config leaves out."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {weight_files.some(missing)} which its config.json describes")
    if beyond := _beyond(info["unexpected_keys"], model.state_dict()):
        raise ValueError(f"it has {weight_files.some(beyond)} in layers that its config.json leaves out")


def _require_floats(model: Any, weights: weight_files.Weights) -> None:
    """Transformers makes numbers of whatever bits a file says are integers, where nothing is quantised."""
    if getattr(model.config, "quantization_config", None):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and _INTEGER.fullmatch(weights.dtypes.get(name, "")):
            raise ValueError(f"its {name} is stored as {weights.dtypes[name]}, which is no number of a weight")


def _mismatch(error: RuntimeError, report: Sequence[str]) -> Exception:
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


@contextlib.contextmanager
def _reported() -> Iterator[list[str]]:
    """What transformers reports of a model as it loads it, kept from standard error: what matters is raised."""
    logger, messages = logging.getLogger("transformers.modeling_utils"), list[str]()
    handler, before = logging.Handler(), (logger.level, logger.propagate)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Say in one sentence what the libraries raise at a damaged or unsupported model."""
    try:
        yield
    except RazorError:
        raise
    except BaseException as error:  # tokenizers raise nothing more specific, others a dozen types
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise RazorError(f"The model in {source} cannot be loaded: {cause_of(_with_few_names(error))}") from error


def _with_few_names(error: BaseException) -> BaseException:
    """The same without all of the names that it lists: of PEFT's that can be a thousand characters."""
    text = _LISTED.sub(lambda found: weight_files.some(re.findall(r"'([^']*)'", found[0])).rstrip(","), str(error))
    if sizes := _SIZES.findall(text):
        text = _unfitting(sizes)
    return error if text == str(error) else Exception(text)


@contextlib.contextmanager
def _without_peft_warning() -> Iterator[None]:
    """PEFT asks transformers for an attribute by its old name; a user can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check_finite(model: Any, source: str | Path) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RazorError(f"The weights of {source} are damaged: {name} is NaN or infinite in places.")


def _set_padding(model: Any, tokenizer: Any, source: str | Path) -> None:
    """Pad on the left, and with eos where there is no token for it: nothing here or in TRL goes by a pad token's id."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RazorError(f"The tokenizer of {source} has neither a pad token nor an end-of-sequence token.")
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def _fingerprint(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        found = {path for pattern in weight_files.POLICY_FILES for path in folder.glob(pattern)}
        weights = (
            [folder / weight_files.ADAPTER_WEIGHTS]
            if weight_files.is_adapter(folder)
            else weight_files.paths_of(folder)
        )
        for path in sorted({path for path in found if path.suffix != ".safetensors"}.union(weights)):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
