"""Which KL forecasts forgetting, across methods or only within one? For sweeps that measured KL on a generic probe."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.law import PredictorSummary
from rlrazor.analysis.statistics import Estimate, floats, verdict
from rlrazor.analysis.transfer import HOLDS, WHERE, ByMethod, Transfer, examine, gap, over_methods, residuals
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Axis, Curve, Figure, Layer, Panel
from rlrazor.report.keyed import Judged, Keyed, in_short
from rlrazor.report.layers import across, base, cloud, height, level, padded, spots
from rlrazor.report.measures import MEASURES
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import fit_cells
from rlrazor.report.text import NEVER, nats, number, percent, signed, written

TEXT = Path(__file__).with_suffix(".md")

FORWARD, PROBE = "kl_forward", "kl_probe"
# What the finding is about, then what is shown beside it.
MAIN = (FORWARD, "kl_reverse", "kl_correct", "kl_optimal", PROBE, "weight_l2")
BESIDE = (*(f"kl_{name}_per_token" for name in ("forward", "reverse", "correct", "probe")), "total_variation")
SHORT = {FORWARD: "forward KL", PROBE: "KL on the probe"}

Residuals = dict[str, dict[str, Estimate]]


def applies(study: Study) -> bool:
    """Whether the sweep measured KL on a generic probe."""
    return PROBE in study.table.columns


def section(study: Study, samples: int = 200) -> Section:
    """Every KL of the sweep and the weights' distance: R2 across and within methods, and forecasts of a new method."""
    tested = [examine(study.points, name, samples) for name in (*MAIN, *BESIDE) if name in study.points.columns]
    beyond = {column: residuals(study.points, column) for column in SHORT}
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


def finding(tested: Sequence[Transfer]) -> str:
    """Which law holds where, and which beats guessing on a method that it was not fitted to, best first."""
    main = [one for one in sorted(tested, key=_error) if one.column in MAIN and one.r2]
    if not main:
        return "The sweep is too small to fit a law to any KL."
    where = {kind: [_name(one) for one in main if one.holds == kind] for kind in WHERE}
    holds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in where.items() if names)
    judged = [Judged(_name(one), one.gain, one.verdict) for one in main]
    return f"The law holds {holds}. On a method not in the fit, gain over guessing: {in_short(judged)}."


def law_table(tested: Sequence[Transfer]) -> Keyed:
    """R2 across methods and within one, and where the law holds."""
    columns = {
        "quadratic": "quadratic R² [95 %]",
        "monotone": "monotone R² [95 %]",
        "spearman": "Spearman",
        "by-seed": "monotone R², by seed",
        "within": "R² within a method",
        "holds": "law holds",
    }
    rows = {}
    for one in tested:
        within = list(one.within.values())
        spread = (one.median_within, min(within), max(within)) if within else ()
        rows[one.column] = (
            _name(one),
            {
                "quadratic": fit_cells(one.summary.quadratic)[0],
                "monotone": fit_cells(one.summary.saturating)[0],
                "spearman": number(one.summary.spearman),
                "by-seed": written(one.r2, number).replace("-", "−"),
                "within": "{} ({} to {})".format(*map(number, spread)).replace("-", "−") if spread else NEVER,
                "holds": one.holds,
            },
        )
    return Keyed("Across methods and within one", "measure", columns, rows)


def forecast_table(tested: Sequence[Transfer]) -> Keyed:
    """How wrong each is on a method not in the fit, against guessing and against forward KL."""
    forward = next(one for one in tested if one.column == FORWARD)
    columns = {
        "quadratic-error": "quadratic",
        "error": "monotone",
        "gain": "gain over guessing",
        "verdict": "against guessing",
        "lead": "gain over forward KL",
        "lead-verdict": "against forward KL",
    }
    rows = {}
    for one in sorted(tested, key=_error):
        cells = (percent(_mean(over_methods(one.quadratic_errors))), written(one.error))
        beaten = (signed(one.gain), str(one.verdict))
        rows[one.column] = (_name(one), (*cells, *beaten, *_lead(forward, None if one is forward else one.errors)))
    guess = over_methods(forward.guesses)
    rows["guessing"] = (
        "guessing the mean",
        (percent(_mean(guess)), written(guess), NEVER, NEVER, *_lead(forward, forward.guesses)),
    )
    named = {key: (name, dict(zip(columns, cells, strict=True))) for key, (name, cells) in rows.items()}
    return Keyed("Left-out error, accuracy points", "measure", columns, named)


def _lead(forward: Transfer, errors: ByMethod | None) -> tuple[str, str]:
    """How much smaller errors are than forward KL's, and the verdict; of forward KL itself nothing."""
    if errors is None:
        return NEVER, NEVER
    lead = gap(forward.errors, errors)
    return signed(lead), str(verdict(lead, len(forward.errors)))


def residual_table(study: Study, beyond: Residuals) -> Keyed:
    """What each method forgets beyond the law of the others."""
    columns = {"forgetting": "mean forgetting, %", **{name: f"mean {SHORT[name]}" for name in beyond}}
    columns |= {f"{name}.residual": f"residual in {SHORT[name]}, points" for name in beyond}
    rows = {}
    for method in study.methods:
        own = study.points.filter(pl.col("method") == method)
        cells = {"forgetting": percent(floats(own, "forgetting").mean())}
        for name, found in beyond.items():
            cells[name] = nats(float(np.nanmean(floats(own, name))))
            cells[f"{name}.residual"] = signed(found.get(method))
        rows[method] = (study.label(method), cells)
    return Keyed("What each method forgets beyond the law of the others", "method", columns, rows)


def _name(one: Transfer) -> str:
    return MEASURES[one.column].label


def _mean(estimate: Estimate | None) -> float | None:
    return estimate.mean if estimate else None


def _error(one: Transfer) -> float:
    return one.error.mean if one.error else np.inf


# The figure


def _law_panel(study: Study, summary: PredictorSummary, title: str, x_label: str) -> Panel:
    """Forgetting against one KL, coloured by method, with both laws; the title has their R2."""
    layers: list[Layer] = []
    for index, method in enumerate(study.methods):
        own = study.points.filter(pl.col("method") == method)
        style = PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]
        layers.append(cloud(study.label(method), own, summary.predictor, "forgetting", *style))
    x_range, y_range = padded(np.append(floats(study.points, summary.predictor), 0.0)), height(layers)
    x = np.linspace(0.0, max(x_range[1], 0.0), 200)
    explained = []
    for name, fit in (("quadratic", summary.quadratic), ("monotone", summary.saturating)):
        if fit:
            layers.append(Curve(f"{name} law", x, fit.law.predict(x), INK, dashed=name == "monotone"))
            explained.append(number(fit.r2))
    if summary.predictor in study.bases.columns:
        layers.append(base(study, summary.predictor, "forgetting"))
    title += f": R² {' / '.join(explained)}" if explained else ""
    return Panel(title, Axis(x_label, x_range, percent=False), Axis("forgetting", y_range), layers)


def _error_panel(tested: Sequence[Transfer]) -> Panel:
    """A dot per measure with its interval over methods; the dashed line is guessing."""
    ranked = [one for one in sorted(tested, key=_error, reverse=True) if one.error]
    rows, places = (-0.6, len(ranked) - 0.4), np.arange(len(ranked), dtype=float)
    style = PALETTE[0], "diamond"
    layers: list[Layer] = [
        spots("left-out error, mean over methods", [one.error for one in ranked], places, style, along="x")
    ]
    guess = over_methods(ranked[0].guesses) if ranked else None
    if guess:
        layers.append(across("guessing the mean", 100 * guess.mean, rows))
    return Panel(
        "Asked about a method not in the fit",
        Axis("left-out error of the monotone law, accuracy points", percent=False),
        Axis("", rows, percent=False, ticks=[(float(place), _name(one)) for place, one in enumerate(ranked)] or None),
        layers,
    )


def _residual_panel(study: Study, beyond: Residuals) -> Panel:
    """Which methods lie above the law of the others, and which below: two dots per method."""
    layers: list[Layer] = []
    styles = ((PALETTE[1], "circle"), (PALETTE[2], "square"))
    for shift, (column, found), style in zip((-0.12, 0.12), beyond.items(), styles, strict=True):
        at = [index for index, method in enumerate(study.methods) if method in found]
        own = [found[study.methods[index]] for index in at]
        layers.append(spots(f"residual in {SHORT[column]}", own, np.array(at, float) + shift, style, along="y"))
    edges, (low, high) = (-0.6, len(study.methods) - 0.4), height(layers)
    layers.append(level("the others’ law", 0.0, edges, "#777777"))
    return Panel(
        "More or less than the others’ law",
        Axis(
            "",
            edges,
            percent=False,
            ticks=[(float(index), study.label(method)) for index, method in enumerate(study.methods)],
        ),
        Axis("forgetting beyond the law, points", (min(low, -0.1), max(high, 0.1)), percent=False),
        layers,
    )
