"""What a step of training reads and how long it takes: what the costs of measuring are set against."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from rlrazor.guard.overlap import column
from rlrazor.lm import compute

FEW_ROWS = 64  # of the training set whose tokens are counted
TIMED = 2  # the step that is timed, unless a measurement comes before: the first is slower than the rest


class TokenCounter:
    """Tokens that a model reads while it trains, until it is removed."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if model.training and isinstance(ids, torch.Tensor):
            self.tokens += ids.numel()

    def remove(self) -> int:
        """Stop counting; how many there were."""
        self.hook.remove()
        return self.tokens


class StepClock:
    """How long a step takes, by the last of the first TIMED."""

    def __init__(self) -> None:
        self.began, self.seconds, self.steps, self.is_read = 0.0, 0.0, 0, False

    def begin(self, model: Any) -> None:
        """A step begins."""
        if not self.is_read and model is not None:
            self.began = compute.now(model)

    def end(self, model: Any) -> None:
        """It ends."""
        if not self.is_read and self.began and model is not None:
            self.seconds, self.steps = compute.now(model) - self.began, self.steps + 1

    def is_ready(self, *, due: bool) -> bool:
        """Whether it is time to say it: TIMED steps are over, or a measurement comes before that."""
        return not self.is_read and self.steps > 0 and (due or self.steps >= TIMED)

    def read(self) -> float:
        """Seconds of the step that was timed, which ends timing."""
        self.is_read = True
        return self.seconds


def tokens_of_step(args: Any, dataloader: Any) -> float | None:
    """Tokens that a step reads in this process, by the first rows of the training set; None where they do not show it.

    Rows that stream, or that are not token ids yet, are not looked at: reading them could change what is trained on.
    """
    rows = getattr(args, "train_batch_size", 0) * getattr(args, "gradient_accumulation_steps", 1)
    try:
        dataset = getattr(dataloader, "dataset", None)
        if isinstance(dataset, list | tuple):
            found = [row["input_ids"] for row in dataset[:FEW_ROWS]]
        else:
            found = list(islice(column(dataloader, ["input_ids"])[1], FEW_ROWS))
        lengths = [min(len(ids), getattr(args, "max_length", None) or len(ids)) for ids in found]
    except Exception:  # of a data set of the user's own
        return None
    return rows * sum(lengths) / len(lengths) if any(lengths) and rows else None
