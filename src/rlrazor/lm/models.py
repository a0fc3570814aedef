"""Base policies: any causal LM from the hub, a folder or a GGUF file, in float32 or bfloat16, with or without LoRA.

Weights are read from safetensors only and a model's own code is never run: a pickle or a remote module executes
whatever its author put in.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.lm import classes, compute, loading, offloading, suitable, trials, weight_files
from rlrazor.lm.quantised import scheme_of
from rlrazor.lm.sources import folder_of, tokenizer_folder_of
from rlrazor.system import quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PACKED = 16  # weights in a number of a quantised file, at most
# Any of these makes a tokenizer. Transformers itself may make an empty one out of nothing.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal LM and its tokenizer. `hashed` makes the fingerprint: of large files it takes long, and few ask."""

    model: Any
    tokenizer: Any
    source: str
    hashed: Callable[[], str] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of all that defines it: same hex, same policy."""
        return self.hashed()

    @classmethod
    def in_memory(cls, model: Any, tokenizer: Any, source: str) -> "LanguageModel":
        """One that was made rather than loaded, checked and set up in the same way."""
        digest = hashlib.sha256(f"{model.config.to_json_string()}\n{sorted(tokenizer.get_vocab().items())}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        loading.check_finite(model, source)
        _set_padding(model, tokenizer, source)
        return cls(model.to(compute.device()).eval(), tokenizer, source, digest.hexdigest)


def load(
    source: str | Path,
    *,
    adapter: Path | None = None,
    dtype: str = "float32",
    tokenizer: Any = None,
    quantization: Any = None,
) -> LanguageModel:
    """Load a policy from a hub id, a local folder in the hub's layout, or a `.gguf` file, onto `compute.device()`.

    `adapter` is a folder that PEFT saved. `dtype` is a name in `DTYPES`. `tokenizer`, the base's, is that of a source
    without one: a Trainer saves none that it was not given. `quantization`: one of transformers' configs, which it is
    quantised by as it is loaded; a folder that is quantised has its own. What does not fit on the device is placed by
    accelerate over all there are, the machine's memory and the disk. Raises RazorError for a source that is not there
    or cannot be reached, has no safetensors, no tokenizer, needs code of its own or is something else than a causal
    language model, and for weights that are not finite.
    """
    needs_extra("guard")
    if dtype not in DTYPES:
        raise RazorError(f"Unknown dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    folder, adapter = folder_of(str(source)), None if adapter is None else Path(adapter).expanduser()
    weights = weight_files.find(folder, source)
    weight_files.check_config(folder, source, weights)
    weight_files.require_causal(folder, source)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and tokenizer is None:
        raise RazorError(
            f"{source} has no tokenizer (a Trainer without processing_class saves none): put the tokenizer's files of "
            "the model that it was fine-tuned from beside its weights."
        )
    with loading.clear_errors(source), ThreadPoolExecutor(1) as beside:
        tried = beside.submit(trials.try_tokenizer, folder)
        model = _model_of(folder, weights, dtype, adapter, quantization)
        tried.result()
        if has_tokenizer:
            tokenizer = _tokenizer_in(folder)
    folders = [folder]
    if adapter is not None:
        model = _with_adapter(model, adapter)
        folders.append(adapter)
    loading.check_finite(model, source)
    _set_padding(model, tokenizer, source)
    name = str(source) if adapter is None else f"{source} + {adapter}"
    model = (
        model.eval() if offloading.is_placed(model) or scheme_of(model.config) else model.to(compute.device()).eval()
    )
    suitable.require_measurable(model)
    return LanguageModel(model, tokenizer, name, partial(_fingerprint, folders))


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

    A tokenizer may have gained tokens, such as one to pad with, for outputs that the model had already; tokens beyond
    the outputs, which some tokenizers' classes add, mean nothing.
    """
    written = {(token, number) for token, number in base.tokens.items() if number < base.outputs}
    if base.outputs != tuned.outputs or not written <= tuned.tokens.items():
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
    with loading.without_peft_warning():
        return get_peft_model(model, config)


def tokenizer_of(tuned: LanguageModel, source: str | Path, base: Vocabulary) -> Any:
    """The tokenizer of the tuned model from `source`: of an adapter the one saved beside it, or else the base's.

    Raises RazorError for a damaged one, and where the base's token ids mean something else to it.
    """
    folder, tokenizer = Path(source).expanduser(), tuned.tokenizer
    saved = all((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if weight_files.is_adapter(folder) and saved:
        trials.try_tokenizer(folder)
        with loading.clear_errors(folder):
            tokenizer = _tokenizer_in(folder)
    check_same_vocabulary(base, replace(Vocabulary.of(tuned), source=str(source), tokens=tokenizer.get_vocab()))
    return tokenizer


def tokenizer_at(source: str) -> Any:
    """The tokenizer of a model that is not loaded. Raises RazorError where there is none, or it is damaged."""
    needs_extra("guard")
    folder = tokenizer_folder_of(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise RazorError(f"{source} has no tokenizer: name a folder or hub id that has.")
    trials.try_tokenizer(folder)
    with loading.clear_errors(source):
        return _tokenizer_in(folder)


def _tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder, tried: some settings are looked at only as it is used."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer("")
    return tokenizer


def _model_of(
    folder: Path, weights: weight_files.WeightFiles, dtype: str, adapter: Path | None, quantization: Any
) -> Any:
    """The model in a folder, all of its weights and no others; for an adapter without what that knows nothing of.

    Raises anything.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = classes.class_of(config, () if adapter is None else weight_files.names_in(adapter))
    stored, how = scheme_of(config) != "", {}
    if quantization is not None:
        config.quantization_config = how["quantization_config"] = quantization
    loading.check_size(auto, config, weights.count * (_PACKED if stored else 1))
    size = sum(path.stat().st_size for path in weights.files) if stored else weights.count * DTYPES[dtype].itemsize
    place = offloading.placing(size, compute.device(), quantised=bool(scheme_of(config)))
    # What it warns of and matters is raised.
    with quiet.warnings_of("transformers.modeling_utils") as report:
        try:
            model, info = auto.from_pretrained(
                folder, **loading.in_dtype(DTYPES[dtype]), use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **how, **place,
            )  # fmt: skip
        except RuntimeError as error:
            raise loading.mismatch(error, report) from error
    offloading.forget_folder(model, place.get("offload_folder"))
    loading.require_all_weights(info, model)
    loading.require_floats(model, weights)
    return model


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter of PEFT's around its layers, all of it."""
    weight_files.check_adapter(adapter)
    from peft import PeftModel

    with loading.clear_errors(adapter), loading.without_peft_warning():
        # PEFT leaves at zero, with a warning, what a file lacks.
        warnings.filterwarnings("error", "Found missing adapter keys")
        trials.try_patterns(weight_files.patterns_of(adapter), [name for name, _ in model.named_modules()])
        with offloading.left_placed(
            model, adapter / weight_files.ADAPTER_WEIGHTS
        ) as how:  # PEFT would place it anew, and write beside its files
            adapted = PeftModel.from_pretrained(model, adapter, **how)
        # And it leaves out, without one, what the model has no layer for.
        own = {name.replace(".default", "") for name in adapted.state_dict()}
        stored = weight_files.find(adapter, adapter, weight_files.ADAPTER_WEIGHTS).shapes
        if beyond := loading.beyond_layers([name for name in stored if name not in own], own):
            raise ValueError(f"it has {weight_files.some(beyond)} for layers that the model does not have")
    return adapted


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
