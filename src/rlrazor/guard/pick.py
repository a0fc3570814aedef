"""Which checkpoint of a run to take: the Pareto frontier of new-task score and forgetting, and one of it.

For the folder of any Trainer: checkpoint-N folders, with the new-task metric in their trainer_state.json and the
forecasts that a `ForgettingMonitor` left in razor.jsonl, or else measured here. And for the run folders of rlrazor,
whose table has measured scores of both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor import law as laws
from rlrazor.errors import RazorError
from rlrazor.forecast import FORWARD, PROBE, Forecast
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.outputs import LOG
from rlrazor.lm.kl import Estimate
from rlrazor.lm.probes import probe_hash
from rlrazor.records import BASE

METRICS = (
    *("eval_reward", "eval_accuracy", "eval_exact_match", "eval_pass@1", "eval_rewards/accuracies"),
    *("eval_mean_token_accuracy", "reward", "mean_token_accuracy", "eval_loss", "loss"),
)
"""What is taken for the new-task score, unless one is named: the first of them that the run has logged."""

# Metrics of which less is better, by how their names end; scikit-learn's are negated.
_LOWER = re.compile(
    r"loss$|(^|[^a-z])(perplexity|ppl|[wct]er|err|errors?|error_rate|r?mse|msle|mape|mae|nll|kl|bp[bc]|bits_per_byte|"
    r"bits_per_char|brier(_score)?|ece|edit_distance)$"
)
_NEGATED = re.compile(r"(^|[^a-z])neg_")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint. `new` is the metric's value; `drop` of the prior score, a fraction of 1, measured or forecast.

    `low` and `high` are the ends of the forecast's interval, equal to `drop` where it was measured. `extrapolated`: its
    KL is beyond what the law was fitted to.
    """

    name: str
    step: int
    new: float
    drop: float
    low: float
    high: float
    measured: bool
    extrapolated: bool = False


@dataclass(frozen=True)
class Pick:
    """The candidates in order of training, those on the frontier, the recommended one, and why. `notes`: cautions.

    `level`: of the forecasts' intervals; None where drops were measured, or an old log does not say.
    """

    candidates: Sequence[Candidate]
    frontier: Sequence[Candidate]
    recommended: Candidate
    why: str
    metric: str
    lower_is_better: bool
    notes: Sequence[str]
    level: float | None = None


@dataclass(frozen=True)
class Drop:
    """A forecast drop of the prior score at a step, with its interval of that level.

    `useful`: whether its law forecasts better than guessing.
    """

    step: int
    drop: float
    low: float
    high: float
    level: float | None = None
    extrapolated: bool = False
    useful: bool = True

    @classmethod
    def by(cls, law: LawFile, step: int, forecast: Forecast) -> Drop:
        """What a law says."""
        found = forecast.drop, forecast.low, forecast.high, law.attainable(), forecast.extrapolated
        return cls(step, *found, law.useful)


def pick(
    folder: Path,
    *,
    metric: str | None = None,
    lower_is_better: bool | None = None,
    budget: float | None = None,
    cautious: bool = False,
    law: LawFile | None = None,
    measure: Callable[[Path, int], Drop] | None = None,
) -> Pick:
    """The frontier of a folder's checkpoints, and the recommended one.

    With `budget`, the largest drop to accept, that is the best new-task score within it, by the forecast or, with
    `cautious`, by the upper end of its interval. Without one, the highest score minus drop, which takes a score that is
    a fraction of 1. `metric`: of the trainer's log, for which `lower_is_better` goes by its name (loss, perplexity,
    error rates) unless it is given; `law` forecasts from the KLs in razor.jsonl; `measure(checkpoint, step)` replaces
    that log.

    Raises RazorError where there are no checkpoints, no such metric, no forecast, or none within the budget.
    """
    if budget is not None and not 0 <= budget < 1:
        raise RazorError(f"A budget is a fraction of 1, such as 0.02 for two points of the prior score, not {budget}.")
    notes: list[str] = []
    level: float | None = None
    if (folder / "records.parquet").exists():
        if (metric, lower_is_better, law, measure) != (None,) * 4:
            raise RazorError(f"{folder} is of a sweep, whose own measured scores are used: give a budget at most.")
        metric, candidates = "new", _of_records(folder)
    elif folder.is_dir():
        metric, notes, candidates, level = _of_trainer(folder, metric, law, measure)
    else:
        raise RazorError(f"There is no folder {folder}.")
    by_name = _LOWER.search(metric.lower()) is not None and _NEGATED.search(metric.lower()) is None
    lower = by_name if lower_is_better is None else lower_is_better
    front = frontier(candidates, lower_is_better=lower)
    chosen, why = _recommend(candidates, front, metric, budget, cautious=cautious, lower=lower)
    return Pick(candidates, front, chosen, why, metric, lower, notes, level)


def frontier(candidates: Sequence[Candidate], *, lower_is_better: bool = False) -> list[Candidate]:
    """Those that no other beats in one of score and drop without losing in the other, the smallest drop first."""
    sign = -1 if lower_is_better else 1
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.drop, -sign * one.new, one.step)):
        if not front or sign * one.new > sign * front[-1].new:
            front.append(one)
    return front


def _recommend(
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    metric: str,
    budget: float | None,
    *,
    cautious: bool,
    lower: bool,
) -> tuple[Candidate, str]:
    """Of all the candidates: who judges by the upper ends of intervals may find the best off the frontier."""
    sign = -1 if lower else 1

    def judged(one: Candidate) -> float:
        return one.high if cautious else one.drop

    kind = "measured" if front[0].measured else "forecast"
    if budget is not None:
        within = [one for one in candidates if judged(one) <= budget]
        if not within:
            least = min(candidates, key=judged)
            raise RazorError(
                f"No checkpoint is within the budget of {100 * budget:.1f} points: the least that any drops, "
                f"{'by the upper end of its interval' if cautious else kind}, is {100 * judged(least):.1f} "
                f"({least.name}). Save checkpoints earlier, or train with a lower learning rate."
            )
        chosen = max(within, key=lambda one: (sign * one.new, -judged(one), -one.step))
        best = "lowest" if lower else "highest"
        return chosen, (
            f"of the checkpoints with a {kind} drop of at most {100 * budget:.1f} points"
            f"{', at the upper end of the interval' if cautious else ''}, it has the {best} {metric} "
            f"({chosen.new:.4g}){_aside(chosen, front)}"
        )
    if lower or not all(0 <= one.new <= 1 for one in front):
        raise RazorError(f"{metric} is not a fraction of 1, so it cannot be weighed against a drop: give a budget.")
    chosen = max(candidates, key=lambda one: (one.new - judged(one), -one.step))
    of = f"{kind} drop{' at the upper end of its interval' if cautious else ''}"
    return chosen, (
        f"{metric} minus {of} is highest: {100 * chosen.new:.1f} {'-+'[judged(chosen) < 0]} "
        f"{100 * abs(judged(chosen)):.1f} points, a point gained being worth a point lost{_aside(chosen, front)}"
    )


def _aside(chosen: Candidate, front: Sequence[Candidate]) -> str:
    return "" if chosen in front else "; it is off the frontier, which is drawn by the forecast itself"


# Our own run folders


def _of_records(folder: Path) -> list[Candidate]:
    """Every checkpoint of every run, with measured scores."""
    try:
        table = pl.read_parquet(folder / "records.parquet")
        points = laws.distinct(table).filter(pl.col("method") != BASE)
        rows = points.select("run_id", "method", "lr", "seed", "step", "new", "forgetting").to_dicts()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RazorError(f"{folder / 'records.parquet'} is damaged ({error}): run the command that made it.") from error
    if not rows:
        raise RazorError(f"{folder} holds the base policy only: there is nothing to pick from.")
    return [
        Candidate(
            f"{row['method']} lr {row['lr']:.3g} seed {row['seed']} step {row['step']} ({row['run_id']})",
            int(row["step"]),
            float(row["new"]),
            *(float(row["forgetting"]),) * 3,
            measured=True,
        )
        for row in rows
    ]


# A Trainer's folder


def _of_trainer(
    folder: Path, metric: str | None, law: LawFile | None, measure: Callable[[Path, int], Drop] | None
) -> tuple[str, list[str], list[Candidate], float | None]:
    """The metric, cautions, the candidates, and the level of their intervals."""
    found = checkpoints(folder)
    history = _history(found)
    metric = _metric(history, metric)
    logged = None if measure else _drops(folder, law)
    candidates: list[Candidate] = []
    drops: list[Drop] = []
    notes: list[str] = []
    for step, path in found:
        entry = _latest(history, step, metric)
        if entry is None:
            notes.append(f"{path.name} is left out: {metric} was not logged up to its step.")
            continue
        drop = measure(path, step) if measure else _at(logged or [], step)
        if drop is None:
            notes.append(f"{path.name} is left out: nothing was forecast up to its step.")
            continue
        for name, at in ((metric, int(entry["step"])), ("the drop", drop.step)):
            if at < step:
                notes.append(f"{path.name}: {name} is that of step {at}.")
        if drop.extrapolated:
            notes.append(f"{path.name}: KL is beyond what the law was fitted to: the interval may be too narrow.")
        drops.append(drop)
        candidates.append(
            Candidate(path.name, step, float(entry[metric]), drop.drop, drop.low, drop.high, False, drop.extrapolated)
        )
    if not candidates:
        raise RazorError(f"No checkpoint of {folder} has both {metric} and a drop. {' '.join(notes)}")
    if law is not None:
        notes += law.cautions()
    elif not all(drop.useful for drop in drops):
        notes.append("The law was no better than guessing, or fitted to noise: do not rely on it.")
    return metric, notes, candidates, drops[-1].level


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoint-N folders, by step. Raises RazorError where there are none."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.partition("-")[2]
        if number.isdigit() and (path / "trainer_state.json").is_file():
            found.append((int(number), path))
    if not found:
        raise RazorError(
            f"{folder} has no checkpoint-N folder with a trainer_state.json, and no records.parquet of a sweep. Give "
            "the output folder of a Trainer that saved checkpoints."
        )
    return sorted(found)


def _history(found: Sequence[tuple[int, Path]]) -> list[Mapping[str, Any]]:
    """All that was logged up to the last checkpoint."""
    path = found[-1][1] / "trainer_state.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [entry for entry in history if isinstance(entry.get("step"), int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RazorError(f"{path} is damaged ({error!r}): give a folder whose last checkpoint is whole.") from error


def _metric(history: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    logged = {
        name: None
        for entry in history
        for name, value in entry.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    names = [name for name in logged if name not in ("step", "epoch")]
    if wanted is not None and wanted not in names:
        raise RazorError(f"{wanted} was not logged. Logged: {', '.join(names) or 'nothing'}.")
    chosen = wanted or next((name for name in METRICS if name in names), None)
    if chosen is None:
        raise RazorError(f"None of the usual scores was logged: name one by its metric. Logged: {', '.join(names)}.")
    return chosen


def _latest(history: Sequence[Mapping[str, Any]], step: int, metric: str) -> Mapping[str, Any] | None:
    own = [
        entry
        for entry in history
        if entry["step"] <= step and isinstance(value := entry.get(metric), int | float) and math.isfinite(value)
    ]
    return max(own, key=lambda entry: entry["step"], default=None)


def _drops(folder: Path, law: LawFile | None) -> list[Drop]:
    """What the monitor has logged, or what the law makes of its KLs."""
    path = folder / LOG
    try:
        rows = _rows(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RazorError(
            f"There is no {path}, so nothing is known of forgetting: train with a ForgettingMonitor, or measure the "
            "checkpoints here with a base, prompts and a law."
        ) from error
    except ValueError as error:
        raise RazorError(f"{path} is damaged: a line is not JSON. Measure the checkpoints anew.") from error
    try:
        drops = [drop for row in rows if (drop := _drop(row, law, path)) is not None]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RazorError(f"{path} is damaged ({error!r}). Measure the checkpoints anew.") from error
    if not drops:
        raise RazorError(f"{path} has KL but no forecast: the run was uncalibrated. Give a law of its base.")
    return drops


def _drop(row: Mapping[str, Any], law: LawFile | None, path: Path) -> Drop | None:
    """What a row of the log says, or the law makes of it; None where neither says anything."""
    step = int(row["step"])
    if law is None:
        if not (shown := row.get("forecast")):
            return None
        drop, low, high = (float(shown[name]) for name in ("drop", "low", "high"))
        beyond, useful = bool(shown.get("extrapolated")), bool(row.get("law_useful", True))
        return Drop(step, drop, low, high, row.get("level"), beyond, useful)
    law.check_base(row["base"])
    if row["probe"] != probe_hash(law.settings, law.generic):
        raise RazorError(
            f"The KLs in {path} were measured with another probe or other settings than the law's: measure the "
            "checkpoints anew, with a base, prompts and the law."
        )
    kls = {name: _estimate(row[name], row[f"{name}_stderr"]) for name in (FORWARD, PROBE)}
    asked = row["prompts_hash"] if row["whole"] else ""
    return Drop.by(law, step, law.forecast(kls, prompts=asked, measured=row["prompts"][FORWARD]))


def _rows(text: str) -> list[dict[str, Any]]:
    """A last line that a killed process left half-written is not one."""
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and not text.endswith("\n"):
        with suppress(ValueError):
            return [json.loads(line) for line in lines]
        lines = lines[:-1]
    return [json.loads(line) for line in lines]


def _estimate(mean: float, stderr: float | None) -> Estimate:
    return Estimate(float(mean), math.nan if stderr is None else float(stderr))


def _at(drops: Sequence[Drop], step: int) -> Drop | None:
    return max((drop for drop in drops if drop.step <= step), key=lambda drop: drop.step, default=None)
