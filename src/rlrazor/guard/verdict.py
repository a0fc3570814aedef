"""On which side of a limit an estimate is: within, above, or not to be told from the evidence there is."""

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
    alone judge. Raises RazorError for what is no limit.
    """

    drop: float | None = None
    kl: float | None = None
    kl_probe: float | None = None
    cautious: bool = False
    accept_uncertain: bool = False

    def __post_init__(self) -> None:
        for name, given in (("budget", self.drop), ("kl_budget", self.kl), ("kl_budget_probe", self.kl_probe)):
            bounds.check_number(name, given)
        if self.cautious and self.accept_uncertain:
            raise RazorError("Be cautious or accept what is uncertain, not both.")

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


NO_LIMITS = Limits()


def known(value: float) -> float | None:
    """The number; None for NaN and infinity, which say that an end or an error is not known."""
    return value if math.isfinite(value) else None
