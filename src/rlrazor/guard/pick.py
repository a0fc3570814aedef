"""Which checkpoint of a run to take: the Pareto frontier of new-task score and forgetting, and one of it.

For the folder of any Trainer: checkpoint-N folders, with the new-task metric in their trainer_state.json and the
forecasts that a `ForgettingMonitor` left in razor.jsonl, or else measured here. And for the run folders of rlrazor,
whose table has measured scores of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor import bounds
from rlrazor import law as laws
from rlrazor.errors import RazorError
from rlrazor.forecast import FORWARD, PROBE, Forecast
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.outputs import LOG, MARK
from rlrazor.guard.run_folder import Checkpoint, Run, rows_of, run_in
from rlrazor.lm.kl import Estimate
from rlrazor.lm.probes import probe_hash
from rlrazor.records import BASE
from rlrazor.store import read_table

METRICS = (
    *("eval_reward", "eval_accuracy", "eval_exact_match", "eval_pass@1", "eval_rewards/accuracies"),
    *("eval_mean_token_accuracy", "reward", "accuracy", "rewards/accuracies", "mean_token_accuracy"),
    *("eval_loss", "loss"),
)
"""What is taken for the new-task score, unless one is named: the first of them that the run has logged."""

# Metrics of which less is better, by a word that ends their names, but for a statistic after it.
_LESS = (
    r"perplexit(y|ies)|ppl|[cdemtw]er|wil|errs?|errors?|failures?|fail|false_(positive|negative)s?|fpr|fnr|"
    r"misclassifications?|hallucinations?|violations?|toxicity|regret|r?mse|r?msle|s?mape|mae|mase|"
    r"nll|neg(ative)?_log_?likelihood|likelihood_diff|pct_stereotype|deviance|cross_?entropy|xent|ce|"
    r"(approx_?)?kld?|kl_div|jsd?|divergence|bp[bcw]|bits_per_(byte|char|character|token|word)|brier(_score)?|[em]ce|"
    r"distance|levenshtein|fid|crps"
)
_STATISTIC = (
    r"mean|avg|average|median|min|max|sum|total|std|stderr|rate|ratio|count|percent|pct|micro|macro|weighted|norm|"
    r"normali[sz]ed|first|last|final|best|all|overall|none|train|test|val|valid|validation|eval|dev|"
    r"per|token|word|byte|char|character|sample|example|sequence|completion|step|epoch"
)
# Some of the words say so anywhere, as in eval_loss_gsm8k, unless a better thing is made of them.
_BETTER = r"reduction|improvement|decrease|drop|gain|acc|accuracy|reward|success|match|f1|em"
_LOWER = re.compile(
    rf"(loss|(^|[^a-z])({_LESS}))([^a-z]+({_STATISTIC}))*[^a-z]*$|"
    rf"(^|[^a-z])(loss|perplexity|ppl|[cw]er|nll|r?mse|mae)(?=[^a-z])(?!.*[^a-z]({_BETTER})[^a-z]*$)"
)
# Scikit-learn's are negated; the negative log-likelihood is not the negation of something of which less is better.
_NEGATED = re.compile(
    r"(^|(?<!false)(?<!true)[^a-z])(neg|negative|minus|inv|inverse)[^a-z](?!log_?likelihood|sample)|^(eval_)?1 ?- ?"
)


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
class Failure:
    """Where measuring ended, and why in one line."""

    step: int
    error: str


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
    run: str | None = None,
) -> Pick:
    """The frontier of a folder's checkpoints, and the recommended one.

    With `budget`, the largest drop to accept, that is the best new-task score within it, by the forecast or, with
    `cautious`, by the upper end of its interval. Without one, the highest score minus drop, which takes a score that is
    a fraction of 1. `metric`: of the trainer's log, for which `lower_is_better` goes by its name (loss, perplexity,
    error rates) unless it is given; `law` forecasts from the KLs in razor.jsonl; `measure(checkpoint, step)` replaces
    that log. `run`: the id of the training run, of those in the folder, by default the one that wrote last.

    Checkpoints that cannot be read, have no weights or cannot be measured are left out, with a note. Raises RazorError
    where none is left, there is no such metric or forecast, or none within the budget.
    """
    bounds.require_number("budget", budget)
    if budget is not None and not 0 <= budget < 1:
        raise RazorError(f"A budget is a fraction of 1, such as 0.02 for two points of the prior score, not {budget}.")
    notes: list[str] = []
    level: float | None = None
    if (folder / "records.parquet").exists():
        if (metric, lower_is_better, law, measure, run) != (None,) * 5:
            raise RazorError(f"{folder} is of a sweep, whose own measured scores are used: give a budget at most.")
        metric, candidates = "new", _of_records(folder)
    elif folder.is_dir():
        metric, notes, candidates, level = _of_trainer(run_in(folder, run), metric, law, measure)
    else:
        raise RazorError(f"There is no folder {folder}.")
    lower = is_lower_better(metric) if lower_is_better is None else lower_is_better
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


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is better, by its name."""
    return _LOWER.search(metric.lower()) is not None and _NEGATED.search(metric.lower()) is None


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
    wanted = ("run_id", "method", "lr", "seed", "step", "new", "forgetting")
    table = read_table(folder / "records.parquet", ("trajectory", *wanted))
    rows = laws.distinct(table).filter(pl.col("method") != BASE).select(*wanted).to_dicts()
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
    run: Run, metric: str | None, law: LawFile | None, measure: Callable[[Path, int], Drop] | None
) -> tuple[str, list[str], list[Candidate], float | None]:
    """The metric, cautions, the candidates, and the level of their intervals."""
    notes = list(run.notes)
    metric = _metric(run.history, metric)
    logged: list[Drop | Failure] = []
    if measure is None:
        logged, cautions = _logged(run, law)
        notes += cautions
    candidates: list[Candidate] = []
    drops: list[Drop] = []
    for one in run.checkpoints:
        name = one.path.name
        try:
            entry = _latest(run.history, one.step, metric)
            drop = measure(one.path, one.step) if measure else _drop_at(one, logged)
        except RazorError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        for what, at in ((metric, int(entry["step"])), ("the drop", drop.step)):
            if at < one.step:
                notes.append(f"{name}: {what} is that of step {at}.")
        if drop.extrapolated:
            notes.append(f"{name}: KL is beyond what the law was fitted to: the interval may be too narrow.")
        drops.append(drop)
        new = float(entry[metric])
        candidates.append(Candidate(name, one.step, new, drop.drop, drop.low, drop.high, False, drop.extrapolated))
    if not candidates:
        raise RazorError(f"No checkpoint of {run.folder} has both {metric} and a drop. {' '.join(notes)}")
    if law is not None:
        notes += law.cautions()
    elif not all(drop.useful for drop in drops):
        notes.append("The law was no better than guessing, or fitted to noise: do not rely on it.")
    return metric, notes, candidates, drops[-1].level


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


def _latest(history: Sequence[Mapping[str, Any]], step: int, metric: str) -> Mapping[str, Any]:
    """The last entry up to a step that has the metric."""
    own = [
        entry
        for entry in history
        if entry["step"] <= step and isinstance(value := entry.get(metric), int | float) and math.isfinite(value)
    ]
    if not own:
        raise RazorError(f"{metric} was not logged up to its step.")
    return max(own, key=lambda entry: entry["step"])


def _logged(run: Run, law: LawFile | None) -> tuple[list[Drop | Failure], list[str]]:
    """What the monitor has logged of a run, or what the law makes of its KLs, in order; and cautions."""
    path = run.folder / LOG
    rows, notes = rows_of(run)
    try:
        found = [one for row in rows if (one := _of_row(row, law, path)) is not None]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RazorError(f"{path} is damaged ({error!r}). Measure the checkpoints anew.") from error
    if not any(isinstance(one, Drop) for one in found):
        raise RazorError(f"{path} has KL but no forecast: the run was uncalibrated. Give a law of its base.")
    notes += [f"Measuring ended at step {one.step}: {one.error}" for one in found if isinstance(one, Failure)]
    marked = [one.run is not None or one.overwritten for one in run.checkpoints]
    if run.labelled and not all(marked):
        names = [one.path.name for one, is_marked in zip(run.checkpoints, marked, strict=True) if not is_marked]
        notes.append(
            f"Without a monitor's {MARK}: {', '.join(names)}. If training went on without one there, the forecast may "
            "be of other weights of that step."
        )
    return sorted(found, key=lambda one: one.step), notes


def _of_row(row: Mapping[str, Any], law: LawFile | None, path: Path) -> Drop | Failure | None:
    """What a row of the log says, or the law makes of it; None where neither says anything."""
    step = int(row["step"])
    if (error := row.get("error")) is not None:
        return Failure(step, (str(error).strip().splitlines() or ["unknown"])[-1])
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


def _estimate(mean: float, stderr: float | None) -> Estimate:
    return Estimate(float(mean), math.nan if stderr is None else float(stderr))


def _drop_at(checkpoint: Checkpoint, logged: Sequence[Drop | Failure]) -> Drop:
    """The last that was logged up to a checkpoint's step; of rows of one step the one that was written last."""
    if checkpoint.overwritten:
        raise RazorError(f"a run that no monitor watched has written over it since its {MARK} was.")
    last = next((one for one in reversed(logged) if one.step <= checkpoint.step), None)
    if last is None:
        raise RazorError("nothing was forecast up to its step.")
    if isinstance(last, Failure):
        raise RazorError(f"measuring had ended at step {last.step}.")
    return last
