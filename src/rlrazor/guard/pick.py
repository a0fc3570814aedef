"""Which checkpoint of a run to take: the Pareto frontiers of new-task score and forgetting, and one of them.

For the folder of any Trainer: checkpoint-N folders, with the new-task metric in their trainer_state.json and what a
`ForgettingMonitor` or `razor watch` left in razor.jsonl, or else measured here: KL to the base and, with a law, the
drop that it forecasts. For the folders of other trainers, as far as `razor watch` has measured them. And for the run
folders of rlrazor, whose table has measured scores of both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import NAMES, LawFile
from rlrazor.guard.metric import FIRST_USUAL, NewScore
from rlrazor.guard.pick_sources import MeasureCheckpoint, check_weighable, is_or_are, of_records, of_trainer
from rlrazor.guard.pick_watched import of_watched
from rlrazor.guard.run_folder import run_in
from rlrazor.guard.scored import AXES, ScoredCheckpoint, frontier
from rlrazor.guard.verdict import DROP, NO_LIMITS, Limits, Verdict

LISTED = 8  # checkpoints in a sentence


@dataclass(frozen=True)
class Advice:
    """The recommended checkpoint, and why. None where none is within the limits, or nothing says which to take.

    `verdict`: on the limits, None where there are none; `doubt`: why it cannot be told.
    """

    recommended: ScoredCheckpoint | None
    why: str
    verdict: Verdict | None = None
    doubt: str | None = None


@dataclass(frozen=True)
class Pick:
    """The candidates in order of training, the frontiers, and what is advised. `notes`: cautions.

    `frontiers`: of the score against the drop, where that may be relied on, and against each KL. `level`: of the drops'
    intervals; None where that is not known.
    """

    candidates: Sequence[ScoredCheckpoint]
    metric: str
    lower_is_better: bool
    frontiers: Mapping[str, Sequence[ScoredCheckpoint]]
    limits: Limits
    notes: Sequence[str]
    level: float | None = None
    advice: Advice = field(default_factory=lambda: Advice(None, ""))

    @property
    def frontier(self) -> Sequence[ScoredCheckpoint]:
        """The one that the advice is about."""
        return next((self.frontiers[of] for of in (*self.limits.most, *AXES) if of in self.frontiers), [])

    @property
    def usable(self) -> Limits:
        """The limits, but for that of a drop that may not be relied on."""
        return self.limits if DROP in self.frontiers else replace(self.limits, drop=None)

    def verdict_of(self, one: ScoredCheckpoint) -> Verdict:
        """On one of the candidates."""
        said = one.verdict(self.usable)
        return Verdict.UNCERTAIN if said is Verdict.WITHIN and self.usable != self.limits else said


def pick(
    folder: Path,
    limits: Limits = NO_LIMITS,
    score: NewScore = FIRST_USUAL,
    *,
    law: LawFile | None = None,
    measure: MeasureCheckpoint | None = None,
    run: str | None = None,
    log: Path | None = None,
) -> Pick:
    """The frontiers of a folder's checkpoints, and the recommended one.

    With `limits`, the best new-task score within them by the estimates or, if they are `cautious`, by the upper ends of
    their intervals. The verdict says whether the recommended one is within them by its whole interval, unless they
    `accept_uncertain`. Without limits, the highest score minus drop, which takes a score that is a fraction of 1;
    without a law that may judge, none.

    `law` forecasts from the KLs in `log`, by default razor.jsonl; `measure(checkpoint, step)` replaces that log. `run`:
    the id of the training run, of those in the folder, by default the one that wrote last.

    Checkpoints that cannot be read, have no weights or cannot be measured are left out, with a note. Raises RazorError
    where none is left, there is no such metric, neither a drop nor a KL, or none of what a limit is about.
    """
    if (folder / "records.parquet").exists():
        if score != FIRST_USUAL or (law, measure, run, log) != (None,) * 4:
            raise RazorError(f"{folder} is of a sweep, whose own measured scores are used: give budgets at most.")
        found = of_records(folder)
    elif folder.is_dir():
        if measure is not None and log is not None:
            raise RazorError("Either a log says what was measured, or the checkpoints are measured here: not both.")
        watched = None if measure else of_watched(folder, log, score, limits, law)
        found = watched or of_trainer(run_in(folder, run, log), score, limits, law, measure)
    else:
        raise RazorError(f"There is no folder {folder}.")
    lower = score.is_lower_better(found.metric)
    axes = [of for of in AXES if any(one.interval(of) for one in found.candidates)]
    if missing := [of for of in limits.most if of not in axes and of != DROP]:
        raise RazorError(f"{NAMES[missing[0]]} was not measured, so no budget of it can be judged: leave it out.")
    fronts = {
        of: frontier(found.candidates, lower_is_better=lower, against=of)
        for of in axes
        if of != DROP or found.objection is None
    }
    return _advised(
        Pick(found.candidates, found.metric, lower, fronts, limits, found.notes, found.level), found.objection
    )


# Recommending


def _advised(found: Pick, objection: str | None) -> Pick:
    """With one of all the candidates: who judges by the upper ends of intervals may find the best off the frontier."""
    if found.usable.most:
        advice = _within(found, found.usable)
    elif objection is None:
        advice = _weighed(found)
    else:
        advice = Advice(None, f"No checkpoint is recommended. {_fronts_in_words(found)}{_what_would(found)}")
    if objection is None:
        return replace(found, advice=advice)
    if found.limits.drop is None or advice.verdict is Verdict.ABOVE:
        return replace(found, advice=advice, notes=[*found.notes, objection])
    most = 100 * found.limits.drop
    doubts = [
        advice.doubt,
        f"Whether a checkpoint is within the budget of {most:.1f} points cannot be told. {objection}",
    ]
    doubt = " ".join(one for one in doubts if one)
    return replace(found, advice=replace(advice, verdict=Verdict.UNCERTAIN, doubt=doubt))


def _within(found: Pick, limits: Limits) -> Advice:
    """The best score of those within the limits, and whether that can be told."""
    sign = -1 if found.lower_is_better else 1
    admitted = [one for one in found.candidates if one.is_admitted(limits)]
    if not admitted:
        return Advice(None, _none_within(found, limits), Verdict.ABOVE)
    of = next(iter(limits.most))
    chosen = max(admitted, key=lambda one: (sign * one.new, -one.judged(of, limits), -one.step))
    asked = " and ".join(_asked(of, most, chosen) for of, most in limits.most.items())
    ends = ", at the upper end of the interval" if limits.cautious else ""
    best = "lowest" if found.lower_is_better else "highest"
    why = f"of the checkpoints with {asked}{ends}, it has the {best} {found.metric} ({chosen.new:.4g})"
    verdict = chosen.verdict(limits)
    doubt = _doubt(found, limits, chosen) if verdict is Verdict.UNCERTAIN else None
    return Advice(chosen, why + _aside(chosen, found.frontier), verdict, doubt)


def _asked(of: str, most: float, one: ScoredCheckpoint) -> str:
    if of == DROP:
        return f"a {kind_of(one)} drop of at most {100 * most:.1f} points"
    return f"{NAMES[of]} of at most {most:.4g} nats"


def kind_of(one: ScoredCheckpoint) -> str:
    """Of its drop; a folder's are all of one kind."""
    return "measured" if one.drop is not None and one.drop.measured else "forecast"


_NO_ERROR = "the standard errors are not known"


def _none_within(found: Pick, limits: Limits) -> str:
    """What there is at least of each, and which would be within by the estimates."""
    parts = []
    for of, most in limits.most.items():
        least = min(found.candidates, key=lambda one, of=of: one.judged(of, limits))  # type: ignore[misc]
        value = least.judged(of, limits)
        how = "by the upper end of its interval" if limits.cautious else kind_of(least)
        if math.isinf(value):
            why = "KL is beyond what the law was fitted to" if least.is_beyond(of) else _NO_ERROR
        elif of == DROP:
            why = f"the least that any drops, {how}, is {100 * value:.1f} ({least.name})"
        else:
            why = f"the least that any has{f', {how},' * limits.cautious} is {value:.4g} ({least.name})"
        limit = f"the budget of {100 * most:.1f} points" if of == DROP else f"{most:.4g} nats of {NAMES[of]}"
        parts.append(f"{limit}: {why}")
    said = f"No checkpoint is within {'; and within '.join(parts)}."
    if limits.cautious and (
        names := [one.name for one in found.candidates if one.is_admitted(replace(limits, cautious=False))]
    ):
        said += f" By the estimate alone there {is_or_are(names)} {_listed(names)}."
    return said if _NO_ERROR in said else f"{said} Save checkpoints earlier, or train with a lower learning rate."


def _doubt(found: Pick, limits: Limits, chosen: ScoredCheckpoint) -> str:
    """Why it cannot be told, and what can be done."""
    parts = []
    for of, most in limits.most.items():
        estimate = chosen.interval(of)
        assert estimate is not None
        if math.isinf(estimate[2]):
            parts.append(f"the standard error of its {'drop' if of == DROP else NAMES[of]} is not known")
        elif estimate[2] > most:
            scale, unit = (100, "points") if of == DROP else (1, f"nats of {NAMES[of]}")
            low, high, limit = (f"{scale * value:.{1 if of == DROP else 3}f}" for value in (*estimate[1:], most))
            parts.append(f"its interval of {low} to {high} {unit} holds the budget of {limit}")
        elif chosen.is_beyond(of):
            parts.append("its KL is beyond what the law was fitted to, and its interval is of smaller ones")
    surely = [one.name for one in found.candidates if one.is_admitted(replace(limits, cautious=True))]
    if surely:
        to_do = (
            f"By their whole intervals there {is_or_are(surely)} {_listed(surely)}, the best of which --cautious takes"
        )
    else:
        to_do = "No checkpoint is within it by its whole interval"
    return (
        f"Whether {chosen.name} is within the budget cannot be told: {' and '.join(parts)}. {to_do}; "
        "--accept-uncertain goes by the estimates alone."
    )


def _weighed(found: Pick) -> Advice:
    """The highest score minus drop."""
    check_weighable(found.metric, [one.new for one in found.candidates], lower=found.lower_is_better)
    limits = found.limits
    chosen = max(found.candidates, key=lambda one: (one.new - one.at(DROP, upper=limits.cautious), -one.step))
    if math.isinf(chosen.at(DROP, upper=limits.cautious)):
        return Advice(None, "No checkpoint is recommended: the upper ends of the drops' intervals are not known.")
    drop = chosen.at(DROP, upper=limits.cautious)
    of = f"{kind_of(chosen)} drop{' at the upper end of its interval' if limits.cautious else ''}"
    why = (
        f"{found.metric} minus {of} is highest: {100 * chosen.new:.1f} {'-+'[drop < 0]} {100 * abs(drop):.1f} points, "
        f"a point gained being worth a point lost{_aside(chosen, found.frontier)}"
    )
    return Advice(chosen, why)


def _fronts_in_words(found: Pick) -> str:
    """Which checkpoints are on the frontiers."""
    if not found.frontiers:
        return ""
    parts = [f"against {NAMES[of]} {_listed([one.name for one in front])}" for of, front in found.frontiers.items()]
    return f"On the frontier of {found.metric} {', '.join(parts)}. "


def _what_would(found: Pick) -> str:
    options = {FORWARD: "--kl-budget NATS", PROBE: "--kl-budget-probe NATS"}
    given = [f"{options[of]} ({NAMES[of]})" for of in found.frontiers if of in options]
    return f"{' or '.join(given)} takes the best {found.metric} within that." if given else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _aside(chosen: ScoredCheckpoint, front: Sequence[ScoredCheckpoint]) -> str:
    return "" if chosen in front else "; it is off the frontier, which is drawn by the estimates themselves"
