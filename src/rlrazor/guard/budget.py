"""What a watched run may lose by its law, whether a measurement is within that, and what is done where it is not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from rlrazor.analysis.forecast import Forecast
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.verdict import Limits, Verdict
from rlrazor.lm.means import MeanKL

OnBudget = Literal["warn", "stop", "keep"]
KEPT = "within-budget"  # folder in the trainer's output folder: the last model whose forecast was within the budget


@dataclass(frozen=True)
class BudgetState:
    """What a law says of one measurement; all None without one.

    `remaining`: how much KLs may still grow, in the proportions in which they have, until the forecast reaches the
    budget, or the end of what the law was fitted to. `verdict`: on the budget; None where there is none, or no law that
    may judge it. `level`: of the forecast's interval.
    """

    forecast: Forecast | None = None
    level: float | None = None
    budget: float | None = None
    remaining: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Budget:
    """The largest `drop` of the prior score to accept, a fraction of 1, by the forecast of a law.

    With `cautious` by the upper end of its interval. Raises RazorError for settings that are none.
    """

    law: LawFile | None
    drop: float | None
    on_budget: OnBudget
    cautious: bool

    def __post_init__(self) -> None:
        if self.on_budget not in ("warn", "stop", "keep"):
            raise RazorError(f"on_budget is 'warn', 'stop' or 'keep', not {self.on_budget!r}.")
        Limits(self.drop)  # which raises for what is no drop
        if self.drop == 0:
            raise RazorError("A budget is more than 0, such as 0.02 for two points of the prior score.")

    @cached_property
    def is_watched(self) -> bool:
        """Whether there is one, and a law that may judge it."""
        return self.law is not None and self.drop is not None and self.law.objection(limit=self.drop) is None

    def cautions(self) -> list[str]:
        """What has to be known of the law and the budget before training, in sentences."""
        if self.law is None:
            said = [
                "uncalibrated: no law was given, so there is KL to the base and no forecast. `razor calibrate` makes a "
                "law; `razor pick --kl-budget` takes a checkpoint without one."
            ]
            why = "without a law, KL says nothing about scores."
        else:
            said = [self.law.describe(), *self.law.cautions(limit=self.drop)]
            why = "by such a law nothing is warned of, stopped or kept."
        return said if self.drop is None or self.is_watched else [*said, f"the budget is not watched: {why}"]

    def judged(self, kl: Mapping[str, MeanKL], prompts: str, measured: int) -> BudgetState:
        """Of KLs measured on so many of the prompts of that hash."""
        if self.law is None:
            return BudgetState(budget=self.drop)
        forecast, level = self.law.forecast(kl, prompts=prompts, measured=measured), self.law.level
        if self.drop is None or not self.is_watched:
            return BudgetState(forecast, level, self.drop)
        remaining = self.law.remaining(kl, self.drop, prompts=prompts, measured=measured, cautious=self.cautious)
        # Who is not cautious goes by the forecast itself, as far as the law has seen.
        low, high = (forecast.low, forecast.high) if self.cautious else (forecast.drop, forecast.drop)
        high = math.inf if forecast.extrapolated else high
        verdict = Limits(cautious=self.cautious).judge(forecast.drop, low, high, self.drop)
        return BudgetState(forecast, level, self.drop, remaining, verdict)

    def done_about(self, verdict: Verdict | None, kept: int | None) -> str:
        """What follows from a forecast that is over the budget, or of which that cannot be told.

        `kept`: the step of the model that is kept, None where none is.
        """
        if verdict is Verdict.UNCERTAIN:
            return "this model is not kept" if self.on_budget == "keep" else "training goes on"
        if verdict is not Verdict.ABOVE:
            return ""
        return {
            "warn": "training goes on",
            "stop": "training stops here",
            "keep": f"the model of step {kept}, within it, is in {KEPT}"
            if kept
            else "no measured model within it is kept",
        }[self.on_budget]
