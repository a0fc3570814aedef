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

from rlrazor.errors import RazorError
from rlrazor.lm import compute

# What a causal language model's class is called, or one that has its weights.
_CAUSAL = re.compile(r"\w*(ForCausalLM|LMHeadModel|ForConditionalGeneration|(?<!Reward)(?<!Encoder)Model)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What defines a policy: its shape, weights and tokenizer. Read-me files and other frameworks' weights are left alone.
_POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "spiece.model")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
    source: str | Path, *, adapter: Path | None = None, dtype: str = "float32", cache_dir: Path | None = None
) -> LanguageModel:
    """Load a policy from a hub id, a local folder in the hub's layout, or a `.gguf` file, onto `compute.device()`.

    `adapter` is a folder that PEFT saved. `dtype` is a name in `DTYPES`. `cache_dir` is where converted GGUF files are
    kept; by default the user's cache folder. Raises RazorError for a source that is not there or cannot be reached, has
    no safetensors, needs code of its own or is something else than a causal language model, and for weights that are
    not finite.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlrazor.lm import suitable  # it needs this module

    if dtype not in DTYPES:
        raise RazorError(f"Unknown dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    folder = _folder_of(str(source), cache_dir)
    _require_safetensors(folder, source)
    _require_causal(folder, source)
    with _loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        _require_all_weights(info)
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
    """Raise RazorError where an adapter has no weights that may be read, or is of another kind of model than ours.

    It shows before anything is loaded.
    """
    folder = Path(source).expanduser()
    _require_safetensors(folder, source, _ADAPTER_WEIGHTS)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # PEFT says what is wrong with its config
        task = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise RazorError(f"The adapter in {source} is for {task}, not for a causal language model (CAUSAL_LM).")


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
        return _converted(path, cache_dir or Path(platformdirs.user_cache_dir("rlrazor")) / "gguf")
    if path.is_dir():
        return path
    if path.exists():
        raise RazorError(f"{source} is neither a folder with a model nor a .gguf file.")
    if path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise RazorError(f"There is no {source}. Give a hub id, a folder with a model, or a .gguf file.")
    return _downloaded(source)


def _downloaded(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_POLICY_FILES)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise RazorError(
            f"The hub has no model {repository}, or does not show it to you. Check the name; a model that asks for "
            "consent needs `hf auth login`."
        ) from error
    except Exception as error:  # the hub's HTTP library, whose errors these are, differs between its versions
        raise RazorError(
            f"There is no folder {repository}, the hub cannot be reached, and its cache does not have it. Try again "
            "with a connection, or give a local folder or .gguf file."
        ) from error


def _converted(gguf: Path, cache: Path) -> Path:
    """The folder of float32 safetensors for a GGUF file, named after its content; made where it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf.open("rb") as file:
        folder = cache / hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if folder.exists():
        return folder
    partial = cache / f".{folder.name}.{os.getpid()}"
    try:
        with _loading(gguf):
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            _require_all_weights(info)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # Its weights are plain float32 by now, but transformers still takes it for quantised and will not save it.
            for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
                with contextlib.suppress(AttributeError):
                    delattr(model, attribute)
            with contextlib.suppress(AttributeError):
                del model.config.quantization_config
            partial.mkdir(parents=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        # Whole or not at all. Another process may have been faster: its folder has the same content.
        with contextlib.suppress(OSError):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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


def _require_causal(folder: Path, source: str | Path) -> None:
    """Raise RazorError for a classifier, a reward model, an encoder: transformers would load it as a language model.

    What calls itself a bare model passes, since a tied head is in it; loading shows whether its weights are all there.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names, two_parts = config.get("architectures") or [], config.get("is_encoder_decoder")
    except (OSError, ValueError, AttributeError):
        return  # transformers says what is wrong with it
    generates = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if two_parts or not (not names or any(name in generates or _CAUSAL.fullmatch(name) for name in names)):
        kind = "an encoder-decoder" if two_parts else f"by its config a {names[0]}"
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
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RazorError(f"The model in {source} cannot be loaded: {first_line}") from error


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
        for path in sorted({path for pattern in _POLICY_FILES for path in folder.glob(pattern)}):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
