"""The figures: each is described once, as data, and drawn twice, by matplotlib for papers and plotly for the page."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from rlrazor import frontier
from rlrazor.records import JSON
from rlrazor.report.tables import Results, number
from rlrazor.store import atomic_path

Floats = NDArray[np.float64]
Range = tuple[float, float]

# Okabe and Ito's eight but for black, which is the laws' and the base's, and yellow, which is too pale; then mostly
# Tol's muted. No twelve colours stay apart for every eye, so neighbours differ in shape as well.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#999933", "#8C5A2B", "#332288", "#777777", "#44AA99"),
)
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down")
INK = "#222222"

BASE_HOVER = "<b>base</b>, seed %{customdata[0]}<br>new %{customdata[1]:.2%}, prior %{customdata[2]:.2%}<extra></extra>"
HOVER = (
    "<b>{}</b><br>lr %{{customdata[0]:.2~e}}, %{{customdata[1]}}, %{{customdata[2]}} epochs, seed %{{customdata[3]}}"
    "<br>step %{{customdata[4]}} (epoch %{{customdata[5]}})"
    "<br>new %{{customdata[6]:.2%}}, prior %{{customdata[7]:.2%}}"
    "<br>forgetting %{{customdata[8]:.2%}}, forward KL %{{customdata[9]}}<extra></extra>"
)


@dataclass(frozen=True, eq=False)
class Points:
    """A cloud of checkpoints. `hover` is plotly's template over `rows`, a row per point, which keeps the page small."""

    label: str
    x: Floats
    y: Floats
    color: str
    symbol: str
    hover: str
    rows: Sequence[Sequence[Any]]
    size: float
    opacity: float
    outlined: bool = False


@dataclass(frozen=True, eq=False)
class Curve:
    """A line. With `steps`, y at a point holds from the point before up to it: a Pareto staircase."""

    label: str
    x: Floats
    y: Floats
    color: str
    dashed: bool = False
    steps: bool = False


Layer = Points | Curve


@dataclass(frozen=True)
class Panel:
    """A pair of axes. Layers of one label, in any panel, are switched on and off together."""

    title: str
    x_label: str
    y_label: str
    layers: Sequence[Layer]
    x_range: Range
    y_range: Range
    x_percent: bool = True


@dataclass(frozen=True)
class Figure:
    """Panels in rows. `clipped` counts checkpoints whose new-task accuracy is below what the axes show."""

    name: str
    panels: Sequence[Panel]
    columns: int
    clipped: int

    @property
    def rows(self) -> int:
        """How many rows of panels."""
        return ceil(len(self.panels) / self.columns)

    @property
    def legend(self) -> Collection[Layer]:
        """The layers to show in the legend: the first of each label that is not empty."""
        first: dict[str, Layer] = {}
        for panel in self.panels:
            for layer in panel.layers:
                if layer.x.size:
                    first.setdefault(layer.label, layer)
        return set(first.values())


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
            x=_floats(points, x),
            y=_floats(points, y),
            color=self.color,
            hover=HOVER.format(self.label),
            rows=rows,
            symbol=self.symbol,
            **style,
        )


def trade_off_figure(results: Results) -> Figure:
    """RR's Fig. 3: the frontiers, forgetting against KL with its laws, and new accuracy against KL."""
    methods = _methods(results)
    new, prior = (f"{results.config[name]} accuracy" for name in ("new_task", "prior_task"))
    kl = f"forward KL on {results.config['new_task']}, nats"
    new_range, kl_range = _new_range(results), _padded(results.points, "kl_forward", (0.0,))
    prior_range = _padded(results.table, "prior")
    frontiers = [_frontier(method) for method in methods]
    laws = list(_laws(results, kl_range[1]))
    return Figure(
        "fig3",
        [
            Panel(
                "Trade-off",
                f"{new} (new task)",
                f"{prior} (prior task)",
                [
                    *(m.cloud("new", "prior") for m in methods),
                    *frontiers,
                    _base(results, "new", "prior"),
                ],
                new_range,
                prior_range,
            ),
            Panel(
                "Forgetting law",
                kl,
                f"forgetting (drop in {prior})",
                [
                    *(m.cloud("kl_forward", "forgetting") for m in methods),
                    *laws,
                    _base(results, "kl_forward", "forgetting"),
                ],
                kl_range,
                _padded(results.points, "forgetting", (0.0,)),
                x_percent=False,
            ),
            Panel(
                "Learning against drift",
                kl,
                f"{new} (new task)",
                [*(m.cloud("kl_forward", "new") for m in methods), _base(results, "kl_forward", "new")],
                kl_range,
                new_range,
                x_percent=False,
            ),
        ],
        columns=3,
        clipped=_below(results, new_range[0]),
    )


def frontier_figure(results: Results) -> Figure:
    """RR's Fig. 6, a panel per method: which checkpoints make its trade-off curve."""
    methods = _methods(results)
    columns = ceil(len(methods) / ceil(len(methods) / 5))
    new_range, prior_range = _new_range(results), _padded(results.table, "prior")
    panels = []
    for index, method in enumerate(methods):
        new, prior = _floats(method.points, "new"), _floats(method.points, "prior")
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
                f"{results.config['new_task']} accuracy" if index + columns >= len(methods) else "",
                f"{results.config['prior_task']} accuracy" if index % columns == 0 else "",
                layers,
                new_range,
                prior_range,
            )
        )
    return Figure("fig6", panels, columns, clipped=_below(results, new_range[0]))


def _methods(results: Results) -> list[_Method]:
    # A paper-sized sweep would be a solid mass at the size that suits a quick one.
    size, opacity = (4.0, 0.6) if len(results.points) < 2_000 else (2.2, 0.35)
    return [
        _Method(
            results.label(method),
            PALETTE[index % len(PALETTE)],
            SYMBOLS[index % len(SYMBOLS)],
            results.points.filter(pl.col("method") == method),
            size,
            opacity,
        )
        for index, method in enumerate(results.methods)
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


def _frontier(method: _Method) -> Curve:
    new, prior = _floats(method.points, "new"), _floats(method.points, "prior")
    on_frontier = frontier.pareto_set(new, prior)
    order = np.argsort(new[on_frontier])
    return Curve(method.label, new[on_frontier][order], prior[on_frontier][order], method.color, steps=True)


def _laws(results: Results, end: float) -> Iterator[Curve]:
    x = np.linspace(0, end, 200)
    summary = next(law for law in results.laws if law.predictor == "kl_forward")
    for name, fit in (("quadratic law", summary.quadratic), ("monotone law", summary.saturating)):
        if fit:
            label = f"{name}, R² = {number(fit.r2)}"
            yield Curve(label, x, fit.law.predict(x), INK, dashed=name == "monotone law")


def _base(results: Results, x: str, y: str) -> Points:
    rows = results.bases.select("seed", "new", "prior").rows()
    at = _floats(results.bases, x), _floats(results.bases, y)
    return Points("base", *at, INK, "star", BASE_HOVER, rows, size=11, opacity=1)


def _new_range(results: Results) -> Range:
    """From a little below the base up: what learnt nothing would squeeze the trade-offs into a corner."""
    base, top = float(results.bases["new"].to_numpy().min()), float(results.points["new"].to_numpy().max())
    if top <= base:
        return _padded(results.table, "new")
    return base - 0.1 * (top - base), top + 0.05 * (top - base)


def _below(results: Results, low: float) -> int:
    return results.points.filter(pl.col("new") < low).height


def _padded(table: pl.DataFrame, column: str, also: Sequence[float] = ()) -> Range:
    """The range of a column, and of `also`, with a margin."""
    values = np.append(_floats(table, column), also)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin


def _floats(table: pl.DataFrame, column: str) -> Floats:
    return table[column].cast(pl.Float64).to_numpy()


# matplotlib

_MARKERS: Mapping[str, str] = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "star": "*",
}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.12,
    "svg.hashsalt": "rlrazor",  # the same ids in the file each time
}


def save(figure: Figure, folder: Path) -> None:
    """Write the figure as PNG and SVG into `folder`; raises RazorError when it cannot be written."""
    with mpl.rc_context(_STYLE):
        drawing = _draw(figure)
        for kind in ("png", "svg"):
            with atomic_path(folder / f"{figure.name}.{kind}") as partial:
                drawing.savefig(partial, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)


def _draw(figure: Figure) -> Drawing:
    width, height = (4.0, 3.6) if figure.columns <= 3 else (2.7, 2.4)
    drawing = Drawing((width * figure.columns, height * figure.rows + 0.6), layout="constrained")
    axes = drawing.subplots(figure.rows, figure.columns, squeeze=False).ravel()
    legend = figure.legend
    for axis, panel in zip(axes, figure.panels, strict=False):
        _draw_panel(axis, panel, legend)
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    entries = {Line2D: HandlerLine2D(update_func=_legible)}
    drawing.legend(loc="outside lower center", ncols=7, frameon=False, handler_map=entries)
    return drawing


def _legible(entry: Line2D, layer: Line2D) -> None:
    """Style a legend entry as its layer, but not as small and faint as a point among thousands."""
    entry.update_from(layer)
    entry.set_markersize(8)
    entry.set_alpha(max(layer.get_alpha() or 1, 0.5))


def _percent(value: float, position: float) -> str:
    return f"{100 * value:.4g}%"


def _draw_panel(axis: Axes, panel: Panel, legend: Collection[Layer]) -> None:
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xlim=panel.x_range, ylim=panel.y_range)
    axis.yaxis.set_major_formatter(_percent)
    if panel.x_percent:
        axis.xaxis.set_major_formatter(_percent)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    for layer in panel.layers:
        label = layer.label if layer in legend else None
        if isinstance(layer, Curve):
            axis.plot(
                *(layer.x, layer.y),
                color=layer.color,
                linewidth=1.4,
                linestyle="--" if layer.dashed else "-",
                drawstyle="steps-pre" if layer.steps else "default",
                label=label,
            )
        else:
            axis.plot(
                *(layer.x, layer.y),
                color=layer.color,
                linestyle="none",
                marker=_MARKERS[layer.symbol],
                markersize=layer.size,
                markeredgecolor=INK if layer.outlined else "none",
                alpha=layer.opacity,
                label=label,
                rasterized=True,  # thousands of shapes would make the SVG megabytes
            )


# plotly


def to_html(figure: Figure, *, with_library: bool) -> str:
    """The figure as an interactive <div>; plotly.js comes along `with_library`, so that the page needs no network."""
    drawing = make_subplots(
        figure.rows,
        figure.columns,
        subplot_titles=[panel.title for panel in figure.panels],
        horizontal_spacing=0.25 / figure.columns,
    )
    legend = figure.legend
    for index, panel in enumerate(figure.panels):
        at = {"row": index // figure.columns + 1, "col": index % figure.columns + 1}
        drawing.add_traces(
            [_trace(layer, layer in legend) for layer in panel.layers],
            *([value] * len(panel.layers) for value in at.values()),
        )
        x_format = "~%" if panel.x_percent else None
        drawing.update_xaxes(title_text=panel.x_label, range=panel.x_range, tickformat=x_format, **at)
        drawing.update_yaxes(title_text=panel.y_label, range=panel.y_range, tickformat="~%", **at)
    drawing.update_layout(
        template="plotly_white",
        height=480 if figure.columns <= 3 else 250 * figure.rows + 130,
        margin={"l": 60, "r": 20, "t": 60, "b": 40},
        legend={"orientation": "h", "y": -0.2, "itemsizing": "constant", "itemwidth": 45},
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    html = drawing.to_html(
        full_html=False,
        include_plotlyjs=with_library,
        div_id=figure.name,  # not a random one
        config={"displaylogo": False, "responsive": True, "showSendToCloud": False},
    )
    return str(html)


def _trace(layer: Layer, in_legend: bool) -> JSON:
    # Single precision is more than the 10,000 test items have, and half the page.
    shared = {
        "type": "scatter",
        "x": layer.x.astype(np.float32),
        "y": layer.y.astype(np.float32),
        "name": layer.label,
        "legendgroup": layer.label,
        "showlegend": in_legend,
    }
    if isinstance(layer, Curve):
        dash, shape = "dash" if layer.dashed else "solid", "vh" if layer.steps else "linear"
        line = {"color": layer.color, "width": 2, "dash": dash, "shape": shape}
        return {**shared, "mode": "lines", "line": line, "hoverinfo": "skip"}
    marker = {
        "color": layer.color,
        "symbol": layer.symbol,
        "size": 1.3 * layer.size,  # points to pixels
        "opacity": layer.opacity,
        "line": {"color": INK, "width": 1 if layer.outlined else 0},
    }
    return {**shared, "mode": "markers", "marker": marker, "customdata": layer.rows, "hovertemplate": layer.hover}
