"""What a comparison says about the limits that a user gave: of a drop of the prior score, and of KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

from rlrazor.errors import RazorError
from rlrazor.forecast import FORWARD
from rlrazor.guard.compare import Comparison
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.truth import TaskChange, Truth
from rlrazor.guard.verdict import Limits, Verdict, judge
from rlrazor.lm.kl import Estimate
from rlrazor.lm.prior import Metric
from rlrazor.paired import times_needed

SEVERITY = (Verdict.WITHIN, Verdict.UNCERTAIN, Verdict.ABOVE)
MOST_ITEMS = 1_000_000  # that are worth naming
_OTHERWISE = "--accept-uncertain judges by the estimate alone, --cautious counts what cannot be told as above."


@dataclass(frozen=True)
class Judgement:
    """One limit: what was judged (`of`), its interval at `level`, and the verdict in a sentence.

    Drops are fractions of 1 and KL is in nats. `low` and `high` are None where there is no interval.
    """

    of: str
    estimate: float
    low: float | None
    high: float | None
    level: float
    limit: float
    verdict: Verdict
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def worst(judgements: Sequence[Judgement]) -> Judgement | None:
    """The one that decides: above before what cannot be told, that before within; None where nothing was to judge."""
    return max(judgements, key=lambda one: SEVERITY.index(one.verdict), default=None)


def judgements(found: Comparison, limits: Limits, law: LawFile | None = None) -> list[Judgement]:
    """A judgement of each limit that was given. Raises RazorError where a drop is to be judged and there is none."""
    said = []
    if limits.drop is not None:
        said.append(_of_drop(found, limits, limits.drop, law))
    if limits.kl is not None:
        said.append(_of_kl(found, limits, limits.kl))
    return said


def check_judge(law: LawFile | None, metrics: Mapping[str, Metric], limit: float) -> None:
    """Raise RazorError where there will be no drop to judge by this limit: before anything is measured."""
    if any(metric.is_fraction for metric in metrics.values()):
        return
    if law is None:
        raise _nothing_to_judge(metrics)
    _require_judge(law, limit)


def _require_judge(law: LawFile, limit: float) -> None:
    if (objection := law.objection(limit=limit)) is not None:
        raise RazorError(
            "The law is not to be relied on, so --fail-above cannot go by its forecast. "
            f"{objection} Measure the drop with --prior, or judge KL itself with --fail-above-kl."
        )


def _nothing_to_judge(tasks: Mapping[str, Metric] | Mapping[str, TaskChange]) -> RazorError:
    said = ", ".join(f"{name} by {task.metric}" for name, task in tasks.items())
    return RazorError(
        f"--fail-above judges the mean drop of scores that are fractions of 1, and there is none: {said}. Name a task "
        "that is scored by a fraction, such as an accuracy, or give --law."
    )


def _of_drop(found: Comparison, limits: Limits, limit: float, law: LawFile | None) -> Judgement:
    """The measured drop where there is one, else the forecast's."""
    truth, forecast = found.truth, found.forecast
    if truth is not None and truth.drop is not None:
        ends = truth.interval or (math.nan, math.nan)
        return _judged("measured drop", truth.drop, ends, found, truth.level, limit, limits, _more_items(truth, limit))
    if forecast is None or law is None or found.level is None:
        raise _nothing_to_judge({} if truth is None else truth.tasks)
    _require_judge(law, limit)
    remedy = "Measure the drop with --prior, or calibrate with more runs."
    ends = (forecast.low, forecast.high)
    if forecast.extrapolated and forecast.high <= limit:
        ends = (forecast.low, math.nan)
        remedy = f"The interval is of smaller KLs than this. {remedy}"
    return _judged("forecast drop", forecast.drop, ends, found, found.level, limit, limits, remedy)


def _of_kl(found: Comparison, limits: Limits, limit: float) -> Judgement:
    measured, level = found.kl[FORWARD], found.setup.level
    count = found.setup.measured
    low, high = kl_interval(measured, count, level)
    half, gap = high - measured.mean, abs(limit - measured.mean)
    more = math.ceil(count * (half / gap) ** 2) if gap > 0 else MOST_ITEMS + 1
    remedy = (
        f"About {more:,} prompts instead of {count:,} would tell, if they are like these."
        if more <= MOST_ITEMS
        else "KL is the limit itself, near enough: no number of prompts will tell."
    )
    return _judged(
        "forward KL on the new task's prompts", measured.mean, (low, high), found, level, limit, limits, remedy
    )


def kl_interval(measured: Estimate, prompts: int, level: float) -> tuple[float, float]:
    """Student's t over prompts, from 0 on; of one prompt KL could be anything up to twice what was seen and more."""
    error = measured.stderr if math.isfinite(measured.stderr) else measured.mean
    quantile = float(stdtrit(max(prompts - 1, 1), (1 + level) / 2))
    return max(measured.mean - quantile * error, 0.0), measured.mean + quantile * error


def _judged(
    of: str,
    estimate: float,
    ends: tuple[float, float],
    found: Comparison,
    level: float,
    limit: float,
    limits: Limits,
    remedy: str,
) -> Judgement:
    unit = _nats if "KL" in of else _points
    if found.same:
        said = f"Within the limit of {unit(limit)}: the two are the same model, and there is nothing to judge."
        return Judgement(of, estimate, estimate, estimate, level, limit, Verdict.WITHIN, said)
    evident = judge(estimate, *ends, limit)
    verdict = judge(estimate, *ends, limit, cautious=limits.cautious, accept_uncertain=limits.accept_uncertain)
    low, high = (end if math.isfinite(end) else None for end in ends)
    what = f"the {of} is {unit(estimate)}{_shown_interval(low, high, level, unit)}"
    if verdict is Verdict.UNCERTAIN:
        said = f"Cannot be told: {what}, which is not evidence on either side of {unit(limit)}. {remedy} {_OTHERWISE}"
    else:
        said = f"{verdict.value.capitalize()} of {unit(limit)}: {what}."
        if evident is Verdict.UNCERTAIN:
            why = "--cautious counts as above" if limits.cautious else "--accept-uncertain judges by the estimate alone"
            said += f" Whether it is cannot be told, which {why}."
    return Judgement(of, estimate, low, high, level, limit, verdict, said)


def _more_items(truth: Truth, limit: float) -> str:
    """How many items it would take, in a sentence."""
    assert truth.difference is not None
    if truth.interval is None:
        return "Measure tasks of which lm-eval knows the standard error."
    times = times_needed(truth.difference, limit, truth.level)
    most = max(task.n for task in truth.tasks.values() if task.fraction)
    per_task = truth.limit or most
    if times is None or times * per_task > MOST_ITEMS:
        return "The drop is the limit itself, near enough: no number of items will tell."
    wanted = math.ceil(times * per_task)
    if truth.limit is None or most < truth.limit:
        return (
            f"All items were measured ({truth.difference.n:,}); it would take {times:.1f} times as many that differ "
            "alike: name more tasks."
        )
    return f"With --prior-limit {wanted} instead of {truth.limit} it could be told, if more items differ alike."


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _nats(value: float) -> str:
    return f"{value:.4g} nat{'' if value == 1 else 's'}"


def _shown_interval(low: float | None, high: float | None, level: float, unit: Any) -> str:
    if low is None and high is None:
        return ", of unknown error"
    below, above = ("?" if end is None else unit(end).split()[0] for end in (low, high))
    return f" [{below}, {above}] ({level:.0%} interval)"
