"""What one measurement during training found: a row of the log, scalars for trackers, a line for people."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlrazor.analysis.forecast import FORWARD, PROBE, Forecast
from rlrazor.guard.budget import BudgetState
from rlrazor.guard.scale import shown_estimate
from rlrazor.guard.verdict import Verdict, known
from rlrazor.lm.means import MeanKL

_NAMES = {FORWARD: "KL", PROBE: "KL on the probe"}


@dataclass(frozen=True)
class Reading:
    """One measurement. KLs in nats per completion or text, with standard errors, and what the law says of them.

    `epoch`: where the trainer says. `prompts`: how many of each probe were measured; `whole`: that is all.
    """

    step: int
    epoch: float | None
    kl: Mapping[str, MeanKL]
    per_token: Mapping[str, float]
    prompts: Mapping[str, int]
    whole: bool
    judged: BudgetState
    seconds: float

    @property
    def forecast(self) -> Forecast | None:
        """None without a law."""
        return self.judged.forecast

    @property
    def remaining(self) -> Mapping[str, float]:
        """How much KLs may still grow within the budget, nats."""
        return self.judged.remaining

    @property
    def verdict(self) -> Verdict | None:
        """On the budget; None where it is not judged."""
        return self.judged.verdict

    @property
    def within(self) -> bool | None:
        """Whether it is within the budget; None where that cannot be told, or is not judged."""
        return None if self.verdict in (None, Verdict.UNCERTAIN) else self.verdict is Verdict.WITHIN

    def as_json(self) -> dict[str, Any]:
        """A row of the log: JSON has no infinity, so what never runs out is None."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            **{name: estimate.mean for name, estimate in self.kl.items()},
            **{f"{name}_stderr": known(estimate.stderr) for name, estimate in self.kl.items()},
            **{f"{name}_per_token": value for name, value in self.per_token.items()},
            "prompts": dict(self.prompts),
            "whole": self.whole,
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "level": self.judged.level,
            "budget": self.judged.budget,
            "remaining": {name: known(value) for name, value in self.remaining.items()},
            "within": self.within,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
        }

    def scalars(self) -> dict[str, float]:
        """What goes to trackers."""
        found = {name: estimate.mean for name, estimate in self.kl.items()}
        if self.forecast is not None:
            drops = {"drop": self.forecast.drop, "drop_low": self.forecast.low, "drop_high": self.forecast.high}
            found |= {f"forecast_{name}": value for name, value in drops.items()}
        found |= {f"remaining_{name}": value for name, value in self.remaining.items() if math.isfinite(value)}
        return {f"razor/{name}": value for name, value in found.items()}

    def line(self, done: str = "") -> str:
        """For people. `done`: what has been done about a forecast that is over the budget, or may be."""
        kls = ", ".join(f"{_NAMES[name]} {shown_estimate(estimate)}" for name, estimate in self.kl.items())
        if self.forecast is None:
            return f"[razor] step {self.step}: {kls} nats; uncalibrated: no law, so no forecast"
        shown, budget = self.forecast, self.judged.budget
        close = budget is not None and abs(shown.drop - budget) < 5e-4  # 2.0 points, over 2.0
        text = (
            f"[razor] step {self.step}: {kls} nats; forecast drop {100 * shown.drop:.{3 if close else 1}f} points "
            f"[{100 * shown.low:.1f}, {100 * shown.high:.1f}] ({self.judged.level:.0%})"
        )
        return text + self._about_budget(done) + ("; beyond what the law was fitted to" if shown.extrapolated else "")

    def _about_budget(self, done: str) -> str:
        """What is said of the budget, where it is judged."""
        most, forecast = self.judged.budget, self.forecast
        if self.verdict is None or most is None or forecast is None:
            return ""
        budget, so = f"the budget of {100 * most:.1f}", f": {done}" if done else ""
        if self.verdict is Verdict.UNCERTAIN:
            return f"; whether that is within {budget} cannot be told{so}"
        if self.verdict is Verdict.WITHIN:
            left = " and ".join(f"{nats:.3g} nats of {_NAMES[name]}" for name, nats in self.remaining.items())
            return f"; within {budget}, {left} left"
        if forecast.high <= most:
            return f"; that it is within {budget} cannot be told, which counts as over it{so}"
        return f"{', whose upper end' if forecast.drop <= most else ''} is over {budget}{so}"
