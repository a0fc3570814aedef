"""From measured runs to `law.json`: which KL forecasts forgetting on this base, and with what interval.

The runs come as a table, a row per checkpoint, whoever made them: `razor calibrate` fine-tunes a few, and any sweep's
records.parquet does as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from rlrazor.analysis import forecast, law
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import UNKNOWN, LawFile, Made
from rlrazor.guard.law_schema import LawProbe
from rlrazor.guard.measured_on import FEW_PROMPTS, MeasuredOn
from rlrazor.guard.paired_drop import Outcomes, paired_drop, prior_names
from rlrazor.runs.records import BASE

ONE_ERROR = math.erf(math.sqrt(0.5))  # the level at which an interval is a standard error to each side, as a rule
KEPT = ("method", "seed", "lr", "step", "new", "prior", *forecast.CANDIDATES[-1], "forgetting")


@dataclass(frozen=True)
class CalibratedBase:
    """Whose law it is, by its name, digest and tokenizer, what it was measured on, and how its prior tasks are asked.

    `asked`: as `Asking.as_json` has it.
    """

    name: str
    digest: str
    tokenizer_digest: str
    on: MeasuredOn
    asked: Mapping[str, Any] = field(default_factory=dict)


def fit(
    table: pl.DataFrame,
    base: CalibratedBase,
    *,
    level: float = 0.9,
    candidates: Sequence[Sequence[str]] | None = None,
    made: Made = UNKNOWN,
    outcomes: Outcomes = lambda run_id: None,
) -> LawFile:
    """Fit the law to a table as `records.to_table` makes it, the base's row among its rows; `outcomes` of its runs.

    `candidates`: the KLs that it may be of; see `_chosen`.

    Raises RazorError where the base's row is missing, for fewer than 3 runs, and where no fit is possible.
    """
    untuned = table.filter(pl.col("method") == BASE)
    if untuned.is_empty():
        raise RazorError("The runs have no row of the base policy, from which forgetting is counted.")
    points = law.distinct(table)
    score = float(untuned["prior"].mean())  # type: ignore[arg-type]
    try:
        choice = _chosen(points, base.on, candidates)
        forecaster = forecast.fit_forecaster(points, choice.best.columns, score)
    except RazorError as error:
        raise RazorError(
            f"No law can be fitted to these runs. {error} If they hardly moved the model, raise the learning rates or "
            "the updates; if there are few prompts, give more rows."
        ) from error
    of_fit = forecast.measured(points, choice.best.columns)
    kept = of_fit.select(pl.col("trajectory").alias("run"), *(name for name in KEPT if name in points.columns))
    scores = {name: float(untuned[f"prior_{name}"].mean()) for name in prior_names(untuned.columns)}  # type: ignore[arg-type]
    return LawFile.fitted(
        forecaster,
        choice,
        base={"name": base.name, "digest": base.digest, "tokenizer": base.tokenizer_digest},
        prior={
            "scores": scores,
            "mean": score,
            "noise": _noise(untuned, of_fit, outcomes),
            **({"asked": dict(base.asked)} if base.asked else {}),
        },
        probe=LawProbe.of(base.on),
        level=level,
        data=kept.to_dicts(),
        made=made,
    )


def _chosen(points: pl.DataFrame, on: MeasuredOn, candidates: Sequence[Sequence[str]] | None) -> forecast.Choice:
    """Which KLs the law is of: of the candidates, by default all, those that forecast best what was left out.

    Of runs of one method runs are left out, among which the new task's KL forecasts well whatever it would say of
    another method (docs/law.md). So there, by default, a law is of the KL on the prior tasks' own prompts alone, if
    that is better than guessing.
    """
    if candidates is None and on.generic.prior is not None and points["method"].n_unique() == 1:
        with suppress(RazorError):  # no such KL
            alone = forecast.choose(points, [(PROBE,)])
            if alone.useful:
                return alone
    return forecast.choose(points, candidates or forecast.CANDIDATES)


def warnings_of(found: LawFile, table: pl.DataFrame) -> list[str]:
    """What a user should know before relying on this law, in sentences."""
    said = found.cautions()
    if not found.has_its_level:  # which comes last
        said[-1] += f" For those make {math.ceil(found.interval.level / (1 - found.interval.level) - 1e-9)} runs."
    if (count := found.probe.prompts_count) < FEW_PROMPTS:
        said.append(
            f"KL was measured on {count} prompts, which are few: give more rows, {FEW_PROMPTS} held out at the least."
        )
    if (count := found.generic.count) < FEW_PROMPTS:
        said.append(
            f"The generic probe has {count} {'row' if count == 1 else 'rows'}, and fewer than {FEW_PROMPTS} are few: "
            "give more rows, or another probe (--generic FILE, self or paragraphs)."
        )
    if found.generic.prior is not None:
        said += found.generic.prior.cautions()
    points = law.distinct(table)
    if points["method"].n_unique() == 1:
        untested = (
            f"All runs are of one method, {points['method'][0]}: whether the law holds for another was not tested."
        )
        if found.forecaster.columns == (FORWARD,):
            untested += (
                " Laws of the new task's KL alone, as this one, did not carry over where that was tested: calibrate "
                "with the methods that you mean to use, or give a generic probe more like what you fear to lose."
            )
        said.append(untested)
    return said


def _noise(untuned: pl.DataFrame, of_fit: pl.DataFrame, outcomes: Outcomes) -> float | None:
    """The standard error of the largest drop that the law was fitted to; None where it is not known.

    By the items of that checkpoint, paired with the base's, where it is known of each what became of it. Else as if the
    two had been scored on different items: too large as a rule, and 0 of a base that is always right.
    """
    worst = of_fit.row(int(of_fit["forgetting"].arg_max() or 0), named=True)
    found = _paired_noise(untuned, worst, outcomes)
    return _unpaired_noise(untuned) if found is None else found


def _paired_noise(untuned: pl.DataFrame, worst: Mapping[str, Any], outcomes: Outcomes) -> float | None:
    """Half of the interval that holds as much as one standard error to each side; not 0 where no item differs."""
    if "run_id" not in worst:
        return None
    names = prior_names(untuned.columns)
    drops = {name: float(untuned[f"prior_{name}"].mean()) - worst[f"prior_{name}"] for name in names}  # type: ignore[arg-type]
    found = paired_drop(outcomes(worst["run_id"]), worst["step"], drops)
    if found is None:
        return None
    low, high = found.interval(ONE_ERROR)
    return (high - low) / 2 if math.isfinite(high - low) else None


def _unpaired_noise(untuned: pl.DataFrame) -> float | None:
    """As if base and checkpoint had been scored on different items.

    Tables of earlier versions have one also where a task had none, as if that task's score were exact.
    """
    known = {name for name in untuned.columns if name.endswith("_stderr") and untuned[name].null_count() == 0}
    tasks = {f"prior_{name}_stderr" for name in prior_names(untuned.columns)}
    if "prior_stderr" not in known or tasks & known not in (set(), tasks):
        return None
    error: Any = untuned["prior_stderr"].mean()
    return math.sqrt(2) * float(error) if error or tasks & known else None
