"""A matrix as a panel: a square per cell, the darker the higher, with its number."""

from collections.abc import Sequence

import numpy as np

from rlrazor.report.drawing import Axis, Floats, Marker, Panel, Points

SHADES = ("#ffffff", "#eff6fc", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6")


def heat_map(title: str, values: Floats, rows: Sequence[str], lowest: float, labels: tuple[str, str]) -> Panel:
    """Fractions of 1, row by row from the top; what is `lowest` or below has the palest shade.

    Columns have the numbers 1, 2, ..., as names would run into each other; `labels` say what columns and rows are.
    """
    y, x = np.meshgrid(*map(np.arange, values.shape), indexing="ij")
    shades = np.clip((values - lowest) / (1 - lowest) * len(SHADES), 0, len(SHADES) - 1).astype(int)
    layers = [
        Points("", x[shades == at] + 0.0, 0.0 - y[shades == at], Marker(color, "square", size=26.0, outlined=True))
        for at, color in enumerate(SHADES)
    ]
    count = values.shape[1]
    across = Axis(labels[0], (-0.6, count - 0.4), ticks=[(float(at), str(at + 1)) for at in range(count)])
    down = Axis(labels[1], (0.4 - len(rows), 0.6), ticks=[(-float(at), name) for at, name in enumerate(rows)])
    texts = [(float(j), -float(i), f"{100 * values[i, j]:.0f}") for i, j in np.ndindex(values.shape)]
    return Panel(title, across, down, layers, texts=texts, centred=True)
