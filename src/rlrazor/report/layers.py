"""Layers that sections share: clouds of checkpoints, frontiers, the base, means with intervals."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl

from rlrazor.analysis.law import LawSummary, PredictorSummary
from rlrazor.analysis.statistics import Estimate, floats
from rlrazor.report.drawing import (
    INK,
    WHITE,
    Curve,
    Floats,
    Hover,
    Interval,
    Layer,
    Marker,
    Points,
    Range,
    as_html,
    style_of,
)
from rlrazor.report.study import Study
from rlrazor.report.text import number

_HOVER = (
    "<b>{}</b><br>lr %{{customdata[0]:.2~e}}, %{{customdata[1]}}, %{{customdata[2]}} epochs, seed %{{customdata[3]}}"
    "<br>step %{{customdata[4]}} (epoch %{{customdata[5]}})"
    "<br>new %{{customdata[6]:.2%}}, prior %{{customdata[7]:.2%}}"
    "<br>forgetting %{{customdata[8]:.2%}}, forward KL %{{customdata[9]}}<extra></extra>"
)
_BASE_HOVER = (
    "<b>base</b>, seed %{customdata[0]}<br>new %{customdata[1]:.2%}, prior %{customdata[2]:.2%}<extra></extra>"
)


def cloud(label: str, points: pl.DataFrame, x: str, y: str, color: str, symbol: str, **style: Any) -> Points:
    """Checkpoints with column `x` against column `y`; hovering tells the run."""
    scores = [pl.col(name).round(4) for name in ("new", "prior", "forgetting", "kl_forward")]
    rows = points.select("lr", "schedule", "epochs", "seed", "step", pl.col("epoch").round(2), *scores).rows()
    marker = Marker(color, symbol, **{"size": 4.5, "opacity": 0.65, **style})
    return Points(label, floats(points, x), floats(points, y), marker, Hover(_HOVER.format(as_html(label)), rows))


def clouds(study: Study, x: str, y: str, **style: Any) -> list[Layer]:
    """The checkpoints of each method."""
    return [
        cloud(study.label(method), study.points.filter(pl.col("method") == method), x, y, *style_of(index), **style)
        for index, method in enumerate(study.methods)
    ]


def laws(fits: PredictorSummary, x: Floats, *, with_r2: bool = False) -> list[Layer]:
    """Both laws over `x`, as far as they could be fitted; the names may tell R2."""
    found = {"quadratic": fits.quadratic, "monotone": fits.saturating}
    return [
        Curve(
            f"{name} law" + (f", R² = {number(fit.r2)}" if with_r2 else ""),
            x,
            fit.law.predict(x),
            INK,
            dashed=name == "monotone",
        )
        for name, fit in found.items()
        if fit
    ]


def base(study: Study, x: str, y: str) -> Points:
    """The untuned policies, a star for each seed."""
    hover = Hover(_BASE_HOVER, study.bases.select("seed", "new", "prior").rows())
    return Points("base", floats(study.bases, x), floats(study.bases, y), Marker(INK, "star", size=11.0), hover)


def means(
    label: str,
    values: Sequence[Estimate | None],
    at: Sequence[float] | Floats,
    style: tuple[str, str],
    along: Literal["x", "y"] = "y",
    *,
    line: bool = False,
) -> Points:
    """Means with their intervals, `along` an axis, perhaps on a line; `at` are their places on the other."""
    mean = np.array([one.mean if one else np.nan for one in values], float)
    half = np.array([one.half if one else np.nan for one in values], float)
    x, y = (mean, np.asarray(at, float)) if along == "x" else (np.asarray(at, float), mean)
    return Points(label, x, y, Marker(*style, size=7.5, line=line), interval=Interval(mean - half, mean + half, along))


def r2s(label: str, fits: Sequence[LawSummary | None], at: Floats, marker: Marker) -> Points:
    """R2 of laws, mean and standard deviation over seeds, at the places `at`; with one seed, R2 of all checkpoints."""
    found = [fit and (fit.r2 if fit.r2_seed_mean is None else fit.r2_seed_mean) for fit in fits]
    mean, half = np.array(found, float), np.array([fit.r2_seed_sd if fit else None for fit in fits], float)
    return Points(label, mean, at, marker, interval=Interval(mean - half, mean + half, "x"))


def spots(
    label: str,
    values: Sequence[Estimate | None],
    at: Sequence[float] | Floats,
    style: tuple[str, str],
    along: Literal["x", "y"],
) -> Points:
    """The same in per cent or points, on an axis that says so."""
    return means(label, [one and one.times(100) for one in values], at, style, along)


def across(label: str, x: float, ends: Range) -> Curve:
    """A dashed line upwards, to compare with."""
    return Curve(label, np.array([x, x]), np.array(ends), INK, dashed=True)


def level(label: str, y: float, across: Range, color: str = INK) -> Curve:
    """A dashed line across, to compare with."""
    return Curve(label, np.array(across), np.array([y, y]), color, dashed=True)


def never(label: str, names: Sequence[str], x: Sequence[float], y: float) -> Points:
    """Marks at the edge of a panel for those, called `names`, that never get to where they could be compared."""
    hover = f"<b>%{{customdata[0]}}</b><br>{as_html(label)}<extra></extra>"
    places = np.asarray(x, float), np.full(len(x), y)
    return Points(
        label,
        *places,
        Marker(WHITE, "triangle-down", size=7.0, outlined=True),
        hover=Hover(hover, [[name] for name in names]),
    )


def height(layers: Sequence[Layer]) -> Range:
    """The range of the layers' y, with a margin; without intervals, since one of few seeds could fill the panel."""
    return padded(_all_y(layers))


def share_height(layers: Sequence[Layer]) -> Range:
    """The range of the layers' y, shares of 1, with a margin and with their intervals as far as these are shares."""
    intervals = [layer.interval for layer in layers if isinstance(layer, Points) and layer.interval]
    ends = [end.clip(0, 1) for one in intervals for end in (one.low, one.high)]
    low, high = padded(np.concatenate([_all_y(layers), *ends]))
    return max(low, -0.04), min(high, 1.04)


def log_height(layers: Sequence[Layer]) -> Range:
    """The range of what is positive, for a logarithmic axis; (0.1, 1) where nothing is."""
    values = _all_y(layers)
    positive = values[values > 0]
    return (float(positive.min()) / 2, float(positive.max()) * 2) if positive.size else (0.1, 1.0)


def _all_y(layers: Sequence[Layer]) -> Floats:
    return np.concatenate([np.zeros(0), *(layer.y for layer in layers)])


def padded(values: Floats) -> Range:
    """The range of what is finite, with a margin; (0, 1) where nothing is."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = 0.12 * (high - low) if high > low else max(0.1 * abs(high), 0.01)
    return low - margin, high + margin


def learnt(study: Study) -> Range:
    """New-task accuracy from a little below the base up: what learnt nothing would squeeze the rest into a corner."""
    low, high = float(np.nanmin(floats(study.bases, "new"))), float(np.nanmax(floats(study.points, "new")))
    return (low - 0.1 * (high - low), high + 0.05 * (high - low)) if high > low else padded(floats(study.table, "new"))
