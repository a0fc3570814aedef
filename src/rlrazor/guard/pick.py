"""Which checkpoint of a run to take: the Pareto frontiers of new-task score and forgetting, and one of them.

For the folder of any Trainer: checkpoint-N folders, with the new-task metric in their trainer_state.json and what a
`ForgettingMonitor` left in razor.jsonl, or else measured here: KL to the base and, with a law, the drop that it
forecasts. And for the run folders of rlrazor, whose table has measured scores of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor.analysis import law as laws
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.candidates import AXES, DROP, Budgets, Candidate, frontier
from rlrazor.guard.law_file import NAMES, LawFile
from rlrazor.guard.metric import find_metric, is_lower_better, latest
from rlrazor.guard.outputs import MARK
from rlrazor.guard.run_folder import Checkpoint, Run, rows_of, run_in
from rlrazor.guard.verdict import Verdict
from rlrazor.lm.kl import Estimate
from rlrazor.lm.probes import Prompt, probe_hash
from rlrazor.runs.records import BASE
from rlrazor.runs.store import read_table

NO_LAW = (
    "Without a law of the base nothing is known of the prior scores, only how far each checkpoint has moved: `razor "
    "calibrate` makes the law, with which --law forecasts the drop in points and --budget judges it."
)
NOT_USEFUL = "The law was no better than guessing, or fitted to noise: do not rely on it."
LISTED = 8  # checkpoints in a sentence
_Z = 1.96  # standard errors to the ends of a 95 % interval


@dataclass(frozen=True)
class Pick:
    """The candidates in order of training, those on the frontier, the recommended one, and why. `notes`: cautions.

    `frontiers`: of the score against the drop, where that may be relied on, and against each KL; `frontier` is the one
    that the recommendation is about. `recommended` is None where none is within the limits, or nothing says which to
    take. `verdict`: on the limits, None where there are none; `doubt`: why it cannot be told. `level`: of the drops'
    intervals; None where that is not known.
    """

    candidates: Sequence[Candidate]
    frontier: Sequence[Candidate]
    recommended: Candidate | None
    why: str
    metric: str
    lower_is_better: bool
    notes: Sequence[str]
    level: float | None = None
    frontiers: Mapping[str, Sequence[Candidate]] = field(default_factory=dict)
    limits: Budgets = field(default_factory=Budgets)
    verdict: Verdict | None = None
    doubt: str | None = None

    @property
    def usable(self) -> Budgets:
        """The limits, but for that of a drop that may not be relied on."""
        return self.limits if DROP in self.frontiers else replace(self.limits, drop=None)

    def verdict_of(self, one: Candidate) -> Verdict:
        """On one of the candidates."""
        said = self.usable.verdict(one)
        return Verdict.UNCERTAIN if said is Verdict.WITHIN and self.usable != self.limits else said


@dataclass(frozen=True)
class Failure:
    """Where measuring ended, and why in one line."""

    step: int
    error: str


@dataclass(frozen=True)
class Drop:
    """What was measured at a step: a forecast drop of the prior score with its interval of that level, and KLs.

    `objection`: why its law may not judge. Without a law the drop and its interval are None. `prompts`: of each KL, as
    far as they are known.
    """

    step: int
    drop: float | None
    low: float | None
    high: float | None
    level: float | None = None
    extrapolated: bool = False
    objection: str | None = None
    kl: Mapping[str, Estimate] = field(default_factory=dict)
    prompts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def by(
        cls,
        law: LawFile | None,
        step: int,
        kl: Mapping[str, Estimate],
        prompts: Sequence[Prompt] | str,
        measured: Mapping[str, int],
    ) -> Drop:
        """What a law, if there is one, says of KLs measured on these `prompts`, or of those of that hash.

        `measured` counts the prompts of each probe that were.
        """
        if law is None:
            return cls(step, None, None, None, kl=kl, prompts=measured)
        said = law.forecast(kl, prompts=prompts, measured=measured[FORWARD])
        ends = said.drop, said.low, said.high
        return cls(step, *ends, law.attainable(), said.extrapolated, law.objection(), kl, measured)


@dataclass(frozen=True)
class _Source:
    """What a folder holds. `objection`: why its drops may not judge, None where they may."""

    metric: str
    candidates: list[Candidate]
    notes: list[str]
    level: float | None
    objection: str | None


def pick(
    folder: Path,
    *,
    metric: str | None = None,
    lower_is_better: bool | None = None,
    budget: float | None = None,
    kl_budget: float | None = None,
    kl_budget_probe: float | None = None,
    cautious: bool = False,
    accept_uncertain: bool = False,
    law: LawFile | None = None,
    measure: Callable[[Path, int], Drop] | None = None,
    run: str | None = None,
    log: Path | None = None,
) -> Pick:
    """The frontiers of a folder's checkpoints, and the recommended one.

    With limits, the best new-task score within them by the estimates or, with `cautious`, by the upper ends of their
    intervals: `budget`, the largest drop to accept, a fraction of 1; `kl_budget` and `kl_budget_probe`, the largest KL
    on the new task's prompts and on the generic probe, nats. The verdict says whether the recommended one is within
    them by its whole interval, unless `accept_uncertain`. Without limits, the highest score minus drop, which takes a
    score that is a fraction of 1; without a law that may judge, none.

    `metric`: of the trainer's log, for which `lower_is_better` goes by its name (loss, perplexity, error rates) unless
    it is given; `law` forecasts from the KLs in `log`, by default razor.jsonl; `measure(checkpoint, step)` replaces
    that log. `run`: the id of the training run, of those in the folder, by default the one that wrote last.

    Checkpoints that cannot be read, have no weights or cannot be measured are left out, with a note. Raises RazorError
    where none is left, there is no such metric, neither a drop nor a KL, or none of what a limit is about.
    """
    limits = Budgets.of(budget, kl_budget, kl_budget_probe, cautious=cautious, accept_uncertain=accept_uncertain)
    if (folder / "records.parquet").exists():
        if (metric, lower_is_better, law, measure, run, log) != (None,) * 6:
            raise RazorError(f"{folder} is of a sweep, whose own measured scores are used: give budgets at most.")
        found = _of_records(folder)
    elif folder.is_dir():
        if measure is not None and log is not None:
            raise RazorError("Either a log says what was measured, or the checkpoints are measured here: not both.")
        found = _of_trainer(run_in(folder, run, log), metric, lower_is_better, limits, law, measure)
    else:
        raise RazorError(f"There is no folder {folder}.")
    lower = is_lower_better(found.metric) if lower_is_better is None else lower_is_better
    axes = [of for of in AXES if any(one.interval(of) for one in found.candidates)]
    if missing := [of for of in limits.most if of not in axes and of != DROP]:
        raise RazorError(f"{NAMES[missing[0]]} was not measured, so no budget of it can be judged: leave it out.")
    fronts = {
        of: frontier(found.candidates, lower_is_better=lower, against=of)
        for of in axes
        if of != DROP or found.objection is None
    }
    front = next((fronts[of] for of in (*limits.most, *AXES) if of in fronts), [])
    shown = Pick(found.candidates, front, None, "", found.metric, lower, found.notes, found.level, fronts, limits)
    return _recommended(shown, found.objection)


# Recommending


def _recommended(found: Pick, objection: str | None) -> Pick:
    """With one of all the candidates: who judges by the upper ends of intervals may find the best off the frontier."""
    if found.usable.most:
        found = _within(found, found.usable)
    elif objection is None:
        found = _weighed(found)
    else:
        found = replace(found, why=f"No checkpoint is recommended. {_fronts_in_words(found)}{_what_would(found)}")
    if objection is None:
        return found
    if DROP not in found.limits.most or found.verdict is Verdict.ABOVE:
        return replace(found, notes=[*found.notes, objection])
    most = 100 * found.limits.most[DROP]
    doubts = [
        found.doubt,
        f"Whether a checkpoint is within the budget of {most:.1f} points cannot be told. {objection}",
    ]
    return replace(found, verdict=Verdict.UNCERTAIN, doubt=" ".join(filter(None, doubts)))


def _within(found: Pick, limits: Budgets) -> Pick:
    """The best score of those within the limits, and whether that can be told."""
    sign = -1 if found.lower_is_better else 1
    admitted = [one for one in found.candidates if limits.admits(one)]
    if not admitted:
        return replace(found, verdict=Verdict.ABOVE, why=_none_within(found, limits))
    of = next(iter(limits.most))
    chosen = max(admitted, key=lambda one: (sign * one.new, -limits.judged(one, of), -one.step))
    asked = " and ".join(_asked(of, most, chosen) for of, most in limits.most.items())
    ends = ", at the upper end of the interval" if limits.cautious else ""
    best = "lowest" if found.lower_is_better else "highest"
    why = f"of the checkpoints with {asked}{ends}, it has the {best} {found.metric} ({chosen.new:.4g})"
    verdict = limits.verdict(chosen)
    doubt = _doubt(found, limits, chosen) if verdict is Verdict.UNCERTAIN else None
    return replace(found, recommended=chosen, why=why + _aside(chosen, found.frontier), verdict=verdict, doubt=doubt)


def _asked(of: str, most: float, one: Candidate) -> str:
    if of == DROP:
        return f"a {_kind(one)} drop of at most {100 * most:.1f} points"
    return f"{NAMES[of]} of at most {most:.4g} nats"


def _kind(one: Candidate) -> str:
    return "measured" if one.measured else "forecast"


_NO_ERROR = "the standard errors are not known"


def _none_within(found: Pick, limits: Budgets) -> str:
    """What there is at least of each, and which would be within by the estimates."""
    parts = []
    for of, most in limits.most.items():
        least = min(found.candidates, key=lambda one, of=of: limits.judged(one, of))  # type: ignore[misc]
        value = limits.judged(least, of)
        how = "by the upper end of its interval" if limits.cautious else _kind(least)
        if math.isinf(value):
            limit = f"the budget of {100 * most:.1f} points" if of == DROP else f"{most:.4g} nats of {NAMES[of]}"
            beyond = least.extrapolated and of == DROP
            parts.append(f"{limit}: {'KL is beyond what the law was fitted to' if beyond else _NO_ERROR}")
        elif of == DROP:
            parts.append(
                f"the budget of {100 * most:.1f} points: the least that any drops, {how}, is {100 * value:.1f} "
                f"({least.name})"
            )
        else:
            at = f", {how}," if limits.cautious else ""
            parts.append(f"{most:.4g} nats of {NAMES[of]}: the least that any has{at} is {value:.4g} ({least.name})")
    said = f"No checkpoint is within {'; and within '.join(parts)}."
    if limits.cautious and (
        names := [one.name for one in found.candidates if replace(limits, cautious=False).admits(one)]
    ):
        said += f" By the estimate alone there {_is(names)} {_listed(names)}."
    return said if _NO_ERROR in said else f"{said} Save checkpoints earlier, or train with a lower learning rate."


def _doubt(found: Pick, limits: Budgets, chosen: Candidate) -> str:
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
        elif of == DROP and chosen.extrapolated:
            parts.append("its KL is beyond what the law was fitted to, and its interval is of smaller ones")
    surely = [one.name for one in found.candidates if replace(limits, cautious=True).admits(one)]
    if surely:
        to_do = f"By their whole intervals there {_is(surely)} {_listed(surely)}, the best of which --cautious takes"
    else:
        to_do = "No checkpoint is within it by its whole interval"
    return (
        f"Whether {chosen.name} is within the budget cannot be told: {' and '.join(parts)}. {to_do}; "
        "--accept-uncertain goes by the estimates alone."
    )


def _weighed(found: Pick) -> Pick:
    """The highest score minus drop."""
    _check_weighable(found.metric, [one.new for one in found.candidates], lower=found.lower_is_better)
    limits = found.limits
    chosen = max(found.candidates, key=lambda one: (one.new - one.at(DROP, upper=limits.cautious), -one.step))
    if math.isinf(chosen.at(DROP, upper=limits.cautious)):
        return replace(found, why="No checkpoint is recommended: the upper ends of the drops' intervals are not known.")
    drop = chosen.at(DROP, upper=limits.cautious)
    of = f"{_kind(chosen)} drop{' at the upper end of its interval' if limits.cautious else ''}"
    why = (
        f"{found.metric} minus {of} is highest: {100 * chosen.new:.1f} {'-+'[drop < 0]} {100 * abs(drop):.1f} points, "
        f"a point gained being worth a point lost{_aside(chosen, found.frontier)}"
    )
    return replace(found, recommended=chosen, why=why)


def _check_weighable(metric: str, values: Sequence[float], *, lower: bool) -> None:
    if lower or not all(0 <= value <= 1 for value in values):
        raise RazorError(f"{metric} is not a fraction of 1, so it cannot be weighed against a drop: give a budget.")


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


def _aside(chosen: Candidate, front: Sequence[Candidate]) -> str:
    return "" if chosen in front else "; it is off the frontier, which is drawn by the estimates themselves"


# Our own run folders


def _of_records(folder: Path) -> _Source:
    """Every checkpoint of every run, with measured scores."""
    columns = ("run_id", "method", "lr", "seed", "step", "new", "forgetting")
    table = read_table(folder / "records.parquet", ("trajectory", *columns))
    points = laws.distinct(table).filter(pl.col("method") != BASE)
    optional = [name for name in (*_MEASURED, *(f"{name}_stderr" for name in _MEASURED)) if name in points.columns]
    rows = points.select(*columns, *optional).to_dicts()
    bases = table.filter(pl.col("method") == BASE).to_dicts()
    if not rows:
        raise RazorError(f"{folder} holds the base policy only: there is nothing to pick from.")
    of_base = {row["seed"]: row.get("prior_stderr") for row in bases}
    errors = [_error_of_drop(row, of_base.get(row["seed"])) for row in rows]
    unknown = errors.count(math.inf)
    which = "The measured drops have" if unknown == len(rows) else f"{unknown} of the {len(rows)} measured drops have"
    notes = [f"{which} no standard error: how much of them is chance is not known."] if unknown else []
    candidates = [_of_record(row, error) for row, error in zip(rows, errors, strict=True)]
    return _Source("new", candidates, notes, None if unknown == len(rows) else 0.95, None)


def _of_record(row: Mapping[str, Any], error: float) -> Candidate:
    """A row of the table, with the standard error of its drop, infinite where it is not known."""
    name = f"{row['method']} lr {row['lr']:.3g} seed {row['seed']} step {row['step']} ({row['run_id']})"
    drop = float(row["forgetting"])
    kls = {
        of: Estimate(float(row[of]), _or(row.get(f"{of}_stderr"), math.inf))
        for of in (FORWARD, PROBE)
        if _is_finite(row.get(of))
    }
    ends = drop - _Z * error, drop + _Z * error
    return Candidate(name, int(row["step"]), float(row["new"]), drop, *ends, measured=True, kl=kls)


_MEASURED = ("prior", FORWARD, PROBE)


def _error_of_drop(row: Mapping[str, Any], of_base: float | None) -> float:
    """The standard error of a difference of two scores; at most, as it takes them to be of different items.

    Infinite where that of one of them is not known.
    """
    return math.hypot(_or(row.get("prior_stderr"), math.inf), _or(of_base, math.inf))


def _or(value: float | None, unknown: float) -> float:
    return float(value) if value is not None and math.isfinite(value) else unknown


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# A Trainer's folder


def metric_of(run: Run, wanted: str | None, lower_is_better: bool | None, limits: Budgets, law: LawFile | None) -> str:
    """The metric to go by. Raises RazorError, before minutes of measuring, where it was not logged or cannot judge.

    That is where it would have to be weighed against the drop that a law forecasts.
    """
    metric = find_metric(run.history, wanted)
    if law is not None and law.objection() is None and not limits.most:
        lower = is_lower_better(metric) if lower_is_better is None else lower_is_better
        values = []
        for one in run.checkpoints:
            with suppress(RazorError):
                values.append(float(latest(run.history, one.step, metric)[metric]))
        _check_weighable(metric, values, lower=lower)
    return metric


def _of_trainer(
    run: Run,
    metric: str | None,
    lower_is_better: bool | None,
    limits: Budgets,
    law: LawFile | None,
    measure: Callable[[Path, int], Drop] | None,
) -> _Source:
    """The checkpoints of a run, measured here or by the monitor that watched it."""
    notes = list(run.notes)
    metric = metric_of(run, metric, lower_is_better, limits, law)
    objection = None if law is None else law.objection(limit=limits.most.get(DROP))
    logged: list[Drop | Failure] = []
    if measure is None:
        logged, cautions = _logged(run, law)
        notes += cautions
    candidates: list[Candidate] = []
    drops: list[Drop] = []
    left_out: dict[str, list[str]] = {}
    said: list[str] = []
    for one in run.checkpoints:
        name = one.path.name
        try:
            entry = latest(run.history, one.step, metric)
            drop = measure(one.path, one.step) if measure else _drop_at(one, logged)
        except RazorError as error:
            left_out.setdefault(str(error), []).append(name)
            continue
        measured = "KL" if drop.drop is None else "the drop"
        for what, at in ((metric, int(entry["step"])), (measured, drop.step)):
            if at < one.step:
                said.append(f"{name}: {what} is that of step {at}.")
        if drop.extrapolated:
            said.append(f"{name}: KL is beyond what the law was fitted to: the interval may be too narrow.")
        drops.append(drop)
        new = float(entry[metric])
        shown = drop.drop, drop.low, drop.high, False, drop.extrapolated, drop.kl, drop.prompts
        candidates.append(Candidate(name, one.step, new, *shown))
    notes += [f"{', '.join(names)} {_is(names)} left out: {reason}" for reason, names in left_out.items()]
    notes += said
    if not candidates:
        raise RazorError(f"No checkpoint of {run.folder} has both {metric} and a drop or KL. {' '.join(notes)}")
    if law is not None:
        notes += [one for one in law.cautions(limit=limits.most.get(DROP)) if one != objection]
    elif all(drop.drop is None for drop in drops):
        objection = NO_LAW
    else:
        objection = next((drop.objection for drop in drops if drop.objection is not None), None)
    return _Source(metric, candidates, notes, drops[-1].level, objection)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _logged(run: Run, law: LawFile | None) -> tuple[list[Drop | Failure], list[str]]:
    """What the monitor has logged of a run, and what the law makes of its KLs, in order; and cautions."""
    path = run.log
    rows, notes = rows_of(run)
    try:
        found = [one for row in rows if (one := _of_row(row, law, path)) is not None]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RazorError(f"{path} is damaged ({error!r}). Measure the checkpoints anew.") from error
    if not any(isinstance(one, Drop) for one in found):
        raise RazorError(f"{path} has neither KL nor a forecast (the run was uncalibrated). Measure the checkpoints.")
    notes += [f"Measuring ended at step {one.step}: {one.error}" for one in found if isinstance(one, Failure)]
    marked = [one.run is not None or one.overwritten for one in run.checkpoints]
    if run.labelled and not all(marked):
        names = [one.path.name for one, is_marked in zip(run.checkpoints, marked, strict=True) if not is_marked]
        notes.append(
            f"Without a monitor's {MARK}: {', '.join(names)}. If training went on without one there, what was measured "
            "may be of other weights of that step."
        )
    return sorted(found, key=lambda one: one.step), notes


def _of_row(row: Mapping[str, Any], law: LawFile | None, path: Path) -> Drop | Failure | None:
    """What a row of the log says, or the law makes of it; None where neither says anything."""
    step = int(row["step"])
    if (error := row.get("error")) is not None:
        return Failure(step, (str(error).strip().splitlines() or ["unknown"])[-1])
    if law is None:
        names = [name for name in (FORWARD, PROBE) if row.get(name) is not None]
        kls = {name: _estimate(row[name], row.get(f"{name}_stderr")) for name in names}
        counts = row.get("prompts") or {}
        if not (shown := row.get("forecast")):
            return Drop.by(None, step, kls, "", counts) if kls else None
        drop, low, high = (_number(shown[name]) for name in ("drop", "low", "high"))
        level = None if row.get("level") is None else _number(row["level"])
        useful = row.get("law_useful", True) and row.get("law_objection") is None
        objection = None if useful else str(row.get("law_objection") or NOT_USEFUL)
        return Drop(step, drop, low, high, level, bool(shown.get("extrapolated")), objection, kls, counts)
    law.check_base(row["base"])
    if row["probe"] != probe_hash(law.settings, law.generic):
        raise RazorError(
            f"The KLs in {path} were measured with another probe or other settings than the law's: measure the "
            "checkpoints anew, with a base, prompts and the law."
        )
    kls = {name: _estimate(row[name], row[f"{name}_stderr"]) for name in (FORWARD, PROBE)}
    asked = row["prompts_hash"] if row["whole"] else ""
    return Drop.by(law, step, kls, asked, row["prompts"])


def _estimate(mean: Any, stderr: Any) -> Estimate:
    return Estimate(_number(mean), math.nan if stderr is None else _number(stderr))


def _number(value: Any) -> float:
    """Raises ValueError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _drop_at(checkpoint: Checkpoint, logged: Sequence[Drop | Failure]) -> Drop:
    """The last that was logged up to a checkpoint's step; of rows of one step the one that was written last."""
    if checkpoint.overwritten:
        raise RazorError(f"a run that no monitor watched has written over it since its {MARK} was.")
    last = next((one for one in reversed(logged) if one.step <= checkpoint.step), None)
    if last is None:
        raise RazorError("nothing was measured up to its step.")
    if isinstance(last, Failure):
        raise RazorError(f"measuring had ended at step {last.step}.")
    return last
