"""On which side of a limit an estimate is: within, above, or not to be told from the evidence there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rlrazor import bounds
from rlrazor.errors import RazorError

DROP = "drop"


class Verdict(StrEnum):
    """What an interval says about a limit."""

    WITHIN = "within the limit"
    ABOVE = "above the limit"
    UNCERTAIN = "cannot be told"


SEVERITY = (Verdict.WITHIN, Verdict.UNCERTAIN, Verdict.ABOVE)


@dataclass(frozen=True)
class Limits:
    """The largest drop of the prior score, a fraction of 1, and KL on the new task's prompts and the generic probe.

    Nats per completion, or text. `cautious`: what cannot be told counts as above. `accept_uncertain`: the estimates
    alone judge.
    """

    drop: float | None = None
    kl: float | None = None
    kl_probe: float | None = None
    cautious: bool = False
    accept_uncertain: bool = False

    @property
    def most(self) -> dict[str, float]:
        """Those that there are, by what they are of."""
        found = {DROP: self.drop, "kl_forward": self.kl, "kl_probe": self.kl_probe}
        return {of: value for of, value in found.items() if value is not None}

    def judge(self, estimate: float, low: float, high: float, limit: float) -> Verdict:
        """Within where the whole interval is, above where none of it is, else not to be told; see the class.

        All in one unit, of which less is better. Not a number is never within.
        """
        if high <= limit:
            return Verdict.WITHIN
        if low > limit or self.cautious:
            return Verdict.ABOVE
        if self.accept_uncertain:
            return Verdict.WITHIN if estimate <= limit else Verdict.ABOVE
        return Verdict.UNCERTAIN

    @classmethod
    def of_budgets(
        cls, budget: float | None, kl_budget: float | None, kl_budget_probe: float | None, **how: bool
    ) -> Limits:
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
        return cls(budget, kl_budget, kl_budget_probe, **how)


def upper_end(high: float, *, beyond: bool) -> float:
    """Of a forecast's interval, as it may be judged: infinite `beyond` the KLs that its law was fitted to."""
    return math.inf if beyond else high
