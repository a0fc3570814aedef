"""Prompts that a task makes itself, out of a few examples and what is asked: the same on every machine."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.task import Item, Splits

EXAMPLES = 4

Key = TypeVar("Key")


def in_turn(
    name: str,
    path: Path | None,
    keys: Sequence[Key],
    make: Callable[[Key, random.Random], Item],
    draws: tuple[int, int],
) -> Splits:
    """Items about each of the keys in turn, so many of each to train on and to measure on; no prompt twice.

    Raises RazorError for a `path`: there is nothing to read.
    """
    if path is not None:
        raise RazorError(f"{name} makes its own prompts and reads no file: leave --data out.")
    rng, train, test = random.Random(0), *draws
    prompts: dict[str, Item] = {}
    while len(prompts) < (train + test) * len(keys):
        item = make(keys[len(prompts) % len(keys)], rng)
        prompts.setdefault(item.prompt, item)
    items = list(prompts.values())
    border = train * len(keys)
    return Splits(items[:border], items[border:])
