"""On which side of a limit an estimate is: within, above, or not to be told from the evidence there is."""

import math
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What an interval says about a limit."""

    WITHIN = "within the limit"
    ABOVE = "above the limit"
    UNCERTAIN = "cannot be told"


SEVERITY = (Verdict.WITHIN, Verdict.UNCERTAIN, Verdict.ABOVE)


@dataclass(frozen=True)
class Limits:
    """The largest drop of the prior score, a fraction of 1, and KL on the new task's prompts, nats per completion.

    `cautious`: what cannot be told counts as above. `accept_uncertain`: the estimates alone judge.
    """

    drop: float | None = None
    kl: float | None = None
    cautious: bool = False
    accept_uncertain: bool = False


def upper_end(high: float, *, beyond: bool) -> float:
    """Of a forecast's interval, as it may be judged: infinite `beyond` the KLs that its law was fitted to."""
    return math.inf if beyond else high


def judge(
    estimate: float,
    low: float,
    high: float,
    limit: float,
    *,
    cautious: bool = False,
    accept_uncertain: bool = False,
) -> Verdict:
    """Within where the whole interval is, above where none of it is, else not to be told.

    `estimate`, `low`, `high` and `limit` are in one unit, of which less is better. `cautious`: what cannot be told
    counts as above. `accept_uncertain`: the estimate alone judges. Not a number is never within.
    """
    if high <= limit:
        return Verdict.WITHIN
    if low > limit or cautious:
        return Verdict.ABOVE
    if accept_uncertain:
        return Verdict.WITHIN if estimate <= limit else Verdict.ABOVE
    return Verdict.UNCERTAIN
