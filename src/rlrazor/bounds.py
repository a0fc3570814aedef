"""How much of a thing can be asked for: checked before anything is counted out, allocated or started.

Far beyond what anyone would wait for, and short of what hangs, exhausts memory, or another library refuses in its own
words. The names are those of settings and of options.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rlrazor.errors import RazorError

LARGEST_SEED = 2**32 - 1  # of numpy's generator, which transformers seeds
MOST_STEPS = 10**9
MOST_TOKENS = 10**6  # of a completion
MOST_ROWS = 10**9  # of a data set
MOST_RUNS = 100_000  # of a grid: years, each being minutes
MOST_VALUES = 1000  # of one setting, such as learning rates
MOST_CHECKPOINTS = 100_000  # of a run, each of which is measured
LONGEST_NAME = 4096  # characters, of a path too
MOST_EPISODES = 10**6  # of a robot, at a time: all are in memory
MOST_SAMPLES = 2**26  # in a step: their log-probabilities are 256 MiB
_LARGEST_FLOAT32 = 3.4e38


class WrongKindError(RazorError):
    """A setting is no number, where one is needed: to YAML 2e-2 is text."""


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`, both of which may be had, unless with `open_low` or `open_high`."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def wrong(self, value: float) -> str | None:
        """What a value that is not within should be; NaN never is."""
        if not (value > self.low if self.open_low else value >= self.low):
            return f"{'more than' if self.open_low else 'at least'} {_written(self.low)}"
        if not (value < self.high if self.open_high else value <= self.high):
            return f"{'less than' if self.open_high else 'at most'} {_written(self.high)}"
        return None

    def __str__(self) -> str:
        low, high = _written(self.low), _written(self.high)
        return f"{'above ' * self.open_low}{low} {'and below' if self.open_high else 'to'} {high}"


_COUNT = Bounds(1, 10**6)
_STEPS = Bounds(0, MOST_STEPS)
_RATES = Bounds(0, _LARGEST_FLOAT32, open_low=True)
_SEEDS = Bounds(0, LARGEST_SEED)
_NATS = Bounds(0, 10**6)
_PARTS = Bounds(0, 1, open_low=True, open_high=True)
_UPDATES = Bounds(1, 10**7)
_EPISODES = Bounds(1, 100_000)
_NOISE = Bounds(0, 100)

BOUNDS: Mapping[str, Bounds] = {
    "lr": _RATES,
    "lrs": _RATES,
    "rl_lrs": _RATES,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "orders": Bounds(1, 2),
    "target": Bounds(0, 1, open_low=True),
    "train_size": Bounds(1, 60_000),
    "test_size": Bounds(1, 10_000),
    "batch_sizes": _COUNT,
    "rl_prompts": _COUNT,
    "group_size": Bounds(2, 10**6),
    "iterations": Bounds(1, 1000),
    "seed": _SEEDS,
    "seeds": _SEEDS,
    "checkpoints_per_epoch": Bounds(1, 10_000),
    "max_steps": _STEPS,
    "warmup_steps": _STEPS,
    "kl_coef": Bounds(0, 10**6),
    "replay_share": _PARTS,
    "ewc_strength": Bounds(0, 10**12),
    "lwf_strength": Bounds(0, 10**6),
    "own_tries": Bounds(1, 10_000),
    "rounds": Bounds(1, 10**6),
    "lora_rank": Bounds(0, 65_536),
    "max_new_tokens": Bounds(0, MOST_TOKENS),
    "top_k": Bounds(1, 1000),
    "train_prompts": Bounds(0, MOST_ROWS),
    "test_prompts": Bounds(1, MOST_ROWS),
    "kl_samples": Bounds(1, 10_000),
    "prior_limit": Bounds(0, MOST_ROWS),
    "fewshot": Bounds(-1, 1000),  # -1 of a config: as the task says
    "thresholds": Bounds(0, 1, open_low=True),
    "pretrain_steps": Bounds(1, 10**7),
    "pretrain_epochs": Bounds(1, 10_000),
    "pretrain_size": Bounds(1, 60_000),  # images that the training sets have
    "updates": _UPDATES,
    "rl_updates": _UPDATES,
    "grid": Bounds(1, 1000),
    "per_start": _EPISODES,
    "tries": _EPISODES,
    "starts": _EPISODES,
    "demonstrations": _EPISODES,
    "new_demonstrations": _EPISODES,
    "episodes": _EPISODES,
    "kl_episodes": _EPISODES,
    "noise": _NOISE,
    "new_noise": _NOISE,
    "expert_noise": _NOISE,
    "bc_updates": _UPDATES,
    "bc_batch": _COUNT,
    "bc_lr": _RATES,
    "width": Bounds(2, 65_536),
    "layers": Bounds(1, 1000),
    "heads": Bounds(1, 1000),
    "jobs": Bounds(1, 1024),
    "cpus": Bounds(0.01, 1024),  # none would be room for any number of runs
    "gpus": Bounds(0, 1024),
    "line": Bounds(1, MOST_RUNS),
    "workers": Bounds(0, 1024),
    "threads": Bounds(1, 1024),
    "micro_batch": _COUNT,
    "save_every": Bounds(0, MOST_STEPS),  # 0: never
    "samples": Bounds(1, 10_000),
    "every": Bounds(1, MOST_STEPS),
    "interval": Bounds(0.01, 86_400),  # seconds
    "idle": Bounds(0, 10**6, open_low=True),  # minutes
    "level": _PARTS,
    "budget": Bounds(0, 1, open_high=True),
    "kl_budget": _NATS,
    "kl_budget_probe": _NATS,
    "first_tokens": Bounds(1, MOST_TOKENS),
    "recover_steps": Bounds(1, 100_000),
    "recover_lr": _RATES,
    "recover_rank": Bounds(0, 65_536),
    "recover_seed": _SEEDS,
}


def check(name: str, value: Any, shown: str | None = None) -> None:
    """Raise RazorError where a number is not within the bounds of that name; what is no number, or has none, passes.

    `shown`: what to call it, by default its name.
    """
    bounds = BOUNDS.get(name)
    if bounds is None or isinstance(value, bool) or not isinstance(value, Real):
        return
    number: Any = value  # numpy's are Real as well
    if (wanted := bounds.wrong(number)) is not None:
        kind = "a fraction of 1, " if bounds.high == 1 else ""
        raise RazorError(f"{shown or name} must be {kind}{wanted}, not {_written(number)}.")


def check_options(options: Mapping[str, Any]) -> None:
    """The same of each option of a command, by its name in Python."""
    for name, value in options.items():
        check(name, value, f"--{name.replace('_', '-')}")


def check_whole(name: str, value: Any) -> None:
    """The same of what has to be a whole number: 2.0 and true are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise WrongKindError(f"{name} must be a whole number, not {value!r:.60}.")
    check(name, value)


def check_number(name: str, value: Any) -> None:
    """The same of what has to be a number: true and text are none; None, which is not given, passes."""
    if isinstance(value, bool) or not isinstance(value, Real | None):
        raise WrongKindError(f"{name} must be a number, not {value!r:.60}.")
    check(name, value)


def check_size(what: str, size: float, most: float, mend: str) -> None:
    """Raise RazorError where something that settings multiply to is more than `most`."""
    if not size <= most:
        raise RazorError(f"These settings come to {_written(size)} {what}, and {_written(most)} are the most: {mend}.")


def _written(value: float) -> str:
    if not isinstance(value, int):
        return f"{value:g}"
    digits = int(abs(value).bit_length() * math.log10(2)) + 1  # to write it out Python refuses for more than 4,300
    return f"{value:,}" if abs(value) < 10**15 else f"a number of {digits} digits"
