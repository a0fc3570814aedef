"""What a folder says of its checkpoints: that of a sweep by measured scores, a Trainer's by its log and a monitor's."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor.analysis import law as laws
from rlrazor.analysis import paired
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.log_schema import ForecastRow, LogRow, is_monitors
from rlrazor.guard.metric import NewScore, find_metric, latest
from rlrazor.guard.outputs import MARK
from rlrazor.guard.paired_drop import paired_drop, prior_names
from rlrazor.guard.run_folder import MEASURE, Run, SavedCheckpoint, rows_of
from rlrazor.guard.scored import LEVEL, DropEstimate, Forgetting, ScoredCheckpoint
from rlrazor.guard.verdict import DROP, Limits
from rlrazor.guard.watch_whole import weights_digest
from rlrazor.lm.means import MeanKL
from rlrazor.lm.probes import probe_hash
from rlrazor.runs.records import BASE
from rlrazor.runs.store import RunStore
from rlrazor.runs.tables import read_table

NO_LAW = (
    "Without a law of the base nothing is known of the prior scores, only how far each checkpoint has moved: `razor "
    "calibrate` makes the law, with which --law forecasts the drop in points and --budget judges it."
)
NOT_USEFUL = "The law was no better than guessing, or fitted to noise: do not rely on it."
_Z = 1.96  # standard errors to the ends of an interval of LEVEL

MeasureCheckpoint = Callable[[Path, int], Forgetting]
"""What is measured of the checkpoint in a folder, at its step."""


@dataclass(frozen=True)
class FoundCheckpoints:
    """What a folder holds. `objection`: why its drops may not judge, None where they may."""

    metric: str
    candidates: list[ScoredCheckpoint]
    notes: list[str]
    level: float | None
    objection: str | None


@dataclass(frozen=True)
class Failure:
    """Where measuring ended, and why in one line; of `razor watch`, where it failed on one checkpoint."""

    step: int
    error: str


@dataclass(frozen=True)
class Logged:
    """What a row says, or the law makes of it. `weights`: what tells the checkpoint's, where `razor watch` wrote it."""

    found: Forgetting | Failure
    weights: str | None


def of_records(folder: Path) -> FoundCheckpoints:
    """Every checkpoint of every run, with measured scores. Raises RazorError where their new tasks are several."""
    columns = ("run_id", "method", "lr", "seed", "step", "new", "forgetting")
    table = read_table(folder / "records.parquet", ("trajectory", *columns))
    if "stage" in table.columns:
        raise RazorError(
            f"{folder} is of tasks in sequence: the new-task scores of its checkpoints are of different tasks, so that "
            "none is best."
        )
    points = laws.distinct(table).filter(pl.col("method") != BASE)
    if points.is_empty():
        raise RazorError(f"{folder} holds the base policy only: there is nothing to pick from.")
    bases = {row["seed"]: row for row in table.filter(pl.col("method") == BASE).to_dicts()}
    scored, store = prior_names(table.columns), RunStore(folder)

    @lru_cache(maxsize=1)  # a run's checkpoints follow one another
    def outcomes(run_id: str) -> pl.DataFrame | None:
        return store.items(run_id) if store.has_items(run_id) else None

    candidates = []
    for row in points.to_dicts():
        base = bases.get(row["seed"], {})
        drops = {name: _known(base.get(f"prior_{name}")) - _known(row[f"prior_{name}"]) for name in scored}
        candidates.append(_of_record(row, base, paired_drop(outcomes(row["run_id"]), row["step"], drops)))
    unknown = sum(math.isinf(one.at(DROP, upper=True)) for one in candidates)
    which = (
        "The measured drops have"
        if unknown == len(candidates)
        else f"{unknown} of the {len(candidates)} measured drops have"
    )
    notes = [f"{which} no standard error: how much of them is chance is not known."] if unknown else []
    return FoundCheckpoints("new", candidates, notes, None if unknown == len(candidates) else LEVEL, None)


def _of_record(row: Mapping[str, Any], base: Mapping[str, Any], found: paired.Mean | None) -> ScoredCheckpoint:
    """A row of the table beside its base's. `found`: its drop by the items, None where they are not known.

    Then the two scores' errors are taken to be of different items, which is more than the drop's as a rule, and
    infinite where one is not known.
    """
    name = f"{row['method']} lr {row['lr']:.3g} seed {row['seed']} step {row['step']} ({row['run_id']})"
    drop = float(row["forgetting"])
    kls = {
        of: MeanKL(float(row[of]), _known(row.get(f"{of}_stderr")))
        for of in (FORWARD, PROBE)
        if math.isfinite(_known(row.get(of)))
    }
    if found is None:
        error = math.hypot(_known(row.get("prior_stderr")), _known(base.get("prior_stderr")))
        low, high = drop - _Z * error, drop + _Z * error
    else:
        low, high = found.interval(LEVEL)
    measured = DropEstimate(drop, low, high, measured=True)
    return ScoredCheckpoint(name, int(row["step"]), float(row["new"]), measured, kls)


def _known(value: float | None) -> float:
    """Infinite where it is not."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


# A Trainer's folder


def metric_of(run: Run, score: NewScore, limits: Limits, law: LawFile | None) -> str:
    """The metric to go by. Raises RazorError, before minutes of measuring, where it was not logged or cannot judge.

    That is where it would have to be weighed against the drop that a law forecasts.
    """
    metric = find_metric(run.history, score.metric)
    if law is not None and law.objection() is None and not limits.most:
        values = []
        for one in run.checkpoints:
            with suppress(RazorError):
                values.append(float(latest(run.history, one.step, metric)[metric]))
        check_weighable(metric, values, lower=score.is_lower_better(metric))
    return metric


def check_weighable(metric: str, values: Sequence[float], *, lower: bool) -> None:
    """Raise RazorError where a score cannot be weighed against a drop."""
    if lower or not all(0 <= value <= 1 for value in values):
        raise RazorError(f"{metric} is not a fraction of 1, so it cannot be weighed against a drop: give a budget.")


def of_trainer(
    run: Run, score: NewScore, limits: Limits, law: LawFile | None, measure: MeasureCheckpoint | None
) -> FoundCheckpoints:
    """The checkpoints of a run, measured here or by the monitor that watched it."""
    notes = list(run.notes)
    metric = metric_of(run, score, limits, law)
    logged: list[Logged] = []
    if measure is None:
        logged, cautions = _logged(run, law)
        notes += cautions
    candidates: list[ScoredCheckpoint] = []
    found: list[Forgetting] = []
    left_out: dict[str, list[str]] = {}
    said: list[str] = []
    for one in run.checkpoints:
        name = one.path.name
        try:
            entry = latest(run.history, one.step, metric)
            forgetting = measure(one.path, one.step) if measure else _logged_at(one, logged)
        except RazorError as error:
            left_out.setdefault(str(error), []).append(name)
            continue
        measured = "KL" if forgetting.drop is None else "the drop"
        for what, at in ((metric, int(entry["step"])), (measured, forgetting.step)):
            if at < one.step:
                said.append(f"{name}: {what} is that of step {at}.")
        if forgetting.drop is not None and forgetting.drop.extrapolated:
            said.append(f"{name}: KL is beyond what the law was fitted to: the interval may be too narrow.")
        found.append(forgetting)
        known = forgetting.drop, forgetting.kl, forgetting.prompts
        candidates.append(ScoredCheckpoint(name, one.step, float(entry[metric]), *known))
    notes += [f"{', '.join(names)} {is_or_are(names)} left out: {reason}" for reason, names in left_out.items()]
    notes += said
    if not candidates:
        raise RazorError(f"No checkpoint of {run.folder} has both {metric} and a drop or KL. {' '.join(notes)}")
    return FoundCheckpoints(metric, candidates, notes, found[-1].level, objection_of(found, law, limits, notes))


def objection_of(found: Sequence[Forgetting], law: LawFile | None, limits: Limits, notes: list[str]) -> str | None:
    """Why the drops may not judge, None where they may; `notes` gain the law's cautions."""
    if law is not None:
        objection = law.objection(limit=limits.drop)
        notes += [one for one in law.cautions(limit=limits.drop) if one != objection]
        return objection
    if all(one.drop is None for one in found):
        return NO_LAW
    return next((one.objection for one in found if one.objection is not None), None)


def is_or_are(names: Sequence[str]) -> str:
    """The verb."""
    return "is" if len(names) == 1 else "are"


def _logged(run: Run, law: LawFile | None) -> tuple[list[Logged], list[str]]:
    """What is logged of a run, and what the law makes of its KLs, in order; and cautions."""
    path = run.log
    rows, notes = rows_of(run)
    found = logged_in(rows, law, path)
    ends = [one.found for one in found if isinstance(one.found, Failure) and one.weights is None]
    notes += [f"Measuring ended at step {one.step}: {one.error}" for one in ends]
    marked = [one.run is not None or one.overwritten for one in run.checkpoints]
    if run.labelled and not all(marked) and any(map(is_monitors, rows)):
        names = [one.path.name for one, is_marked in zip(run.checkpoints, marked, strict=True) if not is_marked]
        notes.append(
            f"Without a monitor's {MARK}: {', '.join(names)}. If training went on without one there, what was measured "
            "may be of other weights of that step."
        )
    return found, notes


def logged_in(rows: Sequence[LogRow], law: LawFile | None, path: Path) -> list[Logged]:
    """What the rows of a log say, or the law makes of them, in order of step.

    Raises RazorError where none says anything.
    """
    found = [Logged(one, row.weights) for row in rows if (one := _of_row(row, law, path)) is not None]
    if not any(isinstance(one.found, Forgetting) for one in found):
        raise RazorError(f"{path} has neither KL nor a forecast (the run was uncalibrated): {MEASURE}.")
    return sorted(found, key=lambda one: one.found.step)


def watched_at(folder: Path, logged: Sequence[Logged]) -> Forgetting | None:
    """What `razor watch` has measured of the weights in a folder, whatever its name; None where it has not.

    Raises RazorError where it has failed on them.
    """
    if all(one.weights is None for one in logged):
        return None
    try:
        weights = weights_digest(folder)
    except OSError as error:
        raise RazorError(f"its weights cannot be read ({error.strerror or error}).") from error
    last = next((one.found for one in reversed(logged) if one.weights == weights), None)
    if isinstance(last, Failure):
        raise RazorError(f"it could not be measured: {last.error}")
    return last


def _of_row(row: LogRow, law: LawFile | None, path: Path) -> Forgetting | Failure | None:
    """What a row of the log says, or the law makes of it; None where neither says anything."""
    if row.error is not None:
        return Failure(row.step, (row.error.strip().splitlines() or ["unknown"])[-1])
    if row.on_budget is not None and not row.kls:  # of a command alone
        return None
    if law is None:
        if row.forecast is None:
            return Forgetting.by(None, row.step, row.kls, "", row.prompts) if row.kls else None
        drop = DropEstimate(**row.forecast.model_dump(include=set(ForecastRow.model_fields)))
        useful = row.law_useful and row.law_objection is None
        objection = None if useful else row.law_objection or NOT_USEFUL
        return Forgetting(row.step, drop, row.kls, row.prompts, row.level, objection)
    law.check_base(row.base)
    if row.probe != probe_hash(law.settings, law.generic):
        raise RazorError(
            f"The KLs in {path} were measured with another probe or other settings than the law's: measure the "
            "checkpoints anew, with a base, prompts and the law."
        )
    return Forgetting.by(law, row.step, row.kls, row.prompts_hash if row.whole else "", row.prompts)


def _logged_at(checkpoint: SavedCheckpoint, logged: Sequence[Logged]) -> Forgetting:
    """What was measured of its weights, or else the last that a monitor logged up to its step.

    Of rows of one step it is the one that was written last.
    """
    if (watched := watched_at(checkpoint.path, logged)) is not None:
        return watched
    if checkpoint.overwritten:
        raise RazorError(f"a run that no monitor watched has written over it since its {MARK} was.")
    monitored = [one.found for one in logged if one.weights is None]
    if not monitored:
        raise RazorError("`razor watch` has not measured its weights.")
    last = next((one for one in reversed(monitored) if one.step <= checkpoint.step), None)
    if last is None:
        raise RazorError("nothing was measured up to its step.")
    if isinstance(last, Failure):
        raise RazorError(f"measuring had ended at step {last.step}.")
    return last
