"""When a monitor measures, on how much of the probes, and what is said of it as training begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlrazor.guard import plan as planning
from rlrazor.guard import ranks
from rlrazor.guard.base_side import BaseSide, Sizes
from rlrazor.guard.placing import multiplies_in_half
from rlrazor.guard.plan import Costs, Plan
from rlrazor.guard.steps import StepClock, TokenCounter, tokens_of_step
from rlrazor.lm.adapters import unwrapped

TRAINING_COST = 2.0  # forward passes that an update costs per token: its own, and one for the gradients of activations
MEASURING_COST = 2.0  # ... and a measurement: its own, the products with two heads, and batches smaller than training's
FLOAT32_COST = 8.0  # a float32 product on a GPU against the half-precision ones of training


class Schedule:
    """The plan of one trainer's run, from the trainer's rows or its first step on, with the probes that it thins."""

    def __init__(self, base: BaseSide, precision: str | None, every: int | None, say: Callable[[str], None]) -> None:
        self.base, self.precision, self.say = base, precision, say
        self.thin = self.last = base
        self.plan: Plan | None = None if every is None else Plan(every, asked=True)
        self.sizes: Sizes | None = None
        self.costs: Costs | None = None
        self.clock = StepClock()
        self.counter: TokenCounter | None = None
        self.training_cost = 0.0

    def begin(self, args: Any, state: Any, model: Any, dataloader: Any) -> None:
        """Say the plan, which is decided now where the rows that are trained on show how many tokens they have."""
        model = unwrapped(model)
        self.clock = StepClock()
        weights = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
        trained = sum(size for size, trains in weights if trains) / sum(size for size, _ in weights)
        self.training_cost = TRAINING_COST + trained  # and one for the gradients of all weights
        if self.precision == "float32" and multiplies_in_half(args, model):
            self.training_cost /= FLOAT32_COST
        base = self.base
        found = ranks.everywhere(lambda: (base.sizes, base.pace, tokens_of_step(args, dataloader)))
        self.sizes = Sizes.joined([sizes for sizes, _, _ in found])
        seen = [tokens for _, _, tokens in found]
        pace = max(pace for _, pace, _ in found)
        self.costs = Costs(int(state.max_steps), int(state.global_step), self.sizes.read, pace)
        if self.plan is not None or all(seen):
            self._decide(min(tokens or 0.0 for tokens in seen))
            return
        if not getattr(args, "torch_compile", False):
            self.counter = TokenCounter(model)
        self.say(f"[razor] {planning.undecided(self.costs, self.sizes.described)}")

    def decide(self) -> None:
        """After the first step, by its tokens in the process that read fewest; 0 where they could not be counted."""
        self._decide(float(min(ranks.everywhere(self.stop_counting))))

    def _decide(self, step_tokens: float) -> None:
        """Settle the plan, unless it is, and say it."""
        assert self.sizes is not None
        assert self.costs is not None
        sizes, allowed = self.sizes, self.training_cost * step_tokens
        worth = (lambda fraction: MEASURING_COST * sizes.read(fraction) / allowed) if allowed else None
        self.costs = replace(self.costs, worth=worth)
        plan = self.plan or planning.choose(self.costs.steps, worth)
        ranks.together(lambda: self._settle(plan))
        self.say(f"[razor] {planning.described(plan, self.costs, sizes.described)}")

    def _settle(self, plan: Plan) -> None:
        self.plan = plan
        self.thin = self.base.thinned(plan.fraction) if plan.fraction < 1 else self.base
        self.last = self.base.thinned(plan.last_fraction) if plan.last_fraction < 1 else self.base

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
