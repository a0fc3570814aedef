"""What the next stage of a sequence will cost before it is trained: forward KL, in nats, from the policy before it.

Let the policy give a right answer with probability p, the mean over the prompts, and be right with probability t when
the stage is over. Whatever the method, the completions cannot have changed less than their being right or not has, and
KL is convex in its pair of arguments; so, by data processing and by Jensen,

    E_x KL(before(. | x) || after(. | x))  >=  E_x kl(p_x || t_x)  >=  kl(p || t) = p log p/t + (1-p) log (1-p)/(1-t)

for t > p, and 0 where the policy is that good already. A verifier that gives a share of 1 is a coin with that bias, so
that the same holds of mean scores. It holds of answers that are sampled, and of the prompts that the KL is measured on.

A method costs more than that. The forecast is the bound and the most that a finished stage of the sequence cost beyond
its own; before any is finished it is the bound. Multiplying by the largest ratio of the two is no good: a stage that
began near its target has a bound near 0. On the 268 later stages of the first order of `razor reproduce continual
--preset paper` that had a bound, the product was off by a factor of 5.8 in the median and of 126 in the worst tenth;
the sum by 1.8 and 6.4. Where no target below 1 ends a stage, nothing bounds it, and it is forecast to be as dear as the
dearest so far.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NORMAL = 1.96  # standard errors of a score to each side: 95 %


@dataclass(frozen=True)
class Finished:
    """A stage that was trained: its scores on its own task, before and after, and what it cost in nats."""

    before: float
    after: float
    kl: float

    def excess(self, target: float) -> float:
        """What it cost beyond the least that it had to.

        A stage that did not get to the target had to pay for its own score only; what is beyond the target counts as
        the method's.
        """
        return self.kl - (least_kl(self.before, min(self.after, target)) if target < 1 else 0.0)


@dataclass(frozen=True)
class StageForecast:
    """Of a stage, in nats: `least` by any method; `kl` by this one, and from `low` to `high` for the score's error."""

    least: float
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
    right = before * math.log(before / after) if before > 0 else 0.0
    return right + (1 - before) * math.log((1 - before) / (1 - after))


def forecast(score: float, stderr: float, target: float, finished: Sequence[Finished]) -> StageForecast:
    """What the next stage will cost, of a policy with this score on its task, which is to end at the target."""
    beyond = max([0.0, *(stage.excess(target) for stage in finished)])
    if target >= 1:
        return StageForecast(0.0, beyond, beyond, beyond)
    least, low, high = (least_kl(min(max(score + by * stderr, 0), 1), target) for by in (0, NORMAL, -NORMAL))
    return StageForecast(least, *(bound + beyond if bound else 0.0 for bound in (least, low, high)))


def finished_of(rows: Sequence[Mapping[str, Any]]) -> list[Finished]:
    """The stages of a sequence, of whose rows the first is the base's, and each other a stage's last checkpoint.

    They have the columns `task`, `new`, `kl_forward_since_before`, and a `score_TASK` of each task.
    """
    return [
        Finished(before[f"score_{row['task']}"], row["new"], row["kl_forward_since_before"])
        for before, row in pairwise(rows)
    ]
