"""A figure as matplotlib draws it, into files for papers."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D

from rlrazor.report.drawing.shapes import INK, Curve, Figure, Layer, Panel, Points, shortened
from rlrazor.system.writing import GENERATOR, atomic_path

PIXELS_PER_INCH = 480 / 4.2  # of the page's figures and of the files': a row of panels is as high in both

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
        columns = min(7, int(width / max(1.5, 0.5 + 0.075 * longest)))
        drawing.legend(loc="outside lower center", ncols=max(columns, 1), frameon=False, handler_map=entries)
    return drawing


def _literal(text: str) -> str:
    """Text as matplotlib shows it as it is: two dollars would begin and end a formula, and a page has no room in it."""
    return shortened(text).replace("$", r"\$")


def _entry(label: str) -> str:
    """A label as the legend shows it: one that begins with an underscore would be left out."""
    return f" {_literal(label)}" if label.startswith("_") else _literal(label)


def _legible(entry: Line2D, layer: Line2D) -> None:
    """Style a legend entry as its layer, but not as small and faint as a point among thousands."""
    entry.update_from(layer)
    entry.set_markersize(8)
    entry.set_alpha(max(layer.get_alpha() or 1, 0.5))


def _percent(value: float, position: float) -> str:
    return f"{100 * value:.4g}%"


def _draw_panel(axis: Axes, panel: Panel, legend: Collection[Layer]) -> None:
    words = {"title": panel.title, "xlabel": panel.x.label, "ylabel": panel.y.label}
    axis.set(**{name: _literal(text) for name, text in words.items()})
    axis.grid(color="#e6e6e6", linewidth=0.6)
    for layer in panel.layers:
        label = _entry(layer.label) if layer in legend else None
        if isinstance(layer, Curve):
            _draw_curve(axis, layer, label)
        else:
            _draw_points(axis, layer, label)
    beside: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points"}
    around: dict[str, Any] = {"ha": "center", "va": "center"}
    for x, y, text in panel.texts:
        axis.annotate(_literal(text), (x, y), fontsize=8, **(around if panel.centred else beside))
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
    marker, interval = layer.marker, layer.interval
    if interval:
        # From the middle of the interval, which a bootstrap's need not have its point in.
        at: Any = {"x": layer.x, "y": layer.y, interval.along: (interval.low + interval.high) / 2}
        at[f"{interval.along}err"] = (interval.high - interval.low) / 2
        axis.errorbar(**at, fmt="none", ecolor=marker.ink, elinewidth=1, capsize=2)
    axis.plot(
        *(layer.x, layer.y),
        color=marker.color,
        linestyle="-" if marker.line else "none",
        linewidth=1.2,
        marker=_MARKERS[marker.symbol],
        markersize=marker.size,
        markeredgecolor=INK if marker.outlined else "none",
        alpha=marker.opacity,
        label=label,
        rasterized=True,  # thousands of shapes would make the SVG megabytes
    )


def _draw_axes(axis: Axes, panel: Panel) -> None:
    for name, of, drawn in (("x", panel.x, axis.xaxis), ("y", panel.y, axis.yaxis)):
        if of.log:
            axis.set(**{f"{name}scale": "log"})
        if of.percent:
            drawn.set_major_formatter(_percent)
        if of.ticks:
            turned: Any = {"rotation": 40, "ha": "right"} if name == "x" and of.crowded else {}
            drawn.set_ticks([place for place, _ in of.ticks], [_literal(text) for _, text in of.ticks], **turned)
        if of.range:
            axis.set(**{f"{name}lim": of.range})
    if panel.equal:
        axis.set_aspect("equal")
        axis.axis("off")
