"""Checkpoints to choose from: their new-task scores, what is known of their forgetting, and their frontiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlrazor.analysis.forecast import FORWARD, PROBE, Forecast
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.verdict import DROP, SEVERITY, Limits, Verdict
from rlrazor.lm.means import MeanKL
from rlrazor.lm.probes import Prompt

LEVEL = 0.95  # of the intervals of KLs, and of drops that were measured
AXES = (DROP, FORWARD, PROBE)  # what a new-task score is weighed against, by the names of limits


@dataclass(frozen=True)
class DropEstimate(Forecast):
    """A drop that was forecast, or else `measured`: then its ends are infinite where its error is not known."""

    extrapolated: bool = False
    measured: bool = False


NO_DROP = {"drop": None, "low": None, "high": None, "extrapolated": False, "measured": False}


@dataclass(frozen=True)
class Forgetting:
    """What is known of it at a step: a drop with its interval of that `level`, None without a law, and KLs.

    `kl`: nats per completion, or text, on each probe that was measured, of which `prompts` counts the prompts, where it
    is known. `objection`: why its law may not judge.
    """

    step: int
    drop: DropEstimate | None
    kl: Mapping[str, MeanKL] = field(default_factory=dict)
    prompts: Mapping[str, int] = field(default_factory=dict)
    level: float | None = None
    objection: str | None = None

    @classmethod
    def by(
        cls,
        law: LawFile | None,
        step: int,
        kl: Mapping[str, MeanKL],
        prompts: Sequence[Prompt] | str,
        measured: Mapping[str, int],
    ) -> Forgetting:
        """What a law, if there is one, says of KLs measured on these `prompts`, or on those of that hash.

        `measured` counts the prompts of each probe that were. Raises RazorError where the law needs what it lacks.
        """
        if law is None:
            return cls(step, None, kl, measured)
        if FORWARD not in measured:
            raise RazorError("it is not known on how many prompts KL was measured: measure the checkpoints anew.")
        drop = DropEstimate(**asdict(law.forecast(kl, prompts=prompts, measured=measured[FORWARD])))
        return cls(step, drop, kl, measured, law.level, law.objection())


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A checkpoint to choose, or not. `new` is the metric's value; `drop`, `kl` and `prompts` as in `Forgetting`."""

    name: str
    step: int
    new: float
    drop: DropEstimate | None
    kl: Mapping[str, MeanKL] = field(default_factory=dict)
    prompts: Mapping[str, int] = field(default_factory=dict)

    def interval(self, of: str) -> tuple[float, float, float] | None:
        """The drop, or a KL, with the ends of its interval; None where it is not known.

        A KL's is of 95 %, by its prompts. Where their number is not known its ends are two standard errors away, and
        without one (NaN), of a single prompt, it could be up to three times as large; infinite: nobody knows.
        """
        if of == DROP:
            return None if self.drop is None else (self.drop.drop, self.drop.low, self.drop.high)
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

    def is_beyond(self, of: str) -> bool:
        """Whether that is a forecast at a KL beyond what its law was fitted to: the interval is of smaller ones."""
        return of == DROP and self.drop is not None and self.drop.extrapolated

    def judged(self, of: str, limits: Limits) -> float:
        """What counts of it; infinite where that is not known, as an interval's end beyond the law's fit."""
        if limits.cautious and self.is_beyond(of):
            return math.inf
        return self.at(of, upper=limits.cautious)

    def is_admitted(self, limits: Limits) -> bool:
        """Whether all that counts is within the limits: estimates, with `cautious` the upper ends of intervals."""
        return all(self.judged(of, limits) <= most for of, most in limits.most.items())

    def verdict(self, limits: Limits) -> Verdict:
        """The worst of the verdicts on each limit; what is not known cannot be told."""
        said = [Verdict.WITHIN]
        for of, most in limits.most.items():
            if (found := self.interval(of)) is None:
                said.append(Verdict.UNCERTAIN)
                continue
            estimate, low, high = found
            said.append(limits.judge(estimate, low, math.inf if self.is_beyond(of) else high, most))
        return max(said, key=SEVERITY.index)

    def as_json(self) -> dict[str, Any]:
        """All of it; what does not exist is None, and a standard error that is not known not finite."""
        return {
            "name": self.name,
            "step": self.step,
            "new": self.new,
            **(NO_DROP if self.drop is None else asdict(self.drop)),
            "kl": {of: kl._asdict() for of, kl in self.kl.items()},
            "prompts": dict(self.prompts),
        }


def frontier(
    checkpoints: Sequence[ScoredCheckpoint], *, lower_is_better: bool = False, against: str = DROP
) -> list[ScoredCheckpoint]:
    """Those that no other beats in one of score and drop, or a KL, without losing in the other, the least drop first.

    Those of which it is not known are not among them.
    """
    sign = -1 if lower_is_better else 1
    known = [one for one in checkpoints if one.interval(against) is not None]
    front: list[ScoredCheckpoint] = []
    for one in sorted(known, key=lambda one: (one.at(against), -sign * one.new, one.step)):
        if not front or sign * one.new > sign * front[-1].new:
            front.append(one)
    return front
