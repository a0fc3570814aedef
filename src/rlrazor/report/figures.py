"""The sweep's two figures, described as data; `drawing` draws them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rlrazor.analysis import frontier
from rlrazor.analysis.statistics import floats
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Curve, Figure, Layer, Panel, Points, Range, as_html
from rlrazor.report.tables import Sweep, kl_unit_of
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
    color: str
    symbol: str
    points: pl.DataFrame
    size: float
    opacity: float

    def cloud(self, x: str, y: str, mask: NDArray[np.bool_] | None = None, **style: Any) -> Points:
        """The method's points, or those in `mask`, with column `x` against column `y`."""
        points = self.points if mask is None else self.points.filter(pl.Series(mask))
        style = {"label": self.label, "size": self.size, "opacity": self.opacity, **style}
        rows = _hover_rows(points)
        return Points(
            x=floats(points, x),
            y=floats(points, y),
            color=self.color,
            hover=HOVER.format(as_html(self.label)),
            rows=rows,
            symbol=self.symbol,
            **style,
        )


def trade_off_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 3: the frontiers, forgetting against KL with its laws, and new accuracy against KL."""
    methods = _methods(sweep)
    new, prior = (f"accuracy on {sweep.config[name]}" for name in ("new_task", "prior_task"))
    kl = f"forward KL on {sweep.config['new_task']}, {kl_unit_of(sweep.config)}"
    new_range, kl_range = _new_range(sweep), _padded(sweep.points, "kl_forward", (0.0,))
    prior_range = _padded(sweep.table, "prior")
    frontiers = [staircase(method.label, method.points, method.color) for method in methods]
    laws = [] if sweep.is_calibration else list(_laws(sweep, kl_range[1]))  # a calibration's is in its section
    return Figure(
        "fig3",
        [
            Panel(
                "Trade-off",
                f"{new} (new task)",
                prior,
                [
                    *(m.cloud("new", "prior") for m in methods),
                    *frontiers,
                    _base(sweep, "new", "prior"),
                ],
                new_range,
                prior_range,
            ),
            Panel(
                "Forgetting" if sweep.is_calibration else "Forgetting law",
                kl,
                f"forgetting (drop in {prior})",
                [
                    *(m.cloud("kl_forward", "forgetting") for m in methods),
                    *laws,
                    _base(sweep, "kl_forward", "forgetting"),
                ],
                kl_range,
                _padded(sweep.points, "forgetting", (0.0,)),
                x_percent=False,
            ),
            Panel(
                "Learning against drift",
                kl,
                f"{new} (new task)",
                [*(m.cloud("kl_forward", "new") for m in methods), _base(sweep, "kl_forward", "new")],
                kl_range,
                new_range,
                x_percent=False,
            ),
        ],
        columns=3,
        clipped=_below(sweep, new_range[0]),
    )


def frontier_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 6, a panel per method: which checkpoints make its trade-off curve."""
    methods = _methods(sweep)
    columns = ceil(len(methods) / ceil(len(methods) / 5))
    new_range, prior_range = _new_range(sweep), _padded(sweep.table, "prior")
    panels = []
    for index, method in enumerate(methods):
        new, prior = floats(method.points, "new"), floats(method.points, "prior")
        trade_off = frontier.trade_off_curve(new, prior)
        kept, pareto = trade_off.kept, trade_off.pareto
        layers: list[Layer] = [
            method.cloud("new", "prior", ~kept, label="farther below", opacity=method.opacity / 2),
            method.cloud("new", "prior", kept & ~pareto, label="within 2 points", opacity=0.9),
            method.cloud("new", "prior", pareto, label="Pareto set", size=1.5 * method.size, opacity=1, outlined=True),
        ]
        if trade_off.curve:
            x = np.linspace(new[kept].min(), new[kept].max(), 100)
            layers.append(Curve("trade-off curve", x, trade_off.curve.predict(x), INK))
        panels.append(
            Panel(
                method.label,
                f"accuracy on {sweep.config['new_task']}" if index + columns >= len(methods) else "",
                f"accuracy on {sweep.config['prior_task']}" if index % columns == 0 else "",
                layers,
                new_range,
                prior_range,
            )
        )
    return Figure("fig6", panels, columns, clipped=_below(sweep, new_range[0]))


def _methods(sweep: Sweep) -> list[_Method]:
    # A paper-sized sweep would be a solid mass at the size that suits a quick one.
    size, opacity = (4.0, 0.6) if len(sweep.points) < 2_000 else (2.2, 0.35)
    return [
        _Method(
            sweep.label(method),
            PALETTE[index % len(PALETTE)],
            SYMBOLS[index % len(SYMBOLS)],
            sweep.points.filter(pl.col("method") == method),
            size,
            opacity,
        )
        for index, method in enumerate(sweep.methods)
    ]


def _hover_rows(points: pl.DataFrame) -> list[tuple[Any, ...]]:
    return points.select(
        "lr",
        "schedule",
        "epochs",
        "seed",
        "step",
        pl.col("epoch").round(2),
        *(pl.col(name).round(4) for name in ("new", "prior", "forgetting", "kl_forward")),
    ).rows()


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
    rows = sweep.bases.select("seed", "new", "prior").rows()
    at = floats(sweep.bases, x), floats(sweep.bases, y)
    return Points("base", *at, INK, "star", BASE_HOVER, rows, size=11, opacity=1)


def _new_range(sweep: Sweep) -> Range:
    """From a little below the base up: what learnt nothing would squeeze the trade-offs into a corner."""
    base, top = float(sweep.bases["new"].to_numpy().min()), float(sweep.points["new"].to_numpy().max())
    if top <= base:
        return _padded(sweep.table, "new")
    return base - 0.1 * (top - base), top + 0.05 * (top - base)


def _below(sweep: Sweep, low: float) -> int:
    return sweep.points.filter(pl.col("new") < low).height


def _padded(table: pl.DataFrame, column: str, also: Sequence[float] = ()) -> Range:
    """The range of a column, and of `also`, with a margin."""
    values = np.append(floats(table, column), also)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin
