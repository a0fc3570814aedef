"""What a comparison says about the limits that a user gave: of a drop of the prior score, and of KL."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlrazor.analysis.forecast import FORWARD
from rlrazor.analysis.paired import times_needed
from rlrazor.errors import RazorError
from rlrazor.guard.comparison import Comparison, MeasuringSetup
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.truth import TaskChange, Truth
from rlrazor.guard.verdict import SEVERITY, Limits, Verdict, known
from rlrazor.lm.means import MeanKL
from rlrazor.lm.scores import Metric

MOST_ITEMS = 1_000_000  # that are worth naming
Ends = tuple[float | None, float | None]
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


def worst(judgements: Sequence[Judgement]) -> Judgement | None:
    """The one that decides: above before what cannot be told, that before within; None where nothing was to judge."""
    return max(judgements, key=lambda one: SEVERITY.index(one.verdict), default=None)


def judgements(found: Comparison, limits: Limits) -> list[Judgement]:
    """A judgement of each limit that was given. Raises RazorError where a drop is to be judged and there is none."""
    asked = []
    if limits.drop is not None:
        asked.append((_of_drop(found, limits.drop), limits.drop))
    if limits.kl is not None:
        asked.append((_of_kl(found.kl[FORWARD], found.setup, limits.kl), limits.kl))
    return [_judged(evidence, limit, limits, same=found.same) for evidence, limit in asked]


def kl_judgements(measured: MeanKL, setup: MeasuringSetup, limits: Limits) -> list[Judgement]:
    """The judgement of the forward KL, measured or estimated, where there is a limit of it."""
    if limits.kl is None:
        return []
    return [_judged(_of_kl(measured, setup, limits.kl), limits.kl, limits, same=False)]


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


@dataclass(frozen=True)
class _Evidence:
    """What is judged, its interval of `level`, with NaN for an end that is not known, and what would narrow it."""

    of: str
    estimate: float
    low: float
    high: float
    level: float
    remedy: str


def _of_drop(found: Comparison, limit: float) -> _Evidence:
    """The measured drop where there is one, else the forecast's."""
    truth, said = found.truth, found.law_says
    if truth is not None and truth.drop is not None:
        low, high = truth.interval or (math.nan, math.nan)
        return _Evidence("measured drop", truth.drop, low, high, truth.level, _more_items(truth, limit))
    if said is None:
        raise _nothing_to_judge({} if truth is None else truth.tasks)
    _require_judge(said.law, limit)
    forecast = said.forecast
    remedy = "Measure the drop with --prior, or calibrate with more runs."
    high = math.inf if forecast.extrapolated else forecast.high
    if forecast.high <= limit < high:
        remedy = f"The interval is of smaller KLs than this. {remedy}"
    return _Evidence("forecast drop", forecast.drop, forecast.low, high, said.law.level, remedy)


def _of_kl(measured: MeanKL, setup: MeasuringSetup, limit: float) -> _Evidence:
    level, count = setup.level, setup.measured
    low, high = measured.interval(count, level)
    half, gap = high - measured.mean, abs(limit - measured.mean)
    more = math.ceil(count * (half / gap) ** 2) if gap > 0 else MOST_ITEMS + 1
    remedy = (
        f"About {more:,} prompts instead of {count:,} would tell, if they are like these."
        if more <= MOST_ITEMS
        else "KL is the limit itself, near enough: no number of prompts will tell."
    )
    return _Evidence("forward KL on the new task's prompts", measured.mean, low, high, level, remedy)


def _judged(evidence: _Evidence, limit: float, limits: Limits, *, same: bool) -> Judgement:
    """`same`: the two are one model, which is within any limit."""
    unit = _nats if "KL" in evidence.of else _points
    estimate, low, high = evidence.estimate, evidence.low, evidence.high
    if same:
        said = f"Within the limit of {unit(limit)}: the two are the same model, and there is nothing to judge."
        return Judgement(evidence.of, estimate, estimate, estimate, evidence.level, limit, Verdict.WITHIN, said)
    evident = Limits().judge(estimate, low, high, limit)
    verdict = limits.judge(estimate, low, high, limit)
    ends = known(low), known(high)
    what = f"the {evidence.of} is {unit(estimate)}{_shown_interval(ends, evidence.level, unit)}"
    if verdict is Verdict.UNCERTAIN:
        said = f"Cannot be told: {what}, which is not evidence on either side of {unit(limit)}. {evidence.remedy} "
        said += _OTHERWISE
    else:
        said = f"{verdict.value.capitalize()} of {unit(limit)}: {what}."
        if evident is Verdict.UNCERTAIN:
            why = "--cautious counts as above" if limits.cautious else "--accept-uncertain leaves to the estimate"
            said += f" The interval cannot tell, which {why}."
    return Judgement(evidence.of, estimate, *ends, evidence.level, limit, verdict, said)


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


def _shown_interval(ends: Ends, level: float, unit: Callable[[float], str]) -> str:
    if ends == (None, None):
        return ", of unknown error"
    below, above = ("?" if end is None else unit(end).split()[0] for end in ends)
    return f" [{below}, {above}] ({level:.0%} interval)"
