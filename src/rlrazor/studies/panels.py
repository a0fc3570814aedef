"""Panels that studies share: what arms keep at equal new-task score, their trade-off, and forgetting by KL."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import floats
from rlrazor.report.drawing import INK, Axis, Curve, Layer, Panel
from rlrazor.report.figures import staircase
from rlrazor.report.layers import across, base, cloud, height, learnt, level, means, never, padded
from rlrazor.report.text import number
from rlrazor.studies.engine import KL, Arm, Compared, PanelOf, Style
from rlrazor.studies.tables import shared_law


def kept(names: Callable[[Any], str]) -> PanelOf:
    """A place for each value of the last column, called by `names`, the methods side by side."""

    def make(compared: Compared) -> Panel | None:
        if not compared.reached:
            return None
        values, methods = compared.values(-1), compared.values(0)
        layers: list[Layer] = []
        for arm in compared.arms:
            place = values.index(arm[-1]) + 0.16 * (methods.index(arm[0]) - (len(methods) - 1) / 2)
            layers.append(
                means(compared.label(arm), [compared.kept[arm]["prior"]], [place], compared.style(arm), line=True)
            )
        axis = Axis.of([names(value) for value in values])
        layers.append(level("base’s prior", base_prior(compared), axis.ends))
        return Panel(f"Kept at new ≥ {compared.at:.0%}", axis, Axis("prior accuracy", height(layers)), layers)

    return make


def along(column: str, x_label: str, line: Callable[[Compared, Any], tuple[str, Style]]) -> PanelOf:
    """`column` of the best checkpoints by the last column of the arms, a number; a line for each value of the first.

    `line`: what it is called and how it is drawn.
    """

    def make(compared: Compared) -> Panel | None:
        if not compared.reached:
            return None
        values, is_prior = sorted(compared.values(-1)), column == "prior"
        layers: list[Layer] = []
        for value in compared.values(0):
            own = sorted((arm for arm in compared.arms if arm[0] == value), key=lambda arm: arm[-1])
            label, style = line(compared, value)
            kept = [compared.kept[arm][column] for arm in own]
            layers.append(means(label, kept, [float(values.index(arm[-1])) for arm in own], style, line=True))
        axis = Axis.of([f"{value:g}" for value in values], x_label, margin=0.3)
        if is_prior:
            layers.append(level("base’s prior", base_prior(compared), axis.ends))
        y_label = "prior accuracy" if is_prior else f"forward KL, {compared.study.kl_unit}"
        title = f"{'Kept' if is_prior else 'Drift'} at new ≥ {compared.at:.0%}"
        return Panel(title, axis, Axis(y_label, height(layers), percent=is_prior), layers)

    return make


def ranked(compared: Compared) -> Panel | None:
    """A dot for each arm, who keeps most on top; a mark at the edge for one that never gets there."""
    if not compared.reached:
        return None
    order = ranking(compared)
    axis = Axis.of([compared.label(arm) for arm in order], margin=0.7)
    prior = base_prior(compared)
    kept = {arm: compared.kept[arm]["prior"] for arm in order}
    low, high = padded(np.array([prior, *(one.mean for one in kept.values() if one)]))
    layers: list[Layer] = []
    for method in compared.values(0):
        own = [arm for arm in order if arm[0] == method]
        places = [order.index(arm) for arm in own]
        label, style = compared.study.label(method), compared.style(own[0])
        layers.append(means(label, [kept[arm] for arm in own], places, style, along="x"))
    absent = [arm for arm in order if kept[arm] is None]
    edge = [low + 0.02 * (high - low)] * len(absent)
    marks = never(f"never reaches {compared.at:.0%} new", [compared.label(arm) for arm in absent], edge, 0.0)
    layers.append(replace(marks, y=np.array([order.index(arm) for arm in absent], float)))
    layers.append(across("base", prior, axis.ends))
    return Panel(f"Kept at new ≥ {compared.at:.0%}", Axis("prior accuracy", (low, high)), axis, layers)


def ranking(compared: Compared) -> list[Arm]:
    """Who keeps most last; first those that never get there, by how far they do."""

    def rank(arm: Arm) -> tuple[float, float]:
        prior = compared.kept[arm]["prior"]
        return (prior.mean if prior else -1.0), float(floats(compared.rows(arm), "new").max())

    return sorted(compared.arms, key=rank)


def trade_off(compared: Compared) -> Panel:
    """All checkpoints of each arm, and its frontier."""
    groups = [(compared.label(arm), compared.rows(arm), compared.style(arm)) for arm in compared.arms]
    return _trade_off(compared, groups)


def trade_off_of_methods(compared: Compared) -> Panel:
    """The same of each method, its arms pooled."""
    first = compared.of.by[0]
    pooled = []
    for value in compared.values(0):
        style = compared.style(next(arm for arm in compared.arms if arm[0] == value))
        pooled.append((compared.study.label(value), compared.points.filter(pl.col(first) == value), style))
    return _trade_off(compared, pooled)


def _trade_off(compared: Compared, groups: list[tuple[str, pl.DataFrame, Style]]) -> Panel:
    clouds = [cloud(label, rows, "new", "prior", *style, opacity=0.5) for label, rows, style in groups]
    steps = [staircase(label, rows, style[0]) for label, rows, style in groups]
    layers: list[Layer] = [*clouds, *steps, base(compared.study, "new", "prior")]
    return Panel("Trade-off", Axis("new accuracy", learnt(compared.study)), Axis("prior accuracy"), layers)


def clouds(compared: Compared, x: str, y: str) -> list[Layer]:
    """The checkpoints of each arm."""
    return [cloud(compared.label(arm), compared.rows(arm), x, y, *compared.style(arm)) for arm in compared.arms]


def learning(compared: Compared) -> Panel:
    """How far a policy moves to learn."""
    layers = [*clouds(compared, KL, "new"), base(compared.study, KL, "new")]
    label, new = f"forward KL, {compared.study.kl_unit}", learnt(compared.study)
    return Panel("Learning against drift", Axis(label, percent=False), Axis("new accuracy", new), layers)


def forgetting_law(compared: Compared) -> Panel:
    """Forgetting by KL, with one quadratic for all."""
    layers = clouds(compared, KL, "forgetting")
    quadratic = shared_law(compared.points).quadratic
    if quadratic:
        drifts = floats(compared.points, KL)
        x = np.linspace(0, float(drifts[np.isfinite(drifts)].max()), 200)
        layers.append(Curve(f"quadratic, R² = {number(quadratic.r2)}", x, quadratic.law.predict(x), INK))
    label = f"forward KL, {compared.study.kl_unit}"
    return Panel("Forgetting law", Axis(label, percent=False), Axis("forgetting"), layers)


def base_prior(compared: Compared) -> float:
    """The bases' prior score, the mean over seeds."""
    return float(np.nanmean(floats(compared.study.bases, "prior")))
