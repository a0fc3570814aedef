"""The sweep's two figures, described as data; `drawing` draws them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rlrazor.analysis import frontier
from rlrazor.analysis.statistics import floats
from rlrazor.report.drawing import (
    INK,
    PALETTE,
    SYMBOLS,
    Axis,
    Curve,
    Figure,
    Hover,
    Layer,
    Marker,
    Panel,
    Points,
    Range,
    as_html,
)
from rlrazor.report.sweep import Sweep
from rlrazor.report.text import number

BASE_HOVER = "<b>base</b>, seed %{customdata[0]}<br>new %{customdata[1]:.2%}, prior %{customdata[2]:.2%}<extra></extra>"
HOVER = (
    "<b>{}</b><br>lr %{{customdata[0]:.2~e}}, %{{customdata[1]}}, %{{customdata[2]}} epochs, seed %{{customdata[3]}}"
    "<br>step %{{customdata[4]}} (epoch %{{customdata[5]}})"
    "<br>new %{{customdata[6]:.2%}}, prior %{{customdata[7]:.2%}}"
    "<br>forgetting %{{customdata[8]:.2%}}, forward KL %{{customdata[9]}}<extra></extra>"
)


@dataclass(frozen=True)
class _Method:
    label: str
    points: pl.DataFrame
    marker: Marker

    def cloud(
        self, x: str, y: str, mask: NDArray[np.bool_] | None = None, label: str | None = None, **style: Any
    ) -> Points:
        """The method's points, or those in `mask`, with column `x` against column `y`."""
        points = self.points if mask is None else self.points.filter(pl.Series(mask))
        scores = [pl.col(name).round(4) for name in ("new", "prior", "forgetting", "kl_forward")]
        rows = points.select("lr", "schedule", "epochs", "seed", "step", pl.col("epoch").round(2), *scores).rows()
        hover = Hover(HOVER.format(as_html(self.label)), rows)
        at = floats(points, x), floats(points, y)
        return Points(label or self.label, *at, replace(self.marker, **style), hover)


def trade_off_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 3: the frontiers, forgetting against KL with its laws, and new accuracy against KL."""
    methods = _methods(sweep)

    def layers(x: str, y: str, *between: Curve) -> list[Layer]:
        return [*(method.cloud(x, y) for method in methods), *between, _base(sweep, x, y)]

    new_name, prior_name = (f"accuracy on {sweep.config[name]}" for name in ("new_task", "prior_task"))
    kl_name = f"forward KL on {sweep.config['new_task']}, {sweep.study.kl_unit}"
    new = Axis(f"{new_name} (new task)", _new_range(sweep))
    prior = Axis(prior_name, _padded(sweep.study.table, "prior"))
    kl = Axis(kl_name, kl_range := _padded(sweep.points, "kl_forward", (0.0,)), percent=False)
    drop = Axis(f"forgetting (drop in {prior_name})", _padded(sweep.points, "forgetting", (0.0,)))
    frontiers = [staircase(method.label, method.points, method.marker.color) for method in methods]
    laws = [] if sweep.is_calibration else list(_laws(sweep, kl_range[1]))  # a calibration's is in its section
    title = "Forgetting" if sweep.is_calibration else "Forgetting law"
    panels = [
        Panel("Trade-off", new, prior, layers("new", "prior", *frontiers)),
        Panel(title, kl, drop, layers("kl_forward", "forgetting", *laws)),
        Panel("Learning against drift", kl, new, layers("kl_forward", "new")),
    ]
    return Figure("fig3", panels, columns=3, clipped=_below(sweep))


def frontier_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 6, a panel per method: which checkpoints make its trade-off curve."""
    methods = _methods(sweep)
    columns = ceil(len(methods) / ceil(len(methods) / 5))
    new_range, prior_range = _new_range(sweep), _padded(sweep.study.table, "prior")
    panels = []
    for index, method in enumerate(methods):
        new, prior = floats(method.points, "new"), floats(method.points, "prior")
        trade_off = frontier.trade_off_curve(new, prior)
        kept, pareto, look = trade_off.kept, trade_off.pareto, method.marker
        layers: list[Layer] = [
            method.cloud("new", "prior", ~kept, "farther below", opacity=look.opacity / 2),
            method.cloud("new", "prior", kept & ~pareto, "within 2 points", opacity=0.9),
            method.cloud("new", "prior", pareto, "Pareto set", size=1.5 * look.size, opacity=1, outlined=True),
        ]
        if trade_off.curve:
            x = np.linspace(new[kept].min(), new[kept].max(), 100)
            layers.append(Curve("trade-off curve", x, trade_off.curve.predict(x), INK))
        x_label = f"accuracy on {sweep.config['new_task']}" if index + columns >= len(methods) else ""
        y_label = f"accuracy on {sweep.config['prior_task']}" if index % columns == 0 else ""
        panels.append(Panel(method.label, Axis(x_label, new_range), Axis(y_label, prior_range), layers))
    return Figure("fig6", panels, columns, clipped=_below(sweep))


def _methods(sweep: Sweep) -> list[_Method]:
    # A paper-sized sweep would be a solid mass at the size that suits a quick one.
    size, opacity = (4.0, 0.6) if len(sweep.points) < 2_000 else (2.2, 0.35)
    found = []
    for index, method in enumerate(sweep.study.methods):
        marker = Marker(PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)], size, opacity)
        found.append(_Method(sweep.study.label(method), sweep.points.filter(pl.col("method") == method), marker))
    return found


def staircase(label: str, points: pl.DataFrame, color: str) -> Curve:
    """The Pareto frontier of prior against new accuracy."""
    new, prior = floats(points, "new"), floats(points, "prior")
    best = frontier.pareto_set(new, prior)
    order = np.argsort(new[best])
    return Curve(label, new[best][order], prior[best][order], color, steps=True)


def _laws(sweep: Sweep, end: float) -> Iterator[Curve]:
    x = np.linspace(0, end, 200)
    summary = next(law for law in sweep.laws if law.predictor == "kl_forward")
    for name, fit in (("quadratic law", summary.quadratic), ("monotone law", summary.saturating)):
        if fit:
            label = f"{name}, R² = {number(fit.r2)}"
            yield Curve(label, x, fit.law.predict(x), INK, dashed=name == "monotone law")


def _base(sweep: Sweep, x: str, y: str) -> Points:
    rows = sweep.study.bases.select("seed", "new", "prior").rows()
    at = floats(sweep.study.bases, x), floats(sweep.study.bases, y)
    return Points("base", *at, Marker(INK, "star", size=11), Hover(BASE_HOVER, rows))


def _new_range(sweep: Sweep) -> Range:
    """From a little below the base up: what learnt nothing would squeeze the trade-offs into a corner."""
    base, top = float(sweep.study.bases["new"].to_numpy().min()), float(sweep.points["new"].to_numpy().max())
    if top <= base:
        return _padded(sweep.study.table, "new")
    return base - 0.1 * (top - base), top + 0.05 * (top - base)


def _below(sweep: Sweep) -> int:
    return sweep.points.filter(pl.col("new") < _new_range(sweep)[0]).height


def _padded(table: pl.DataFrame, column: str, also: Sequence[float] = ()) -> Range:
    """The range of a column, and of `also`, with a margin."""
    values = np.append(floats(table, column), also)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin
