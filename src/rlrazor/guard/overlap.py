"""Whether the prompts that are measured on are also trained on."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Sequence
from itertools import islice
from typing import Any

from rlrazor.lm.probes import Prompt

ROWS = 100_000  # of a training set that are looked at: more would take seconds
IDS = ("prompt_ids", "prompt_input_ids", "input_ids")  # what TRL's trainers leave of a row: DPO's, older ones', SFT's
COLUMNS = ("prompt", "text", "messages", *IDS)


def count_overlap(prompts: Sequence[Prompt], ids: Sequence[Collection[Sequence[int]]], dataloader: Any) -> int:
    """How many of the prompts are in the training set, as far as that can be seen.

    `ids`: of each prompt its tokens, in every form in which they may be trained on, such as with and without a chat
    template. A row has a prompt when its `prompt` is it, or its `text`, its `messages` or its token ids begin with it.
    A set that streams, or packs several rows into one, is not looked into: 0.
    """
    dataset = getattr(dataloader, "dataset", None)
    columns = getattr(dataset, "column_names", None) or ()
    name = next((name for name in COLUMNS if name in columns), None)
    if dataset is None or name is None or not hasattr(dataset, "__len__"):
        return 0
    keys: list[set[Any]] = [
        {tuple(form) for form in forms} if name in IDS else {_said(prompt)}
        for prompt, forms in zip(prompts, ids, strict=True)
    ]
    wanted: set[Hashable] = set().union(*keys)
    lengths = sorted({len(key) for key in wanted})  # type: ignore[arg-type]
    found: set[Hashable] = set()
    as_it_is = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset  # not as tensors
    for value in islice(as_it_is[name], ROWS):
        row = _tokens(value) if name in IDS else _said(value)
        if row is None:
            continue
        beginnings = [row] if name == "prompt" else [row[:length] for length in lengths]
        found |= wanted.intersection(beginnings)
    return sum(not key.isdisjoint(found) for key in keys)


def _tokens(value: Any) -> tuple[int, ...] | None:
    """Token ids; None for anything else."""
    return tuple(value) if isinstance(value, list) and all(isinstance(first, int) for first in value[:1]) else None


def _said(prompt: Any) -> str | None:
    """Text as it is; of a conversation what its user said first; None for anything else."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not all(isinstance(turn, dict) for turn in prompt):
        return None
    said = [turn.get("content") for turn in prompt if turn.get("role") == "user"]
    return said[0] if said and isinstance(said[0], str) else json.dumps(prompt, sort_keys=True, default=str)
