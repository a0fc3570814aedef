"""Checkpoints to choose from: their frontiers, and which of them are within what is to be accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlrazor import bounds
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.verdict import SEVERITY, Limits, Verdict, judge, upper_end
from rlrazor.lm.kl import Estimate

DROP = "drop"
LEVEL = 0.95  # of the interval of a KL
AXES = (DROP, FORWARD, PROBE)  # what a new-task score is weighed against


@dataclass(frozen=True)
class Candidate:
    """A checkpoint. `new` is the metric's value; `drop` of the prior score, a fraction of 1, measured or forecast.

    `low` and `high` are the ends of the drop's interval, infinite where the error of a measured one is not known; all
    three are None where there is no law. `extrapolated`: its KL is beyond what the law was fitted to. `kl`: nats
    per completion, or text, on each probe that was measured, of which `prompts` counts the prompts, where it is known.
    """

    name: str
    step: int
    new: float
    drop: float | None
    low: float | None
    high: float | None
    measured: bool
    extrapolated: bool = False
    kl: Mapping[str, Estimate] = field(default_factory=dict)
    prompts: Mapping[str, int] = field(default_factory=dict)

    def interval(self, of: str) -> tuple[float, float, float] | None:
        """The drop, or a KL, with the ends of its interval; None where it is not known.

        A KL's is of 95 %, by its prompts. Where their number is not known its ends are two standard errors away, and
        without one (NaN), of a single prompt, it could be up to three times as large; infinite: nobody knows.
        """
        if of == DROP:
            if self.drop is None or self.low is None or self.high is None:
                return None
            return self.drop, self.low, self.high
        if of not in self.kl:
            return None
        kl = self.kl[of]
        if of in self.prompts:
            return kl.mean, *kl.interval(self.prompts[of], LEVEL)
        spread = 2 * (kl.mean if math.isnan(kl.stderr) else kl.stderr)
        return kl.mean, max(kl.mean - spread, 0.0), kl.mean + spread

    def at(self, of: str, *, upper: bool = False) -> float:
        """The estimate alone, or the `upper` end of its interval; infinite where it is not known."""
        found = self.interval(of)
        return math.inf if found is None else found[2 if upper else 0]


@dataclass(frozen=True)
class Budgets(Limits):
    """Limits of what a checkpoint may cost: of `kl_probe` too, on the generic probe, nats.

    The estimate says which checkpoints are admitted, with `cautious` the upper end of the interval. `accept_uncertain`:
    of those, none is doubted.
    """

    kl_probe: float | None = None

    @property
    def most(self) -> dict[str, float]:
        """Those that there are, by what they are of."""
        found = {DROP: self.drop, FORWARD: self.kl, PROBE: self.kl_probe}
        return {of: value for of, value in found.items() if value is not None}

    @classmethod
    def of(cls, budget: float | None, kl_budget: float | None, kl_budget_probe: float | None, **how: bool) -> Budgets:
        """Those that were given. Raises RazorError for what is no budget."""
        for name, given in (("budget", budget), ("kl_budget", kl_budget), ("kl_budget_probe", kl_budget_probe)):
            bounds.require_number(name, given)
        if budget is not None and not 0 <= budget < 1:
            raise RazorError(
                f"A budget is a fraction of 1, such as 0.02 for two points of the prior score, not {budget}."
            )
        for nats in (kl_budget, kl_budget_probe):
            if nats is not None and not (nats >= 0 and math.isfinite(nats)):
                raise RazorError(f"A KL budget is a number of nats, such as 0.5, not {nats}.")
        if how.get("cautious") and how.get("accept_uncertain"):
            raise RazorError("Be cautious or accept what is uncertain, not both.")
        return cls(budget, kl_budget, kl_probe=kl_budget_probe, **how)

    def judged(self, one: Candidate, of: str) -> float:
        """What counts of a checkpoint; infinite where it is not known, as an interval's end beyond the law's fit."""
        return upper_end(one.at(of, upper=self.cautious), beyond=self.cautious and _is_beyond(one, of))

    def admits(self, one: Candidate) -> bool:
        """Whether all that counts is within the limits."""
        return all(self.judged(one, of) <= most for of, most in self.most.items())

    def verdict(self, one: Candidate) -> Verdict:
        """The worst of the verdicts on each limit; what is not known cannot be told."""
        said = [Verdict.WITHIN]
        for of, most in self.most.items():
            if (found := one.interval(of)) is None:
                said.append(Verdict.UNCERTAIN)
                continue
            estimate, low, high = found
            high = upper_end(high, beyond=_is_beyond(one, of))
            how = {"cautious": self.cautious, "accept_uncertain": self.accept_uncertain}
            said.append(judge(estimate, low, high, most, **how))
        return max(said, key=SEVERITY.index)


def _is_beyond(one: Candidate, of: str) -> bool:
    """Whether that is a forecast at a KL beyond what its law was fitted to: the interval is of smaller ones."""
    return of == DROP and one.extrapolated


def frontier(candidates: Sequence[Candidate], *, lower_is_better: bool = False, against: str = DROP) -> list[Candidate]:
    """Those that no other beats in one of score and drop, or a KL, without losing in the other, the least drop first.

    Those of which it is not known are not among them.
    """
    sign = -1 if lower_is_better else 1
    known = [one for one in candidates if one.interval(against) is not None]
    front: list[Candidate] = []
    for one in sorted(known, key=lambda one: (one.at(against), -sign * one.new, one.step)):
        if not front or sign * one.new > sign * front[-1].new:
            front.append(one)
    return front
