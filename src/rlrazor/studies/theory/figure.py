"""The study's figure: the paper's Fig. 5 on the simplex, the alternation's convergence, and what gradients pay."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import Estimate, by_group, floats
from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Figure, Layer, Marker, Panel, Points
from rlrazor.report.layers import means
from rlrazor.studies.theory import projection
from rlrazor.studies.theory.parts import AGREE, EXACT, FIRST_CHECK, FIRST_CORRECT, GROUP, SAMPLED, UNTIL
from rlrazor.studies.theory.projection import Floats

_STYLES = {  # colour and symbol
    "policy gradient": (PALETTE[0], "circle"),
    "GRPO": (PALETTE[1], "square"),
    "1-0 REINFORCE": (PALETTE[6], "triangle-up"),
    "KL-DPG": (PALETTE[3], "diamond"),
}
_PATHS = {  # name, colour, dashed
    "policy-gradient": (EXACT["policy-gradient"], PALETTE[0], False),
    "grpo": (EXACT["grpo"], PALETTE[1], True),
    "kl-dpg": (EXACT["kl-dpg"], PALETTE[3], False),
    "natural-gradient": ("natural gradient, exact alternation", PALETTE[2], False),
    "sft": ("SFT on labels (.1, .9)", PALETTE[4], False),
}
_CURVES = {
    "none": ("alternation, R a statistic", INK),
    "graded": ("alternation, graded statistic", PALETTE[9]),
    "random": ("alternation, random statistics", PALETTE[10]),
    "0.3/t²": ("M-step errors 0.3/t²", PALETTE[5]),
    "0.3/t": ("M-step errors 0.3/t", PALETTE[8]),
    "0.3/t, base projected": ("errors 0.3/t, base projected", PALETTE[11]),
}


def figure(name: str, tables: Mapping[str, pl.DataFrame]) -> Figure:
    """Four panels from the study's tables."""
    gradients = tables["gradients"]
    panels = [
        _simplex(tables["paths"]),
        _convergence(tables["convergence"]),
        _excess("Excess KL: the base prefers some correct outcomes", _exact(gradients, "uneven"), gradients, "uneven"),
        _excess("Excess KL: the base's correct outcomes tie", [], gradients, "even"),
    ]
    return Figure(name, panels, columns=2, height=1000)


def _simplex(paths: pl.DataFrame) -> Panel:
    layers: list[Layer] = [Curve("", *_on_plane(np.eye(3)[[0, 1, 2, 0]]), "#999999")]
    for (path,), rows in paths.group_by("path", maintain_order=True):
        x, y = _on_plane(rows.select("a", "b", "c").to_numpy())
        if path in _PATHS:
            name, color, dashed = _PATHS[str(path)]
            layers.append(Curve(name, x, y, color, dashed=dashed))
        else:
            color, symbol = _STYLES["GRPO"]
            marker = Marker(color, symbol, size=1.5, opacity=0.4, line=True)
            sampled = Points(f"GRPO, groups of {GROUP}", x, y, marker)
            layers.insert(1, sampled)
    nearest = projection.i_projection(FIRST_CHECK, FIRST_CORRECT)
    layers.append(Points("base", *_on_plane(FIRST_CHECK[None]), Marker(INK, size=7)))
    layers.append(Points("KL-minimal correct policy", *_on_plane(nearest[None]), Marker(INK, "star", size=12)))
    texts = [(-0.13, -0.09, "a, correct"), (0.93, -0.09, "b, correct"), (0.51, 0.86, "c, wrong")]
    return Panel(
        "Three outcomes",
        Axis(range=(-0.2, 1.2), percent=False),
        Axis(range=(-0.12, 0.95), percent=False),
        layers,
        equal=True,
        texts=texts,
    )


def _on_plane(points: Floats) -> tuple[Floats, Floats]:
    """Of the simplex: a at (0, 0), b at (1, 0), c on top."""
    return points[:, 1] + points[:, 2] / 2, points[:, 2] * np.sqrt(3) / 2


def _convergence(curves: pl.DataFrame) -> Panel:
    layers = []
    for curve, (name, color) in _CURVES.items():
        rows = curves.filter(curve=curve)
        layers.append(Curve(name, floats(rows, "round"), np.maximum(floats(rows, "distance"), 1e-9), color))
    return Panel(
        "Alternation",
        Axis("rounds", percent=False, log=True),
        Axis("total variation from the nearest correct policy", (5e-10, 2), percent=False, log=True),
        layers,
    )


def _excess(title: str, exact: Sequence[Layer], gradients: pl.DataFrame, base: str) -> Panel:
    """Of groups of samples, points side by side where they agree, with a line where no exact gradient has one."""
    layers = list(exact)
    for index, name in enumerate(SAMPLED.values()):
        algorithm = f"{name}, groups of {GROUP}"
        found = _by_accuracy(gradients.filter(base=base, algorithm=algorithm))
        places = [accuracy + 0.012 * (index - 1.5) for accuracy in found]
        dots = means(algorithm, [*found.values()], places, _STYLES[name], line=not exact)
        assert dots.interval
        shown = replace(dots.interval, low=np.maximum(dots.interval.low, 1e-3))  # 0 is on no logarithmic axis
        layers.append(replace(dots, interval=shown))
    x_axis = Axis("accuracy of the base", (0.0, 1.0))
    y_axis = Axis(f"excess KL at {UNTIL:.0%} accuracy, nats", (1e-3, 3), percent=False, log=True)
    return Panel(title, x_axis, y_axis, layers)


def _exact(gradients: pl.DataFrame, base: str) -> list[Layer]:
    """Natural gradient pays nothing, and 0 is on no logarithmic axis."""
    layers: list[Layer] = []
    for flow, algorithm in EXACT.items():
        found = _by_accuracy(gradients.filter(base=base, algorithm=algorithm))
        excess = np.array([one.mean if one else np.nan for one in found.values()])
        if excess.max() > AGREE:
            _, color, dashed = _PATHS[flow]
            layers.append(Curve(algorithm, np.array([*found]), excess, color, dashed=dashed))
    return layers


def _by_accuracy(rows: pl.DataFrame) -> dict[float, Estimate | None]:
    """The excess KL over seeds from each of the base's accuracies, ascending."""
    return by_group(rows.sort("accuracy", maintain_order=True), "accuracy", "excess")
