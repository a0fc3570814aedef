"""A figure as plotly draws it, for the page."""

from html import escape
from itertools import chain
from typing import Any

import numpy as np
from plotly.subplots import make_subplots

from rlrazor.report.drawing.shapes import INK, Axis, Curve, Figure, Hover, Layer, Panel, Points, shortened
from rlrazor.runs.records import JSON


def as_html(text: str) -> str:
    """Text as plotly shows it as it is: it takes labels, and what hovering tells, for HTML with places to fill in."""
    return escape(shortened(text), quote=False).replace("%{", "%&#123;")


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
        drawing.update_xaxes(**_axis(panel.x), **at)
        drawing.update_yaxes(**_axis(panel.y), **at)
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
    names = [name for panel in figure.panels[-figure.columns :] for _, name in panel.x.ticks or ()]
    turned = any(panel.x.crowded for panel in figure.panels)
    if not names and figure.height is None and (figure.rows == 1 or figure.columns > 3):
        return -0.2
    below = 70 + (4.5 * max(map(len, names)) if turned and names else 0)  # pixels: an axis title, and turned names
    return -below / max(height - 100 - below, 100)


def _axis(axis: Axis) -> JSON:
    shown: JSON = {"title_text": as_html(axis.label), "range": axis.range, "tickformat": "~%" if axis.percent else None}
    if axis.log:
        shown |= {"type": "log", "range": [float(np.log10(end)) for end in axis.range] if axis.range else None}
        shown |= {"dtick": 1, "minor": {"ticks": "outside", "dtick": "D1"}}
    if axis.ticks:
        places, names = zip(*axis.ticks, strict=True)
        shown |= {"tickmode": "array", "tickvals": places, "ticktext": [as_html(name) for name in names]}
        shown |= {"tickformat": None, "automargin": True}
    return shown


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
    look = layer.marker
    marker = {
        "color": look.color,
        "symbol": look.symbol,
        "size": 1.3 * look.size,  # points to pixels
        "opacity": look.opacity,
        "line": {"color": INK, "width": 1 if look.outlined else 0},
    }
    hover = layer.hover or _plain_hover(layer, panel)
    told = [[as_html(cell) if isinstance(cell, str) else cell for cell in row] for row in hover.rows]
    trace = {**shared, "mode": "markers", "marker": marker, "customdata": told, "hovertemplate": hover.template}
    if look.line:
        trace |= {"mode": "lines+markers", "line": {"color": look.color, "width": 1.6}}
    if layer.interval:
        at = layer.x if layer.interval.along == "x" else layer.y
        below, above = at - layer.interval.low, layer.interval.high - at
        bars = {"type": "data", "symmetric": False, "array": above.astype(np.float32)}
        bars |= {"arrayminus": below.astype(np.float32)}
        trace[f"error_{layer.interval.along}"] = {**bars, "color": look.ink, "thickness": 1.2, "width": 3}
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
        "textposition": "middle center" if panel.centred else "top right",
        "textfont": {"size": 11},
        "showlegend": False,
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _plain_hover(layer: Points, panel: Panel) -> Hover:
    """It tells x and y, categories by their names, and the interval."""
    columns: list[list[str]] = []
    lines = [f"<b>{as_html(layer.label)}</b>"] if layer.label else []
    for name, values, axis in (("x", layer.x, panel.x), ("y", layer.y, panel.y)):
        if axis.ticks:
            ticks = axis.ticks
            columns.append([min(ticks, key=lambda tick: abs(tick[0] - value))[1] for value in values])
            lines.append(f"%{{customdata[{len(columns) - 1}]}}")
            continue
        line = f"{as_html(axis.label) or name} %{{{name}:{'.2%' if axis.percent else '.4~g'}}}"
        if layer.interval and layer.interval.along == name:
            ends = zip(layer.interval.low, layer.interval.high, strict=True)
            columns.append([_interval(low, high, axis.percent) for low, high in ends])
            line += f" %{{customdata[{len(columns) - 1}]}}"
        lines.append(line)
    return Hover("<br>".join(lines) + "<extra></extra>", [list(row) for row in zip(*columns, strict=True)])


def _interval(low: float, high: float, percent: bool) -> str:
    if np.isnan(low):
        return ""
    return f"[{low:.2%}, {high:.2%}]" if percent else f"[{low:.4g}, {high:.4g}]"
