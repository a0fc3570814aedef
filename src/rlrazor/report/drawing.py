"""What a figure is, as data, and its two drawings: matplotlib's for papers, plotly's for the page.

A `Figure` has `Panel`s, a panel has layers: `Points` and `Curve`s. Describe it once, then `save` it and put `to_html`
on a page. Values that are not finite are left out by both.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from rlrazor.runs.records import JSON
from rlrazor.system.terminal import printable
from rlrazor.system.writing import GENERATOR, atomic_path

Floats = NDArray[np.float64]
Range = tuple[float, float]
Ticks = Sequence[tuple[float, str]]

# Okabe and Ito's eight but for black, which is the laws' and the base's, and yellow, which is too pale; then mostly
# Tol's muted. No twelve colours stay apart for every eye, so neighbours differ in shape as well.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#999933", "#8C5A2B", "#332288", "#777777", "#44AA99"),
)
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down")
INK = "#222222"
LONGEST = 120  # characters of a label: a folder's name may have 255
WHITE = "#ffffff"  # with `outlined`, a hollow marker

PIXELS_PER_INCH = 480 / 4.2  # of the page's figures and of the files': a row of panels is as high in both


@dataclass(frozen=True, eq=False)
class Points:
    """A cloud of points, by default with a hover that tells x and y.

    `hover` is plotly's template over `rows`, a row per point, which keeps the page small. `error_low` and `error_high`
    are the ends of each point's interval, on the axis of `error_along` and in its units; NaN: none. `line` connects the
    points in their order.
    """

    label: str
    x: Floats
    y: Floats
    color: str
    symbol: str = "circle"
    hover: str | None = None
    rows: Sequence[Sequence[Any]] = ()
    size: float = 6.0
    opacity: float = 1.0
    outlined: bool = False
    error_low: Floats | None = None
    error_high: Floats | None = None
    error_along: Literal["x", "y"] = "y"
    line: bool = False

    @property
    def interval(self) -> tuple[Floats, Floats] | None:
        """Both ends of each point's interval, if the points have any."""
        return None if self.error_low is None or self.error_high is None else (self.error_low, self.error_high)


@dataclass(frozen=True, eq=False)
class Curve:
    """A line. With `steps`, y at a point holds from the point before up to it: a Pareto staircase.

    `band` is (low, high), of the shape of `y`: shaded around the line, and never with `steps`.
    """

    label: str
    x: Floats
    y: Floats
    color: str
    dashed: bool = False
    steps: bool = False
    band: tuple[Floats, Floats] | None = None


Layer = Points | Curve


@dataclass(frozen=True)
class Panel:
    """A pair of axes. Layers of one label, in any panel, are switched on and off together.

    A range of None comes from the data. `x_ticks` and `y_ticks` name places on an axis: its categories. `equal` gives
    both axes one scale and hides them, for a drawing such as the simplex. `texts` are written at (x, y) of the data.
    """

    title: str
    x_label: str
    y_label: str
    layers: Sequence[Layer]
    x_range: Range | None = None
    y_range: Range | None = None
    x_percent: bool = True
    y_percent: bool = True
    x_log: bool = False
    y_log: bool = False
    x_ticks: Ticks | None = None
    y_ticks: Ticks | None = None
    equal: bool = False
    texts: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Figure:
    """Panels in rows. `clipped` counts checkpoints whose new-task accuracy is below what the axes show.

    `height`, in pixels, is for a figure that needs another one than its rows suggest.
    """

    name: str
    panels: Sequence[Panel]
    columns: int
    clipped: int = 0
    height: int | None = None

    @property
    def rows(self) -> int:
        """How many rows of panels."""
        return ceil(len(self.panels) / self.columns)

    @property
    def legend(self) -> set[Layer]:
        """The layers to show in the legend: the first of each label that is not empty. A layer may have no label."""
        first: dict[str, Layer] = {}
        for panel in self.panels:
            for layer in panel.layers:
                if layer.x.size and layer.label:
                    first.setdefault(layer.label, layer)
        return set(first.values())


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


FigureKind = Literal["png", "svg"]
KINDS: tuple[FigureKind, ...] = ("png", "svg")
_METADATA: Mapping[FigureKind, Any] = {  # by which the files are known as ours
    "png": {"Software": GENERATOR},
    "svg": {"Title": GENERATOR, "Date": None},
}


def save(figure: Figure, folder: Path, kinds: Sequence[FigureKind] = KINDS, dpi: int = 200) -> None:
    """Write the figure, in each of `kinds`, into `folder`; raises RazorError when it cannot be written."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks; one so long that it leaves no room.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|constrained_layout not applied|Tight layout")
        drawing = draw(figure)
        for path, kind in files([figure.name], folder, kinds):
            with atomic_path(path, kind) as partial:
                drawing.savefig(partial, format=kind, dpi=dpi, metadata=_METADATA[kind])


def files(names: Iterable[str], folder: Path, kinds: Sequence[FigureKind] = KINDS) -> list[tuple[Path, FigureKind]]:
    """The files that the figures of these names are saved in."""
    return [(folder / f"{name}.{kind}", kind) for name in names for kind in kinds]


def draw(figure: Figure) -> Drawing:
    """The figure as matplotlib's."""
    width, height = {1: (8.0, 3.6), 2: (5.5, 3.6), 3: (4.0, 3.6)}.get(figure.columns, (2.7, 2.4))
    width *= figure.columns
    height = figure.height / PIXELS_PER_INCH if figure.height else height * figure.rows + 0.6
    drawing = Drawing((width, height), layout="constrained")
    axes = drawing.subplots(figure.rows, figure.columns, squeeze=False).ravel()
    legend = figure.legend
    missing = set(legend)
    for axis, panel in zip(axes, figure.panels, strict=False):
        _draw_panel(axis, panel, missing)
        missing -= set(panel.layers)  # a layer may be in several panels
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    if legend:
        entries = {Line2D: HandlerLine2D(update_func=_legible)}
        longest = max(len(layer.label) for layer in legend)
        columns = min(7, int(width / (1.5 if longest <= 26 else 0.5 + 0.075 * longest)))
        drawing.legend(loc="outside lower center", ncols=max(columns, 1), frameon=False, handler_map=entries)
    return drawing


def _literal(text: str) -> str:
    """Text as matplotlib shows it as it is: two dollars would begin and end a formula, and a page has no room in it."""
    return _shortened(printable(text)).replace("$", r"\$")


def _entry(label: str) -> str:
    """A label as the legend shows it: one that begins with an underscore would be left out."""
    return f" {_literal(label)}" if label.startswith("_") else _literal(label)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def _words(panel: Panel) -> dict[str, str]:
    return {"title": panel.title, "xlabel": panel.x_label, "ylabel": panel.y_label}


def _places_and_names(ticks: Ticks, shown: Callable[[str], str]) -> tuple[list[float], list[str]]:
    return [place for place, _ in ticks], [shown(name) for _, name in ticks]


def _legible(entry: Line2D, layer: Line2D) -> None:
    """Style a legend entry as its layer, but not as small and faint as a point among thousands."""
    entry.update_from(layer)
    entry.set_markersize(8)
    entry.set_alpha(max(layer.get_alpha() or 1, 0.5))


def _percent(value: float, position: float) -> str:
    return f"{100 * value:.4g}%"


def _draw_panel(axis: Axes, panel: Panel, legend: Collection[Layer]) -> None:
    axis.set(**{name: _literal(text) for name, text in _words(panel).items()})
    axis.grid(color="#e6e6e6", linewidth=0.6)
    for layer in panel.layers:
        label = _entry(layer.label) if layer in legend else None
        if isinstance(layer, Curve):
            _draw_curve(axis, layer, label)
        else:
            _draw_points(axis, layer, label)
    for x, y, text in panel.texts:
        axis.annotate(_literal(text), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    _draw_axes(axis, panel)


def _draw_curve(axis: Axes, layer: Curve, label: str | None) -> None:
    if layer.band:
        axis.fill_between(layer.x, *layer.band, color=layer.color, alpha=0.15, linewidth=0)
    axis.plot(
        *(layer.x, layer.y),
        color=layer.color,
        linewidth=1.4,
        linestyle="--" if layer.dashed else "-",
        drawstyle="steps-pre" if layer.steps else "default",
        label=label,
    )


def _draw_points(axis: Axes, layer: Points, label: str | None) -> None:
    if layer.interval:
        low, high = layer.interval
        # From the middle of the interval, which a bootstrap's need not have its point in.
        at: Any = {"x": layer.x, "y": layer.y, layer.error_along: (low + high) / 2}
        at[f"{layer.error_along}err"] = (high - low) / 2
        axis.errorbar(**at, fmt="none", ecolor=_ink_of(layer), elinewidth=1, capsize=2)
    axis.plot(
        *(layer.x, layer.y),
        color=layer.color,
        linestyle="-" if layer.line else "none",
        linewidth=1.2,
        marker=_MARKERS[layer.symbol],
        markersize=layer.size,
        markeredgecolor=INK if layer.outlined else "none",
        alpha=layer.opacity,
        label=label,
        rasterized=True,  # thousands of shapes would make the SVG megabytes
    )


def _draw_axes(axis: Axes, panel: Panel) -> None:
    if panel.x_log:
        axis.set_xscale("log")
    if panel.y_log:
        axis.set_yscale("log")
    if panel.x_percent:
        axis.xaxis.set_major_formatter(_percent)
    if panel.y_percent:
        axis.yaxis.set_major_formatter(_percent)
    if panel.x_ticks:
        rotation = 40 if _crowded(panel.x_ticks) else 0
        places, names = _places_and_names(panel.x_ticks, _literal)
        axis.set_xticks(places, names, rotation=rotation, ha="right" if rotation else "center")
    if panel.y_ticks:
        axis.set_yticks(*_places_and_names(panel.y_ticks, _literal))
    if panel.x_range:
        axis.set_xlim(panel.x_range)
    if panel.y_range:
        axis.set_ylim(panel.y_range)
    if panel.equal:
        axis.set_aspect("equal")
        axis.axis("off")


def _crowded(ticks: Ticks) -> bool:
    """Whether the names of an x-axis' categories have to be turned to fit."""
    return sum(len(name) + 2 for _, name in ticks) > 50


def _ink_of(layer: Points) -> str:
    """What a layer's lines are drawn with: its colour, unless that is the paper's."""
    return INK if layer.color == WHITE else layer.color


# plotly


def as_html(text: str) -> str:
    """Text as plotly shows it as it is: it takes labels, and what hovering tells, for HTML with places to fill in."""
    return escape(_shortened(printable(text)), quote=False).replace("%{", "%&#123;")


def to_html(figure: Figure, *, with_library: bool) -> str:
    """The figure as an interactive <div>; plotly.js comes along `with_library`, so that the page needs no network."""
    html = interactive(figure).to_html(
        full_html=False,
        include_plotlyjs=with_library,
        div_id=f"figure-{figure.name}",  # not a random one, nor the anchor of a section
        config={"displaylogo": False, "responsive": True, "showSendToCloud": False},
    )
    return str(html)


def interactive(figure: Figure) -> Any:
    """The figure as plotly's."""
    drawing = make_subplots(
        figure.rows,
        figure.columns,
        subplot_titles=[as_html(panel.title) for panel in figure.panels],
        horizontal_spacing=0.25 / figure.columns,
    )
    missing = figure.legend
    for index, panel in enumerate(figure.panels):
        at = {"row": index // figure.columns + 1, "col": index % figure.columns + 1}
        traces = list(chain.from_iterable(_traces(layer, panel, layer in missing) for layer in panel.layers))
        missing -= set(panel.layers)  # a layer may be in several panels
        if panel.texts:
            traces.append(_text_trace(panel))
        drawing.add_traces(traces, *([value] * len(traces) for value in at.values()))
        drawing.update_xaxes(**_axis(panel.x_label, panel.x_range, panel.x_percent, panel.x_log, panel.x_ticks), **at)
        drawing.update_yaxes(**_axis(panel.y_label, panel.y_range, panel.y_percent, panel.y_log, panel.y_ticks), **at)
        if panel.equal:
            drawing.update_xaxes(visible=False, **at)
            drawing.update_yaxes(visible=False, scaleanchor=f"x{index + 1 if index else ''}", **at)
    height = figure.height or (400 * figure.rows + 80 if figure.columns <= 3 else 250 * figure.rows + 130)
    drawing.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 40},
        legend={
            "orientation": "h",
            "y": _legend_place(figure, height),
            "itemsizing": "constant",
            "itemwidth": 45,
        },
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    return drawing


def _legend_place(figure: Figure, height: int) -> float:
    """Where the legend's top is: below the axes' labels, in heights of the plot."""
    names = [name for panel in figure.panels[-figure.columns :] for _, name in panel.x_ticks or ()]
    turned = any(panel.x_ticks and _crowded(panel.x_ticks) for panel in figure.panels)
    if not names and figure.height is None and (figure.rows == 1 or figure.columns > 3):
        return -0.2
    below = 70 + (4.5 * max(map(len, names)) if turned and names else 0)  # pixels: an axis title, and turned names
    return -below / max(height - 100 - below, 100)


def _axis(label: str, limits: Range | None, percent: bool, log: bool, ticks: Ticks | None) -> JSON:
    axis: JSON = {"title_text": as_html(label), "range": limits, "tickformat": "~%" if percent else None}
    if log:
        axis |= {"type": "log", "range": None if limits is None else [float(np.log10(end)) for end in limits]}
        axis |= {"dtick": 1, "minor": {"ticks": "outside", "dtick": "D1"}}
    if ticks:
        places, names = _places_and_names(ticks, as_html)
        axis |= {"tickmode": "array", "tickvals": places, "ticktext": names, "tickformat": None, "automargin": True}
    return axis


def _traces(layer: Layer, panel: Panel, in_legend: bool) -> list[JSON]:
    # Single precision is more than the 10,000 test items have, and half the page.
    x, y = layer.x.astype(np.float32), layer.y.astype(np.float32)
    shared = {
        "type": "scatter",
        "x": x,
        "y": y,
        "name": as_html(layer.label),
        "legendgroup": as_html(layer.label),
        "showlegend": in_legend,
    }
    if isinstance(layer, Curve):
        dash, shape = "dash" if layer.dashed else "solid", "vh" if layer.steps else "linear"
        line = {"color": layer.color, "width": 2, "dash": dash, "shape": shape}
        trace = {**shared, "mode": "lines", "line": line, "hoverinfo": "skip"}
        return [*_band_traces(layer, shared), trace]
    marker = {
        "color": layer.color,
        "symbol": layer.symbol,
        "size": 1.3 * layer.size,  # points to pixels
        "opacity": layer.opacity,
        "line": {"color": INK, "width": 1 if layer.outlined else 0},
    }
    hover, rows = (layer.hover, layer.rows) if layer.hover else _plain_hover(layer, panel)
    told = [[as_html(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    trace = {**shared, "mode": "markers", "marker": marker, "customdata": told, "hovertemplate": hover}
    if layer.line:
        trace |= {"mode": "lines+markers", "line": {"color": layer.color, "width": 1.6}}
    if layer.interval:
        at = layer.x if layer.error_along == "x" else layer.y
        below, above = at - layer.interval[0], layer.interval[1] - at
        bars = {"type": "data", "symmetric": False, "array": above.astype(np.float32)}
        bars |= {"arrayminus": below.astype(np.float32)}
        trace[f"error_{layer.error_along}"] = {**bars, "color": _ink_of(layer), "thickness": 1.2, "width": 3}
    return [trace]


def _band_traces(layer: Curve, shared: JSON) -> list[JSON]:
    if not layer.band:
        return []
    low, high = (edge.astype(np.float32) for edge in layer.band)
    edge = {**shared, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    shade = f"rgba({', '.join(str(int(layer.color[at : at + 2], 16)) for at in (1, 3, 5))}, 0.15)"
    return [{**edge, "y": low}, {**edge, "y": high, "fill": "tonexty", "fillcolor": shade}]


def _text_trace(panel: Panel) -> JSON:
    x, y, text = zip(*panel.texts, strict=True)
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "text": [as_html(one) for one in text],
        "mode": "text",
        "textposition": "top right",
        "textfont": {"size": 11},
        "showlegend": False,
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _plain_hover(layer: Points, panel: Panel) -> tuple[str, list[list[str]]]:
    """A template that tells x and y, and the rows it needs: category names and intervals."""
    columns: list[list[str]] = []
    lines = [f"<b>{as_html(layer.label)}</b>"] if layer.label else []
    axes = (
        ("x", layer.x, panel.x_label, panel.x_percent, panel.x_ticks),
        ("y", layer.y, panel.y_label, panel.y_percent, panel.y_ticks),
    )
    for axis, values, name, percent, ticks in axes:
        form = ".2%" if percent else ".4~g"
        if ticks:
            columns.append([min(ticks, key=lambda tick: abs(tick[0] - value))[1] for value in values])
            lines.append(f"%{{customdata[{len(columns) - 1}]}}")
            continue
        line = f"{as_html(name) or axis} %{{{axis}:{form}}}"
        if layer.interval and layer.error_along == axis:
            columns.append([_interval(low, high, percent) for low, high in zip(*layer.interval, strict=True)])
            line += f" %{{customdata[{len(columns) - 1}]}}"
        lines.append(line)
    return "<br>".join(lines) + "<extra></extra>", [list(row) for row in zip(*columns, strict=True)]


def _interval(low: float, high: float, percent: bool) -> str:
    if np.isnan(low):
        return ""
    return f"[{low:.2%}, {high:.2%}]" if percent else f"[{low:.4g}, {high:.4g}]"
