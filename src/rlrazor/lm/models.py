"""Base policies: any causal LM from the hub, a folder or a GGUF file, in float32 or bfloat16, with or without LoRA.

Weights are read from safetensors only and a model's own code is never run: a pickle or a remote module executes
whatever its author put in. A GGUF file, quantised for inference, is converted once to a folder of float32 safetensors
in the cache.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.extras import needs_extra, needs_package
from rlrazor.lm import compute, hub
from rlrazor.lm.adapters import adapter_disabled, base_weights, unwrapped
from rlrazor.lm.model_files import MEND, check_config, read_adapter_config, read_config
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.versions import in_dtype, weights_by_config
from rlrazor.regular import open_regular

# What a causal language model's class is called, or one that has its weights.
_CAUSAL = re.compile(r"\w*(ForCausalLM|LMHeadModel|ForConditionalGeneration|(?<!Reward)(?<!Encoder)Model)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What defines a policy: its shape, weights and tokenizer. Read-me files and other frameworks' weights are left alone.
_POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "spiece.model")
_MODEL_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of the shards of a model that is not in one file
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.")  # pickles that are no weights
_LONGEST_HEADER = 100_000_000  # bytes, which is safetensors' own limit
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlrazor.lm import suitable  # it needs this module

    if dtype not in DTYPES:
        raise RazorError(f"Unknown dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    folder = _folder_of(str(source), cache_dir)
    _require_safetensors(folder, source)
    for name in ("config.json", "generation_config.json"):
        check_config(folder / name)
    _require_causal(folder, source)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and tokenizer is None:
        raise RazorError(
            f"{source} has no tokenizer (a Trainer without processing_class saves none): put the tokenizer's files of "
            "the model that it was fine-tuned from beside its weights."
        )
    with _loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, **in_dtype(DTYPES[dtype]), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        _require_all_weights(info)
        if has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    folders = [folder]
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        check_adapter(adapter)
        from peft import PeftModel

        with _loading(adapter), _without_peft_warning():
            # PEFT leaves at zero, with a warning, what a file lacks.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
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

        paths = _require_safetensors(_folder_of(str(source), cache_dir), source)
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
    from transformers import AutoTokenizer

    folder, tokenizer = Path(source).expanduser(), tuned.tokenizer
    saved = all((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if is_adapter(folder) and saved:
        with _loading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_same_vocabulary(base, replace(Vocabulary.of(tuned), source=str(source), tokens=tokenizer.get_vocab()))
    return tokenizer


def is_adapter(source: str | Path) -> bool:
    """Whether this is a folder that PEFT saved an adapter into."""
    return (Path(source).expanduser() / "adapter_config.json").is_file()


def check_adapter(source: str | Path) -> None:
    """Raise RazorError where an adapter has no weights that may be read, or is of another kind of model than ours.

    It shows before anything is loaded.
    """
    needs_package("peft", "An adapter")
    folder = Path(source).expanduser()
    _require_safetensors(folder, source, _ADAPTER_WEIGHTS)
    task = read_adapter_config(folder / "adapter_config.json").task_type
    if task not in (None, "CAUSAL_LM"):
        raise RazorError(f"The adapter in {source} is for {task:.40}, not for a causal language model (CAUSAL_LM).")


def check_weights(folder: Path, source: str) -> None:
    """Raise RazorError where a folder, called `source`, has no whole model or adapter: of files it reads headers."""
    _require_safetensors(folder, source, _ADAPTER_WEIGHTS if is_adapter(folder) else _MODEL_WEIGHTS)


def named_base(adapter: str | Path) -> str:
    """What an adapter says it was trained on, "" where it does not. Raises RazorError for a damaged config."""
    found = read_adapter_config(Path(adapter).expanduser() / "adapter_config.json")
    return found.base_model_name_or_path or ""


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
        return Path(snapshot_download(repository, allow_patterns=list(_POLICY_FILES)))
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **in_dtype(torch.float32), output_loading_info=True
    )
    _require_all_weights(info)
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
        has_weights = bool(_model_files(folder))
    except RazorError:
        return False
    return has_weights and all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def _require_safetensors(folder: Path, source: str | Path, name: str = _MODEL_WEIGHTS) -> list[Path]:
    """The files that a model's weights are loaded from, or an adapter's by its file's `name`.

    Raises RazorError where they are not there, not whole, or of two models.
    """
    if not folder.is_dir():
        raise RazorError(f"There is no folder {source}.")
    files = _model_files(folder)
    if files and is_adapter(folder):
        # Transformers puts the adapter on top of the weights, PEFT on top of the base; merged, it would count twice.
        raise RazorError(
            f"{source} has a model's weights, {files[0].name}, and adapter_config.json, so it could be a model, an "
            "adapter, or an adapter merged into it: move what you do not mean out of it."
        )
    if name == _ADAPTER_WEIGHTS:
        # Where its file is not there, PEFT looks for a pickle, whatever else is.
        files = [path for path in [folder / name] if path.is_file()]
    if not files:
        raise RazorError(f"{source} has no {name} file.{_instead(folder)}")
    for path in files:
        _check_whole(path)
    return files


def _model_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model in a folder from; none where it finds none.

    Other safetensors in the folder, of an optimiser, in another format or left by an earlier save, are not its weights.
    Raises RazorError where an index is damaged, or what is named is not there.
    """
    there = (name for name in (_MODEL_WEIGHTS, _INDEX) if (folder / name).is_file())
    name = _named_by_config(folder) or next(there, "")
    if not name:
        return []
    names = [name]
    if name.endswith(".json"):
        try:
            index = read_config(folder / name)
            names = sorted({str(shard) for shard in index["weight_map"].values()})
            if not names or not isinstance(index["metadata"], dict):  # without which transformers fails
                raise ValueError("it names no files or has no metadata")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RazorError(f"{folder / name} is damaged ({error!r}): save or download the model again.") from error
    for one in names:
        if not one.endswith(".safetensors") or Path(one).is_absolute() or ".." in Path(one).parts:
            raise RazorError(f"{folder} names {one} as its weights, which is no safetensors file of it: save it again.")
        if not (folder / one).is_file():
            raise RazorError(f"{folder} lacks {one}, of its weights: save or download the model again.")
    return [folder / one for one in names]


def _named_by_config(folder: Path) -> str:
    """The file of weights, or their index, that a config asks transformers for by name; "" where it does not."""
    try:
        name = read_config(folder / "config.json").get("transformers_weights") or ""
    except (OSError, ValueError, AttributeError):  # of which transformers complains
        return ""
    return str(name) if name and weights_by_config() else ""


def _instead(folder: Path) -> str:
    """What a folder holds that may have been taken for weights."""
    if is_adapter(folder) and (folder / _ADAPTER_WEIGHTS).is_file():
        return " It is an adapter, not a model: name its base as well."
    if any(folder.glob("pytorch_model_fsdp*")):
        return " Its weights are FSDP's shards: put them together with `accelerate merge-weights`."
    if any(folder.glob("global_step*")):
        return " Its weights are DeepSpeed's shards: put them together with DeepSpeed's zero_to_fp32.py."
    if any(path.suffix in _PICKLES and not _TRAINERS.match(path.name) for path in folder.iterdir()):
        return " Pickled weights are not read: they can run code. Convert them to safetensors."
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f" It has {', '.join(others)}, which transformers does not load."
    if checkpoints := sorted(path.name for path in folder.glob("checkpoint-*")):
        return f" It holds {', '.join(checkpoints)}: name one of them."
    return ""


def _check_whole(path: Path) -> None:
    """Raise RazorError where a safetensors file is not as long as its header says, or has nothing in it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(size, _LONGEST_HEADER) else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        whole = False
    if not whole or not any(ends):
        raise RazorError(
            f"{path} is damaged: {'it holds no weights' if whole else 'it is not a whole safetensors file'}. Save or "
            "download it again."
        )


def _require_causal(folder: Path, source: str | Path) -> None:
    """Raise RazorError for a classifier, a reward model, an encoder: transformers would load it as a language model.

    What calls itself a bare model passes, since a tied head is in it; loading shows whether its weights are all there.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = read_config(folder / "config.json")
        names, two_parts = config.get("architectures") or [], config.get("is_encoder_decoder")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RazorError(f"{folder / 'config.json'} has architectures that are no list of names: {MEND}.")
    except (OSError, ValueError, AttributeError):
        return  # transformers says what is wrong with it
    generates = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if two_parts or not (not names or any(name in generates or _CAUSAL.fullmatch(name) for name in names)):
        kind = "an encoder-decoder" if two_parts else f"by its config a {names[0]:.60}"
        raise RazorError(
            f"{source} is {kind}, not a causal language model, which alone can be measured and trained here."
        )


def _require_all_weights(info: Mapping[str, Any]) -> None:
    """Transformers draws what a file lacks at random, with a warning."""
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"it lacks the weights {missing[0]}{more}.")


@contextlib.contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Say in one sentence what the libraries raise at a damaged or unsupported model."""
    try:
        yield
    except Exception as error:  # tokenizers raise nothing more specific, others a dozen types
        raise RazorError(f"The model in {source} cannot be loaded: {cause_of(error)}") from error


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
        found = {path for pattern in _POLICY_FILES for path in folder.glob(pattern)}
        weights = [folder / _ADAPTER_WEIGHTS] if is_adapter(folder) else _model_files(folder)
        for path in sorted({path for path in found if path.suffix != ".safetensors"}.union(weights)):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
