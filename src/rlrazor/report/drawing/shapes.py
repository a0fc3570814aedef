"""What a figure is, as data: panels, each a pair of axes with layers, which are points and curves."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrazor.system.terminal import printable

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


def style_of(index: int) -> tuple[str, str]:
    """The colour and the symbol of the so many-th of several."""
    return PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]


@dataclass(frozen=True)
class Marker:
    """How points look. `line` connects them in their order."""

    color: str
    symbol: str = "circle"
    size: float = 6.0
    opacity: float = 1.0
    outlined: bool = False
    line: bool = False

    @property
    def ink(self) -> str:
        """What its lines are drawn with: its colour, unless that is the paper's."""
        return INK if self.color == WHITE else self.color


@dataclass(frozen=True)
class Hover:
    """What is told of a point: plotly's template over `rows`, a row per point, which keeps the page small."""

    template: str
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, eq=False)
class Interval:
    """The ends of each point's interval, on the axis of `along` and in its units; NaN: none."""

    low: Floats
    high: Floats
    along: Literal["x", "y"] = "y"


@dataclass(frozen=True, eq=False)
class Points:
    """A cloud of points, by default with a hover that tells x and y."""

    label: str
    x: Floats
    y: Floats
    marker: Marker
    hover: Hover | None = None
    interval: Interval | None = None


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
class Axis:
    """An axis. A range of None comes from the data; `ticks` name places on it: its categories."""

    label: str = ""
    range: Range | None = None
    percent: bool = True
    log: bool = False
    ticks: Ticks | None = None

    @classmethod
    def of(cls, names: Sequence[str], label: str = "", margin: float = 0.5) -> "Axis":
        """An axis of categories, at 0, 1, 2 ..."""
        ticks = [(float(place), name) for place, name in enumerate(names)]
        return cls(label, (-margin, len(names) - 1 + margin), percent=False, ticks=ticks or None)

    @property
    def ends(self) -> Range:
        """Of one that has a range."""
        assert self.range
        return self.range

    @property
    def crowded(self) -> bool:
        """Whether the names of its categories have to be turned to fit, if it is an x-axis."""
        return sum(len(name) + 2 for _, name in self.ticks or ()) > 50


@dataclass(frozen=True)
class Panel:
    """A pair of axes. Layers of one label, in any panel, are switched on and off together.

    `equal` gives both axes one scale and hides them, for a drawing such as the simplex. `texts` are written at (x, y)
    of the data: to the right and above of it, or with `centred` around it.
    """

    title: str
    x: Axis
    y: Axis
    layers: Sequence[Layer]
    equal: bool = False
    texts: Sequence[tuple[float, float, str]] = ()
    centred: bool = False


@dataclass(frozen=True)
class Picture:
    """What is not drawn from data, such as a film: the bytes of a PNG or GIF, and a line of text below it."""

    caption: str
    data: bytes
    kind: str = "gif"

    @property
    def source(self) -> str:
        """All of it, as a page takes it."""
        return f"data:image/{self.kind};base64,{b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Figure:
    """Panels in rows. `clipped` counts checkpoints whose new-task accuracy is below what the axes show.

    `height`, in pixels, is for a figure that needs another one than its rows suggest. `pictures` stand below it, on a
    page and nowhere else.
    """

    name: str
    panels: Sequence[Panel]
    columns: int
    clipped: int = 0
    height: int | None = None
    pictures: Sequence[Picture] = ()

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


def shortened(text: str) -> str:
    """Text as figures show it: printable, and no longer than there is room."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]}…{shown[-LONGEST // 2 :]}"
