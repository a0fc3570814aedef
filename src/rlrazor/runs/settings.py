"""What the experiments' configs share: settings and their help, from a file or the command line; learning rates."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.system.documents import parse_json, parse_toml, read_text

WARMUP = 0.05  # of an epoch; independent of the number of epochs, so that a short run is a prefix of a long one

C = TypeVar("C", bound=Any)
Kinds = Mapping[str, tuple[bool, type]]
"""Setting -> (holds many, the type of one)."""


def kinds_of(config: type) -> Kinds:
    """The settings of a dataclass whose fields are numbers, names, or tuples of them."""
    return {
        one.name: (get_origin(hint) is tuple, get_args(hint)[0] if get_origin(hint) is tuple else hint)
        for one, hint in zip(fields(config), get_type_hints(config).values(), strict=True)
    }


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """Learning rates evenly spaced in the logarithm, rounded to 3 digits so that they can be read and typed."""
    return tuple(float(f"{lr:.3g}") for lr in np.geomspace(low, high, count))


def checkpoint_steps(steps_per_epoch: int, epochs: int, per_epoch: int) -> set[int]:
    """The steps after which a checkpoint is measured: evenly spaced, the last step of each epoch among them."""
    return {round((i + 1) * steps_per_epoch / per_epoch) for i in range(epochs * per_epoch)} - {0}


def lr_factor(step: int, total: int, steps_per_epoch: int, schedule: str) -> float:
    """The learning rate of 0-based `step` as a fraction of the peak: linear warm-up, then constant or cosine to 0."""
    warmup = max(1, round(WARMUP * steps_per_epoch))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def read_settings(file: Path) -> dict[str, Any]:
    """The keys and values of a TOML or JSON file, unchecked; the config.json of a run folder can be given as it is."""
    where = f"The config file {file}"
    text = read_text(file, missing=f"{where} cannot be read: there is none (No such file or directory).")
    raw = parse_json(text, where) if file.suffix == ".json" else parse_toml(text, where)
    if isinstance(raw, dict) and isinstance(raw.get("config"), dict):
        raw = {"preset": raw.get("preset"), **raw["config"]}
    if not isinstance(raw, dict):
        raise RazorError(f"{where} is not a table of settings.")
    if not isinstance(raw.get("preset"), str | None):
        raise RazorError(f"{where} has a preset that is not a name.")
    return raw


def setting(text: str, default: Any = MISSING) -> Any:
    """A field of a config; `text` is what the command line's help says of it."""
    return field(default=default, metadata={"help": text})


def help_of(config: type) -> dict[str, str]:
    """What each setting is, from its field's metadata: the command line's help."""
    return {one.name: one.metadata["help"] for one in fields(config)}


class Presets(Generic[C]):
    """The configs of an experiment by name, and what is typed as its settings: see `parse`.

    `sets`: names that stand for several methods.
    """

    def __init__(self, configs: Mapping[str, C], sets: Mapping[Any, Callable[[], tuple[str, ...]]]) -> None:
        self.configs, self.sets = configs, sets
        self.kinds = kinds_of(type(next(iter(configs.values()))))

    def resolve(self, preset: str, given: Mapping[str, Any] | None = None) -> C:
        """The preset with these settings, parsed, in place of its own. Raises RazorError for an unknown preset."""
        check_preset(preset, self.configs)
        return replace(self.configs[preset], **{name: self.parse(name, value) for name, value in (given or {}).items()})

    def parse(self, name: str, value: Any) -> Any:
        """A setting as its dataclass holds it, from a TOML or JSON value or a comma-separated string.

        `methods` also takes a name of `sets`; `lrs` and `rl_lrs` also take LOW:HIGH:COUNT, log-spaced. Raises
        RazorError, with the valid names for an unknown setting.
        """
        if name not in self.kinds:
            raise RazorError(f"Unknown setting {name!r:.60}. Settings: {', '.join(self.kinds)}.")
        many, kind = self.kinds[name]
        if not many:
            return _parse_one(name, kind, value)
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        if len(items) > bounds.MOST_VALUES:
            raise RazorError(f"{name} has {len(items):,} values, and {bounds.MOST_VALUES:,} are the most.")
        only = items[0] if len(items) == 1 and isinstance(items[0], str) else ""
        if name == "methods" and only in self.sets:
            return self.sets[only]()
        if name.endswith("lrs") and only.count(":") == 2:
            return _parse_range(name, only)
        return tuple(_parse_one(name, kind, item) for item in items)


def check_preset(preset: str, known: Collection[str]) -> None:
    """Raise RazorError for an unknown preset."""
    if preset not in known:
        raise RazorError(f"Unknown preset {preset!r:.60}. Presets: {', '.join(known)}.")


def _parse_range(name: str, text: str) -> tuple[float, ...]:
    """LOW:HIGH:COUNT, log-spaced."""
    first, last, number = text.split(":")
    low, high, count = _parse_one(name, float, first), _parse_one(name, float, last), _parse_one(name, int, number)
    if not 0 < low < high < math.inf or not 2 <= count <= bounds.MOST_VALUES:
        raise RazorError(
            f"{name}: {text!r:.60} is not LOW:HIGH:COUNT with 0 < LOW < HIGH and COUNT from 2 to "
            f"{bounds.MOST_VALUES:,}."
        )
    return log_spaced(low, high, count)


def check_many(config: Any, names: tuple[str, ...]) -> None:
    """Raise RazorError where one of these settings is empty or holds a value twice."""
    for name in names:
        values = getattr(config, name)
        if not values:
            raise RazorError(f"{name} is empty: name at least one.")
        if len(set(values)) < len(values):
            raise RazorError(f"{name} has the same value twice: {next(x for x in values if values.count(x) > 1)}.")


def check_bounds(config: Any) -> None:
    """Raise RazorError where a setting is out of its bounds, `bounds.BOUNDS`."""
    for one in fields(config):
        name, values = one.name, getattr(config, one.name)
        for value in values if isinstance(values, tuple) else (values,):
            bounds.check(name, value)


def check_runs(runs: int, checkpoints: int) -> None:
    """Raise RazorError for a grid that nobody could wait for, before it is counted out; `checkpoints`: of one run."""
    bounds.check_size("runs", runs, bounds.MOST_RUNS, "give fewer values")
    bounds.check_size("checkpoints of a run", checkpoints, bounds.MOST_CHECKPOINTS, "lower checkpoints_per_epoch")


def check_samples(config: Any, each: str) -> None:
    """Raise RazorError for a step of on-policy methods that no machine could hold: `group_size` of each of `each`."""
    samples = getattr(config, each) * config.group_size
    bounds.check_size("samples a step", samples, bounds.MOST_SAMPLES, f"lower {each} or group_size")


def _parse_one(name: str, kind: type, value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    try:
        parsed = kind(text)
    except (TypeError, ValueError, OverflowError):
        parsed = None
    # int(2.5), float(True) and str(3) succeed but are not what was meant.
    misread = isinstance(text, bool) or (kind is int and isinstance(text, float)) or (kind is str and text != parsed)
    if isinstance(parsed, str) and len(parsed) > bounds.LONGEST_NAME:
        raise RazorError(f"{name} has a name of {len(parsed):,} characters: give a shorter one.")
    if parsed is None or misread:
        raise RazorError(f"{name}: {_shown(value)} is not {_NOUNS[kind]}.")
    return parsed


_NOUNS = {int: "a whole number", float: "a number", str: "a name"}


def _shown(value: Any) -> str:
    """A whole number may be longer than Python writes out."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "it"
