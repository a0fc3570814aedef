"""When a monitor measures, on how much of the probes, and what is said of it as training begins.

And what the costs of measuring are set against: what a step of training reads, and how long it takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from rlrazor.guard import plan as planning
from rlrazor.guard import ranks
from rlrazor.guard.base_side import BaseSide, ProbeSizes
from rlrazor.guard.overlap import column
from rlrazor.guard.placing import multiplies_in_half
from rlrazor.guard.plan import Costs, Plan
from rlrazor.lm import compute
from rlrazor.lm.adapters import unwrapped
from rlrazor.lm.shards import size_of

TRAINING_COST = 2.0  # forward passes that an update costs per token: its own, and one for the gradients of activations
MEASURING_COST = 2.0  # ... and a measurement: its own, the products with two heads, and batches smaller than training's
FLOAT32_COST = 8.0  # a float32 product on a GPU against the half-precision ones of training
FEW_ROWS = 64  # of the training set whose tokens are counted
TIMED = 2  # the step that is timed, unless a measurement comes before: the first is slower than the rest


class Schedule:
    """The plan of one trainer's run, from the trainer's rows or its first step on, with the probes that it thins."""

    def __init__(self, base: BaseSide, precision: str | None, every: int | None, say: Callable[[str], None]) -> None:
        self.base, self.precision, self.say = base, precision, say
        self.thin = self.last = base
        self.plan: Plan | None = None if every is None else Plan(every, asked=True)
        self.costs: Costs | None = None
        self.clock = StepClock()
        self.counter: TokenCounter | None = None
        self.training_cost = 0.0

    def begin(self, args: Any, state: Any, model: Any, dataloader: Any) -> None:
        """Say the plan, which is decided now where the rows that are trained on show how many tokens they have."""
        model = unwrapped(model)
        self.clock = StepClock()
        weights = [(size_of(weight), weight.requires_grad) for weight in model.parameters()]
        own = sum(size for size, trains in weights if trains), sum(size for size, _ in weights)
        base = self.base
        found = ranks.everywhere(lambda: (base.sizes, base.pace, tokens_of_step(args, dataloader), own))
        seen = [tokens for _, _, tokens, _ in found]
        pace = max(pace for _, pace, _, _ in found)
        sizes = ProbeSizes([sizes for sizes, _, _, _ in found])
        # Of all, as each may have another part of the weights, and the plan has to be one.
        trained, every = (sum(counts) for counts in zip(*(counts for _, _, _, counts in found), strict=True))
        self.training_cost = TRAINING_COST + trained / every  # and one for the gradients of all weights
        if self.precision == "float32" and multiplies_in_half(args, model):
            self.training_cost /= FLOAT32_COST
        self.costs = Costs(int(state.max_steps), int(state.global_step), sizes, pace)
        if self.plan is not None or all(seen):
            self._decide(min(tokens or 0.0 for tokens in seen))
            return
        if not getattr(args, "torch_compile", False):
            self.counter = TokenCounter(model)
        self.say(f"[razor] {planning.undecided(self.costs)}")

    def decide(self) -> None:
        """After the first step, by its tokens in the process that read fewest; 0 where they could not be counted."""
        self._decide(float(min(ranks.everywhere(self.stop_counting))))

    def _decide(self, step_tokens: float) -> None:
        """Settle the plan, unless it is, and say it."""
        assert self.costs is not None
        sizes, allowed = self.costs.sizes, self.training_cost * step_tokens
        worth = (lambda fraction: MEASURING_COST * sizes.read(fraction) / allowed) if allowed else None
        self.costs = replace(self.costs, worth=worth)
        plan = self.plan or planning.choose(self.costs.steps, worth)
        ranks.together(lambda: self._settle(plan))
        self.say(f"[razor] {planning.described(plan, self.costs)}")

    def _settle(self, plan: Plan) -> None:
        self.plan = plan
        self.thin, self.last = self.base.thinned(plan.fraction), self.base.thinned(plan.last_fraction)

    def is_due(self, step: int) -> bool:
        """Whether it is one of every so many steps."""
        return self.plan is not None and step % self.plan.every == 0

    def say_timed(self) -> None:
        """Once: what the plan costs by the clock."""
        assert self.costs is not None
        assert self.plan is not None
        self.costs = replace(self.costs, step_seconds=max(ranks.everywhere(self.clock.read)))
        self.say(f"[razor] {planning.timed(self.plan, self.costs)}")

    def stop_counting(self) -> int:
        """How many tokens there were."""
        return self.counter.remove() if self.counter else 0


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
