"""Which KL forecasts forgetting, across methods or only within one? For sweeps that measured KL on a generic probe."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.carry_over import (
    HOLDS,
    WHERE,
    ByMethod,
    CarryOver,
    beyond_others,
    departures,
    examine,
    gap,
    over_methods,
)
from rlrazor.analysis.forecast import FORWARD, PROBE, measured
from rlrazor.analysis.law import PredictorSummary
from rlrazor.analysis.statistics import Estimate, floats, mean_or, verdict
from rlrazor.report.drawing import PALETTE, Axis, Figure, Layer, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import across, base, clouds, height, laws, level, padded, spots
from rlrazor.report.measures import MEASURES
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import fit_cells
from rlrazor.report.text import NEVER, nats, number, percent, signed, written

TEXT = Path(__file__).with_suffix(".md")

# What the finding is about, then what is shown beside it.
MAIN = (FORWARD, "kl_reverse", "kl_correct", "kl_optimal", PROBE, "weight_l2")
BESIDE = (*(f"kl_{name}_per_token" for name in ("forward", "reverse", "correct", "probe")), "total_variation")
SHORT = {FORWARD: "forward KL", PROBE: "KL on the probe"}

Residuals = dict[str, dict[str | float, Estimate]]


def applies(study: Study) -> bool:
    """Whether the sweep measured KL on a generic probe."""
    return PROBE in study.table.columns


def section(study: Study, samples: int = 200) -> Section:
    """Every KL of the sweep and the weights' distance: R2 across and within methods, and forecasts of a new method."""
    tested = [examine(study.points, name, samples) for name in (*MAIN, *BESIDE) if name in study.points.columns]
    beyond = {column: residuals(study, column) for column in SHORT}
    of = {one.column: one.summary for one in tested}
    panels = [
        _law_panel(study, of[FORWARD], "On the new task", f"forward KL, {study.kl_unit}"),
        _law_panel(study, of[PROBE], "On a generic probe", f"KL on the probe, {study.kl_unit}"),
        _error_panel(tested),
        _residual_panel(study, beyond),
    ]
    numbers = {"unit": study.kl_unit, "share": f"{HOLDS:.0%}", "probe": str(study.description.get("probe", ""))}
    tables = [law_table(tested), forecast_table(tested), residual_table(study, beyond)]
    return told(study, TEXT, Shown(finding(tested), Figure("kl-laws", panels, columns=2), tables, numbers))


def finding(tested: Sequence[CarryOver]) -> str:
    """Which law holds where, and which beats guessing on a method that it was not fitted to, best first."""
    main = [one for one in sorted(tested, key=_error) if one.column in MAIN and one.r2]
    if not main:
        return "The sweep is too small to fit a law to any KL."
    where = {kind: [_name(one) for one in main if one.holds == kind] for kind in WHERE}
    holds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in where.items() if names)
    judged = [Judged(_name(one), one.gain, one.verdict) for one in main]
    return f"The law holds {holds}. On a method not in the fit, gain over guessing: {in_short(judged)}."


def residuals(study: Study, column: str) -> dict[str | float, Estimate]:
    """Method -> what it forgets beyond the law of the other methods in a KL."""
    return departures(measured(study.points, [column]), "method", partial(beyond_others, drift=column))


def law_table(tested: Sequence[CarryOver]) -> Keyed:
    """R2 across methods and within one, and where the law holds."""

    def within(one: CarryOver) -> str:
        found = list(one.within.values())
        return "{} ({} to {})".format(*map(number, (one.median_within, min(found), max(found)))) if found else NEVER

    columns = [
        Column[CarryOver]("quadratic", "quadratic R² [95 %]", lambda one: fit_cells(one.summary.quadratic)[0]),
        Column("monotone", "monotone R² [95 %]", lambda one: fit_cells(one.summary.saturating)[0]),
        Column("spearman", "Spearman", lambda one: number(one.summary.spearman)),
        Column("by-seed", "monotone R², by seed", lambda one: written(one.r2, number)),
        Column("within", "R² within a method", within),
        Column("holds", "law holds", lambda one: one.holds),
    ]
    return table_of(
        "Across methods and within one", "measure", {one.column: (_name(one), one) for one in tested}, columns
    )


def forecast_table(tested: Sequence[CarryOver]) -> Keyed:
    """How wrong each is on a method not in the fit, against guessing and against forward KL."""
    forward = next(one for one in tested if one.column == FORWARD)

    def lead(errors: ByMethod) -> Estimate | None:
        """How much smaller errors are than forward KL's."""
        return gap(forward.errors, errors)

    def told(lead: Estimate | None) -> str:
        return verdict(lead, len(forward.errors))

    columns = [
        Column[CarryOver](
            "quadratic-error", "quadratic", lambda one: percent(mean_or(over_methods(one.quadratic_errors), None))
        ),
        Column("error", "monotone", lambda one: one.error),
        Column("gain", "gain over guessing", lambda one: signed(one.gain)),
        Column("verdict", "against guessing", lambda one: one.verdict),
        Column("lead", "gain over forward KL", lambda one: NEVER if one is forward else signed(lead(one.errors))),
        Column("lead-verdict", "against forward KL", lambda one: NEVER if one is forward else told(lead(one.errors))),
    ]
    rows = {one.column: (_name(one), one) for one in sorted(tested, key=_error)}
    table = table_of("Left-out error, accuracy points", "measure", rows, columns)
    guess, ahead = over_methods(forward.guesses), lead(forward.guesses)
    cells = (percent(mean_or(guess, None)), written(guess), NEVER, NEVER, signed(ahead), told(ahead))
    guessing = ("guessing the mean", dict(zip(table.columns, cells, strict=True)))
    return replace(table, rows={**table.rows, "guessing": guessing})


def residual_table(study: Study, beyond: Residuals) -> Keyed:
    """What each method forgets beyond the law of the others."""

    def mean(method: str, column: str, form: Callable[[float], str]) -> str:
        return form(float(np.nanmean(floats(study.points.filter(pl.col("method") == method), column))))

    columns = [
        Column[str]("forgetting", "mean forgetting, %", partial(mean, column="forgetting", form=percent)),
        *(Column(name, f"mean {SHORT[name]}", partial(mean, column=name, form=nats)) for name in beyond),
        *(
            Column(f"{name}.residual", f"residual in {SHORT[name]}, points", found.get, signed)
            for name, found in beyond.items()
        ),
    ]
    title = "What each method forgets beyond the law of the others"
    return table_of(title, "method", {method: (study.label(method), method) for method in study.methods}, columns)


def _name(one: CarryOver) -> str:
    return MEASURES[one.column].label


def _error(one: CarryOver) -> float:
    return mean_or(one.error, np.inf)


# The figure


def _law_panel(study: Study, summary: PredictorSummary, title: str, x_label: str) -> Panel:
    """Forgetting against one KL, coloured by method, with both laws; the title has their R2."""
    layers = clouds(study, summary.predictor, "forgetting")
    x_range, y_range = padded(np.append(floats(study.points, summary.predictor), 0.0)), height(layers)
    layers += laws(summary, np.linspace(0.0, max(x_range[1], 0.0), 200))
    explained = [number(fit.r2) for fit in (summary.quadratic, summary.saturating) if fit]
    if summary.predictor in study.bases.columns:
        layers.append(base(study, summary.predictor, "forgetting"))
    title += f": R² {' / '.join(explained)}" if explained else ""
    return Panel(title, Axis(x_label, x_range, percent=False), Axis("forgetting", y_range), layers)


def _error_panel(tested: Sequence[CarryOver]) -> Panel:
    """A dot per measure with its interval over methods; the dashed line is guessing."""
    ranked = [one for one in sorted(tested, key=_error, reverse=True) if one.error]
    errors, style = [one.error for one in ranked], (PALETTE[0], "diamond")
    dots = spots("left-out error, mean over methods", errors, range(len(ranked)), style, along="x")
    return left_out_panel([_name(one) for one in ranked], [dots], over_methods(ranked[0].guesses) if ranked else None)


def left_out_panel(names: Sequence[str], dots: Sequence[Layer], guess: Estimate | None) -> Panel:
    """Errors of the monotone laws of the measures called so, from below; the dashed line is guessing."""
    axis = Axis.of(names, margin=0.6)
    guessing = [across("guessing the mean", 100 * guess.mean, axis.ends)] if guess else []
    error = Axis("left-out error of the monotone law, accuracy points", percent=False)
    return Panel("Asked about a method not in the fit", error, axis, [*dots, *guessing])


def _residual_panel(study: Study, beyond: Residuals) -> Panel:
    """Which methods lie above the law of the others, and which below: two dots per method."""
    layers: list[Layer] = []
    styles = ((PALETTE[1], "circle"), (PALETTE[2], "square"))
    for shift, (column, found), style in zip((-0.12, 0.12), beyond.items(), styles, strict=True):
        at = [index for index, method in enumerate(study.methods) if method in found]
        own = [found[study.methods[index]] for index in at]
        layers.append(spots(f"residual in {SHORT[column]}", own, np.array(at, float) + shift, style, along="y"))
    axis, (low, high) = Axis.of([study.label(method) for method in study.methods], margin=0.6), height(layers)
    layers.append(level("the others’ law", 0.0, axis.ends, "#777777"))
    beyond_law = Axis("forgetting beyond the law, points", (min(low, -0.1), max(high, 0.1)), percent=False)
    return Panel("More or less than the others’ law", axis, beyond_law, layers)
