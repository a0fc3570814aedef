"""What the next stage of a sequence will cost before it is trained: forward KL, in nats, from the policy before it.

Let the policy give a right answer with probability p, the mean over the prompts, and be right with probability t when
the stage is over. Whatever the method, the completions cannot have changed less than their being right or not has, and
KL is convex in its pair of arguments; so, by data processing and by Jensen,

    E_x KL(before(. | x) || after(. | x))  >=  E_x kl(p_x || t_x)  >=  kl(p || t) = p log p/t + (1-p) log (1-p)/(1-t)

for t > p, and 0 where the policy is that good already. A verifier that gives a share of 1 is a coin with that bias, so
that the same holds of mean scores. It holds of answers that are sampled, and of the prompts that the KL is measured on.

A method costs more than that. The forecast is the bound times the largest ratio of what a finished stage cost to what
it had to; before any is finished it is the bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL = 1.96  # standard errors of a score to each side: 95 %


@dataclass(frozen=True)
class Finished:
    """A stage that was trained: its scores on its own task, before and after, and what it cost in nats."""

    before: float
    after: float
    kl: float

    def ratio(self, target: float) -> float | None:
        """What it cost, as a multiple of the least that it had to; None where it had to cost nothing.

        A stage that did not get to the target had to pay for its own score only; what is beyond the target counts as
        the method's.
        """
        least = least_kl(self.before, min(self.after, target))
        return self.kl / least if least > 0 else None


@dataclass(frozen=True)
class Forecast:
    """Of a stage, in nats: `least` by any method; `kl` by this one, and from `low` to `high` for the score's error."""

    least: float
    ratio: float
    kl: float
    low: float
    high: float


def least_kl(before: float, after: float) -> float:
    """The least forward KL at which a mean score rises from `before` to `after`; 0 where it need not rise.

    Infinite where nothing may be wrong any more.
    """
    if before >= after:
        return 0.0
    if after >= 1:
        return math.inf
    right = before * math.log(before / after) if before else 0.0
    return right + (1 - before) * math.log((1 - before) / (1 - after))


def forecast(score: float, stderr: float, target: float, finished: Sequence[Finished]) -> Forecast:
    """What the next stage will cost, of a policy with this score on its task, which is to end at the target."""
    ratios = (stage.ratio(target) for stage in finished)
    ratio = max((ratio for ratio in ratios if ratio is not None), default=1.0)
    least, low, high = (
        least_kl(min(max(score + errors * stderr, 0.0), 1.0), target) for errors in (0, NORMAL, -NORMAL)
    )
    return Forecast(least, ratio, ratio * least, ratio * low, ratio * high)
