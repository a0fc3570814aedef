"""Base policies: any causal LM from the hub, a folder or a GGUF file, in float32 or bfloat16, with or without LoRA.

Weights are read from safetensors only and a model's own code is never run: a pickle or a remote module executes
whatever its author put in. A GGUF file, quantised for inference, is converted once to a folder of float32 safetensors
in the cache.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.lm import compute, hub

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What defines a policy: its shape, weights and tokenizer. Read-me files and other frameworks' weights are left alone.
_POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "spiece.model")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
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
    safetensors, no tokenizer, or needs code of its own, and for weights that are not finite.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise RazorError(f"Unknown dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    folder = _folder_of(str(source), cache_dir)
    _require_safetensors(folder, source)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and tokenizer is None:
        raise RazorError(
            f"{source} has no tokenizer (a Trainer without processing_class saves none): put the tokenizer's files of "
            "the model that it was fine-tuned from beside its weights."
        )
    with _loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        _require_all_weights(info)
        if has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    folders = [folder]
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        check_adapter(adapter)
        with _loading(adapter), _without_peft_warning():
            # PEFT leaves at zero, with a warning, what a file lacks.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
        folders.append(adapter)
    _check_finite(model, source)
    _set_padding(model, tokenizer, source)
    name = str(source) if adapter is None else f"{source} + {adapter}"
    return LanguageModel(model.to(compute.device()).eval(), tokenizer, name, _fingerprint(folders))


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


def weights_of(model: Any) -> dict[str, Tensor]:
    """A copy of all parameters, by the base's names, an adapter's update added to the matrices it belongs to.

    Not by merging and unmerging: taking the update away again would leave rounding errors in the base.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            for active in module.active_adapters:
                weights[f"{name}.weight"] += module.get_delta_weight(active).detach()
    return weights


class SavedWeights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, read one at a time as they are asked for.

    A file is mapped for each tensor anew: what stays mapped, and was read, counts as the process's memory.
    """

    def __init__(self, source: str | Path, cache_dir: Path | None = None) -> None:
        """Of a hub id, a folder or a GGUF file, as `load` takes them; raises its errors."""
        from safetensors import safe_open

        folder = _folder_of(str(source), cache_dir)
        _require_safetensors(folder, source)
        self._files: dict[str, Path] = {}
        with _loading(source):
            for path in sorted(folder.glob("*.safetensors")):
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


class AdaptedWeights(Mapping[str, Tensor]):
    """A PEFT model's parameters by the base's names, its update added, one at a time as they are asked for.

    Of `modules_to_save`, which PEFT trains copies of, the copies.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.lora import LoraLayer

        if any(getattr(config, "use_dora", False) for config in model.peft_config.values()):
            raise RazorError("The adapter is DoRA, which rescales weights: merge it into a model, and compare that.")
        self._base = base_weights(model)
        self._layers = {
            f"{name.removeprefix('base_model.model.')}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }

        self._copies: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            module, found, rest = name.removeprefix("base_model.model.").partition(".modules_to_save.")
            adapter, _, weight = rest.partition(".")
            if found and adapter in model.active_adapters:
                self._copies[f"{module}.{weight}"] = parameter.detach()

    def __getitem__(self, name: str) -> Tensor:
        weight = self._copies.get(name, self._base[name])
        layer = self._layers.get(name)
        for adapter in layer.active_adapters if layer is not None else ():
            weight = weight + layer.get_delta_weight(adapter).detach()  # type: ignore[union-attr]
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


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
    """Raise RazorError where an adapter has no weights that may be read: it shows before anything is loaded."""
    _require_safetensors(Path(source).expanduser(), source, _ADAPTER_WEIGHTS)


def named_base(adapter: str | Path) -> str:
    """What an adapter says it was trained on, "" where it does not. Raises RazorError for a damaged config."""
    path = Path(adapter).expanduser() / "adapter_config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise RazorError(f"The adapter's {path} is damaged ({error}): save the adapter again.") from error


def base_weights(model: Any) -> dict[str, Tensor]:
    """The base's parameters themselves, by its names: those under an adapter, and inside of a wrapper.

    Parameters that PEFT keeps a trained copy of (`modules_to_save`) are the originals.
    """
    weights = {}
    for name, parameter in unwrapped(model).named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        for prefix in ("base_model.model.", "_orig_mod."):
            name = name.removeprefix(prefix)
        weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter.detach()
    return weights


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel and torch.compile."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


DIGEST_VALUES = 4096  # of a weight that go into the digest: no fine-tuning leaves all of them alone
# What a config says of how weights are computed with. Names of files, token ids, dropout, caching and dtype are not.
_COMPUTING = re.compile(
    r"rope|rotary|(^|_)eps(ilon)?$|scal|softcap|multiplier|sliding_window|layer_types|hidden_act|activation(?!_dropout)|"
    r"head|alibi|parallel_residual|parallel_attn|experts_per_tok"
)


@torch.no_grad()
def base_digest(model: Any) -> str:
    """A SHA-256 that tells bases apart and an adapter's base from another: 16 hexadecimal digits.

    Of names, shapes, and evenly spaced values of every parameter rounded to bfloat16, so that a base loaded in float32
    and in bfloat16 is the same one; and of what its config says of how they are computed with, such as RoPE's scaling.
    Milliseconds, where hashing files would need the files.
    """
    config = unwrapped(model).config.get_text_config().to_dict()
    computing = {key: value for key, value in config.items() if _COMPUTING.search(key) and not key.startswith("_")}
    # An option that is off may be one that another version of transformers does not have.
    computing = {key: value for key, value in computing.items() if value not in (None, False)}
    digest = hashlib.sha256(json.dumps(computing, sort_keys=True, default=str).encode())
    for name, weight in sorted(base_weights(model).items()):
        flat = weight.flatten()
        chosen = torch.linspace(0, len(flat) - 1, min(len(flat), DIGEST_VALUES), dtype=torch.float64).long()
        values = flat[chosen.to(flat.device)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """A SHA-256 of what it makes of a prompt: the id of each token, the chat template, eos; 16 hexadecimal digits."""
    defining = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None), tokenizer.eos_token]
    return hashlib.sha256(str(defining).encode()).hexdigest()[:16]


def context_length(model: Any) -> int | None:
    """The most tokens a sequence may have; None where the config sets no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if limit is None else int(limit)


def _folder_of(source: str, cache_dir: Path | None) -> Path:
    """The local folder with the model: itself, a GGUF file's conversion, or the hub's download."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, cache_dir or Path(platformdirs.user_cache_dir("rlrazor")) / "gguf")
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


def _converted(gguf: Path, cache: Path) -> Path:
    """The folder of float32 safetensors for a GGUF file, named after its content; made where it is not there yet."""
    with _loading(gguf), gguf.open("rb") as file:
        folder = cache / hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if _is_whole(folder):
        return folder
    partial = cache / f".{folder.name}.{os.getpid()}"
    try:
        with _loading(gguf):
            model, tokenizer = _read_gguf(gguf)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if folder.exists() and not _is_whole(folder):  # somebody tidied up in it
                shutil.rmtree(folder)
            partial.rename(folder)
        except Exception as error:  # a full disk is an OSError to some and not to others: safetensors has its own
            if not _is_whole(folder):  # else another process was faster: its folder has the same content
                raise RazorError(
                    f"The conversion of {gguf} cannot be written to {cache}: {cause_of(error)} Free some space, or "
                    "make that folder one that can be written to."
                ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file, the weights as plain float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
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
    names, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in {"config.json", "tokenizer_config.json", *names})


def _require_safetensors(folder: Path, source: str | Path, name: str = "*.safetensors") -> None:
    """An adapter's file has to have its `name`: where it has not, PEFT looks for a pickle, whatever else is there."""
    if not folder.is_dir():
        raise RazorError(f"There is no folder {source}.")
    if not any(folder.glob(name)):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        reason = " Pickled weights are not read: they can run code. Convert them to safetensors." if pickled else ""
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        within = f" It holds {', '.join(checkpoints)}: name one of them." if checkpoints else ""
        raise RazorError(f"{source} has no {name.removeprefix('*')} file.{reason}{within}")


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
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id


def _fingerprint(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted({path for pattern in _POLICY_FILES for path in folder.glob(pattern)}):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
