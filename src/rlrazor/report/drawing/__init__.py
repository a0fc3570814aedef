"""What a figure is, as data, and its two drawings: matplotlib's for papers, plotly's for the page.

A `Figure` has `Panel`s, a panel has two `Axis` and layers: `Points` and `Curve`s. Describe it once, then `save` it and
put `to_html` on a page. Values that are not finite are left out by both.
"""

from rlrazor.report.drawing.paper import KINDS, draw, files, save
from rlrazor.report.drawing.screen import as_html, interactive, to_html
from rlrazor.report.drawing.shapes import (
    INK,
    PALETTE,
    SYMBOLS,
    WHITE,
    Axis,
    Curve,
    Figure,
    Floats,
    Hover,
    Interval,
    Layer,
    Marker,
    Panel,
    Picture,
    Points,
    Range,
    Ticks,
    style_of,
)

__all__ = [
    "INK",
    "KINDS",
    "PALETTE",
    "SYMBOLS",
    "WHITE",
    "Axis",
    "Curve",
    "Figure",
    "Floats",
    "Hover",
    "Interval",
    "Layer",
    "Marker",
    "Panel",
    "Picture",
    "Points",
    "Range",
    "Ticks",
    "as_html",
    "draw",
    "files",
    "interactive",
    "save",
    "style_of",
    "to_html",
]
