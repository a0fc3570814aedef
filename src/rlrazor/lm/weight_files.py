"""The weights of a model or an adapter, and what its configs say of them: judged before a library reads them.

What is read is safetensors and JSON, of the folder that was named. A model from anywhere may be damaged or made to do
harm: name a pickle as its weights, be a pipe that never ends, or say of itself that it has a million layers.
"""

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import field_validator

from rlrazor.errors import RazorError, cause_of
from rlrazor.extras import needs_package
from rlrazor.system.documents import checked, loads
from rlrazor.system.files import kind_of, read_bytes
from rlrazor.system.schema import Open, Text

MEND = "save or download it again"
# What a causal language model's class is called, or one that has its weights.
_CAUSAL = re.compile(r"\w*(ForCausalLM|LMHeadModel|ForConditionalGeneration|(?<!Reward)(?<!Encoder)Model)")
# What defines a policy: its shape, weights and tokenizer. Read-me files and other frameworks' weights are left alone.
POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "spiece.model")
MODEL_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of the shards of a model that is not in one file
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.")  # pickles that are no weights
_LONGEST_HEADER = 100_000_000  # bytes, which is safetensors' own limit
_READ = (".safetensors", ".json", ".jinja", ".txt", ".model")
_LONGEST_TEXT = 1 << 29  # bytes; the largest tokenizers have a tenth of that
_LONGEST_NAME = 255  # characters of a file's name, where systems have their limit

# Numbers in a config for each of which something is made, and more of which than this no model has.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNT = re.compile(r"(n|num)_\w*(layers?|experts?|labels|heads?|groups?|blocks?)|\w+_layers")
_MANY, _FEW_LAYERS = 10_000, 128
_LARGEST_ID = 2**31 - 1


class ModelConfig(Open):
    """config.json and generation_config.json: the tokens that end a text, pad and begin one. -1, in old ones, is none.

    Of the rest transformers and PEFT say what is wrong.
    """

    eos_token_id: Any = None
    pad_token_id: Any = None
    bos_token_id: Any = None

    @field_validator("eos_token_id", "pad_token_id", "bos_token_id")
    @classmethod
    def _is_a_token(cls, value: Any) -> Any:
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(one) is int and -1 <= one <= _LARGEST_ID for one in ids):
            raise ValueError("there has to be the number of a token, or a list of such")
        return value


class AdapterConfig(Open):
    """adapter_config.json: what the adapter is for, and the base that it was trained on."""

    task_type: Text | None = None
    base_model_name_or_path: Text | None = None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What an adapter says of itself; raises RazorError for a config that is missing or damaged."""
    path, mend = folder / "adapter_config.json", "save the adapter again"
    return checked(AdapterConfig, _read_json(path, mend), path, mend=mend)


def is_adapter(source: str | Path) -> bool:
    """Whether this is a folder that PEFT saved an adapter into."""
    return (Path(source).expanduser() / "adapter_config.json").is_file()


def check_adapter(source: str | Path) -> None:
    """Raise RazorError where an adapter has no weights that may be read, or is of another kind of model than ours.

    It shows before anything is loaded.
    """
    needs_package("peft", "An adapter")
    folder = Path(source).expanduser()
    weights = find(folder, source, ADAPTER_WEIGHTS)
    config = _config_of(folder / "adapter_config.json")
    if (task := read_adapter_config(folder).task_type) not in (None, "CAUSAL_LM"):
        raise RazorError(f"The adapter in {source} is for {task:.40}, not for a causal language model (CAUSAL_LM).")
    if config.get("megatron_config") is not None:
        raise RazorError(f"The adapter in {source} names a module of Megatron's to import, which is not done.")
    _check_adapter_sizes(config, weights, source)


def _check_adapter_sizes(config: Mapping[str, Any], weights: "WeightFiles", source: str | Path) -> None:
    """PEFT makes the adapter of its config, in all of the base's layers, and looks at the weights only then."""
    largest = max((size for shape in weights.shapes.values() for size in shape), default=0)
    for name, value in _numbers(config):
        if abs(value) > max(_MANY, largest) and not re.search("key|seed|alpha", name):
            raise RazorError(
                f"The adapter in {source} has {name} = {value:.4g}, which none of its weights has room for."
            )
    replicated = config.get("layer_replication")
    if isinstance(replicated, list) and len(replicated) > max(_FEW_LAYERS, len(weights.shapes)):
        raise RazorError(
            f"The adapter in {source} repeats layers {len(replicated):,} times, and has no weights for them."
        )
    firsts = {shape[0] for name, shape in weights.shapes.items() if re.search("lora_(embedding_)?A", name) and shape}
    rank = config.get("r")
    if isinstance(rank, int) and firsts and not config.get("rank_pattern") and not any(rank <= size for size in firsts):
        raise RazorError(f"The adapter in {source} has r = {rank} by its config, and {max(firsts)} by its weights.")


def names_in(adapter: Path) -> list[str]:
    """The weights in an adapter's folder; none where it has no whole file of them."""
    path = adapter / ADAPTER_WEIGHTS
    return list(find(adapter, adapter, ADAPTER_WEIGHTS).shapes) if path.is_file() else []


def patterns_of(adapter: Path) -> list[str]:
    """What PEFT may take for a regular expression in an adapter's config; names alone are left out."""
    found = _inside(_config_of(adapter / "adapter_config.json"))
    return sorted({text for _, text in found if isinstance(text, str) and re.search(r"[*+{]", text)})


def check_weights(folder: Path, source: str) -> None:
    """Raise RazorError where a folder, called `source`, has no whole model or adapter: of files it reads headers."""
    find(folder, source, ADAPTER_WEIGHTS if is_adapter(folder) else MODEL_WEIGHTS)


def named_base(adapter: str | Path) -> str:
    """What an adapter says it was trained on, "" where it does not. Raises RazorError for a damaged config."""
    folder = Path(adapter).expanduser()
    check_readable(folder)
    return read_adapter_config(folder).base_model_name_or_path or ""


def check_readable(folder: Path) -> None:
    """Raise RazorError where a file that a library would read is a pipe or a device, or has no end in sight."""
    for path in folder.iterdir():
        if path.suffix not in _READ:
            continue
        try:
            found = path.stat()
        except OSError:  # a link to nothing
            continue
        if kind_of(found.st_mode) not in (None, "a folder"):
            raise RazorError(f"{path} is no file but a pipe, a socket or a device: put the file itself there.")
        if found.st_size > _LONGEST_TEXT and path.suffix != ".safetensors":
            raise RazorError(f"{path} has {found.st_size:,} bytes, more than any such file needs: download it again.")


def _read_json(path: Path, mend: str = MEND) -> Any:
    """What a JSON file holds, NaN and infinity as text; raises RazorError."""
    try:
        return loads(read_bytes(path).decode("utf-8-sig"), nan=str, lenient=True)
    except (OSError, ValueError) as error:
        raise RazorError(f"{path} is damaged ({cause_of(error).rstrip('.')}): {mend}.") from error


def _config_of(path: Path) -> Mapping[str, Any]:
    config = _read_json(path)
    if not isinstance(config, dict):
        raise RazorError(f"{path} is damaged (it is no JSON object): {MEND}.")
    return config


def _inside(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that a config holds, each with the name that is nearest to it; a name is also a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield name, key
            yield from _inside(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _inside(inner, name)
    else:
        yield name, value


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    for name, value in _inside(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model's or an adapter's weights, and of each tensor the shape and what it is stored as."""

    files: list[Path]
    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]

    @property
    def count(self) -> int:
        """How many numbers they are."""
        return sum(map(math.prod, self.shapes.values()))


def find(folder: Path, source: str | Path, name: str = MODEL_WEIGHTS) -> WeightFiles:
    """What a model's weights are loaded from, or an adapter's by its file's `name`.

    Raises RazorError where they are not there, not whole, or of two models, or where the folder has a file without end.
    """
    if not folder.is_dir():
        raise RazorError(f"There is no folder {source}.")
    check_readable(folder)
    files = paths_of(folder)
    if files and is_adapter(folder):
        # Transformers puts the adapter on top of the weights, PEFT on top of the base; merged, it would count twice.
        raise RazorError(
            f"{source} has a model's weights, {files[0].name}, and adapter_config.json, so it could be a model, an "
            "adapter, or an adapter merged into it: move what you do not mean out of it."
        )
    if name == ADAPTER_WEIGHTS:
        # Where its file is not there, PEFT looks for a pickle, whatever else is.
        files = [path for path in [folder / name] if path.is_file()]
    if not files:
        raise RazorError(f"{source} has no {name} file.{_instead(folder)}")
    tensors: dict[str, Any] = {}
    for path in files:
        header = _header_of(path)
        if twice := tensors.keys() & header.keys():
            raise RazorError(f"{source} has {some(twice)} in two files, {path.name} being one: download it again.")
        tensors |= header
    shapes, dtypes = ({name: tensors[name][key] for name in tensors} for key in ("shape", "dtype"))
    return WeightFiles(files, shapes, dtypes)


def some(names: Iterable[str]) -> str:
    """How many weights these are, and two of them."""
    few = sorted(names)
    shown = " and ".join(few[:2])
    return f"{len(few):,} weights, such as {shown}," if len(few) > 2 else f"the weight{'s' * (len(few) > 1)} {shown}"


def paths_of(folder: Path) -> list[Path]:
    """The files that transformers loads a model in a folder from; none where it finds none.

    Other safetensors in the folder, of an optimiser, in another format or left by an earlier save, are not its weights.
    Raises RazorError where an index is damaged, or what is named is not there.
    """
    there = (name for name in (MODEL_WEIGHTS, _INDEX) if (folder / name).is_file())
    name = _named_by_config(folder) or next(there, "")
    if not name:
        return []
    names = [name]
    if name.endswith(".json"):
        index = _read_json(folder / name)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        # Without metadata transformers fails.
        if not isinstance(shards, dict) or not shards or not isinstance(index.get("metadata"), dict):
            raise RazorError(
                f"{folder / name} is damaged (it names no files or has no metadata): save or download the model again."
            )
        names = sorted({str(shard) for shard in shards.values()})
    for one in names:
        shown = one if one.isprintable() and len(one) < _LONGEST_NAME else f"{one[:_LONGEST_NAME]!a}"
        if not one.endswith(".safetensors") or Path(one).is_absolute() or ".." in Path(one).parts:
            raise RazorError(
                f"{folder} names {shown} as its weights, which is no safetensors file of it: save it again."
            )
        if len(one) >= _LONGEST_NAME or not (folder / one).is_file():
            raise RazorError(f"{folder} lacks {shown}, of its weights: save or download the model again.")
    return [folder / one for one in names]


def _named_by_config(folder: Path) -> str:
    """The file of weights, or their index, that a config asks transformers for by name; "" where it does not."""
    if not (folder / "config.json").is_file():  # of which transformers complains
        return ""
    name = _config_of(folder / "config.json").get("transformers_weights") or ""
    return str(name) if name and weights_by_config() else ""


def weights_by_config() -> bool:
    """Whether `from_pretrained` reads the file of weights that a config names: since 4.57 or so."""
    from transformers import modeling_utils

    files = getattr(modeling_utils, "_get_resolved_checkpoint_files", None)
    return files is None or "transformers_explicit_filename" in inspect.signature(files).parameters


def _instead(folder: Path) -> str:
    """What a folder holds that may have been taken for weights."""
    if is_adapter(folder) and (folder / ADAPTER_WEIGHTS).is_file():
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


def _header_of(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; raises RazorError where it is not as long as they are, or has none."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(size, _LONGEST_HEADER) else {}
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        counts = [count for entry in header.values() for count in entry["shape"]]
        known = all(isinstance(entry["dtype"], str) for entry in header.values())
        whole = size == 8 + length + max(ends, default=0) and known and all(count >= 0 for count in counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        whole = False
    if not whole or not any(ends):
        raise RazorError(
            f"{path} is damaged: {'it holds no weights' if whole else 'it is not a whole safetensors file'}. Save or "
            "download it again."
        )
    found: dict[str, Any] = header
    return found


def check_config(folder: Path, source: str | Path, weights: "WeightFiles") -> None:
    """Raise RazorError where a model's config.json asks for what its weights cannot be, or for code."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            checked(ModelConfig, _read_json(path), path, mend=MEND)
    if (folder / "config.json").is_file():  # or else transformers says so
        check_described(_config_of(folder / "config.json"), source, len(weights.shapes))


def scheme_in(folder: Path) -> str:
    """How a model in a folder is quantised, by its config; "" where it is not, or there is none."""
    from rlrazor.lm.quantised import scheme_of

    path = folder / "config.json"
    return scheme_of(dict(_config_of(path))) if path.is_file() else ""


def check_described(config: Mapping[str, Any], source: str | Path, tensors: int) -> None:
    """`check_config`, of a config that is read and a number of tensors."""
    for name, value in _numbers(config):
        most = max(_FEW_LAYERS, tensors) if name in _LAYERS else _MANY
        if (name in _LAYERS or _COUNT.fullmatch(name)) and value > most:
            raise RazorError(
                f"The config of {source} has {name} = {value:.4g}, and its weights are {tensors:,} tensors: they "
                "do not belong together. Download the model again."
            )
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in _LAYERS:
            if isinstance(part.get(name), int) and part[name] < 1:
                raise RazorError(
                    f"The config of {source} has {name} = {part[name]}, and a model has at least one layer."
                )
    for name, value in _inside(config):
        if name.endswith("_implementation") and "/" in str(value):
            raise RazorError(
                f"{source} asks in config.json for code of the hub's to run it, {name} = {value!r:.100}: such code is "
                "not run. Take that line out."
            )


def require_causal(folder: Path, source: str | Path) -> None:
    """Raise RazorError for a classifier, a reward model, an encoder: transformers would load it as a language model.

    What calls itself a bare model passes, since a tied head is in it; loading shows whether its weights are all there.
    """
    from rlrazor.lm.classes import generating

    if not (folder / "config.json").is_file():
        return  # transformers says so
    config = _config_of(folder / "config.json")
    names, two_parts = config.get("architectures") or [], config.get("is_encoder_decoder")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RazorError(f"{folder / 'config.json'} has architectures that are no list of names: {MEND}.")
    if two_parts or not (not names or any(name in generating() or _CAUSAL.fullmatch(name) for name in names)):
        kind = f"an encoder-decoder ({', '.join(names)[:60]})" if two_parts else f"by its config a {names[0]:.60}"
        raise RazorError(
            f"{source} is {kind}, not a causal language model, which alone can be measured and trained here."
        )
