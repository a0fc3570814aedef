"""The sweep's two figures, described as data; `drawing` draws them."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rlrazor.analysis import frontier
from rlrazor.analysis.statistics import floats
from rlrazor.report.drawing import INK, Axis, Curve, Figure, Layer, Panel, style_of
from rlrazor.report.layers import base, cloud, clouds, height, laws, learnt, padded
from rlrazor.report.sweep import Sweep


def trade_off_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 3: the frontiers, forgetting against KL with its laws, and new accuracy against KL."""
    study, points, look = sweep.study, sweep.points, _look(sweep)

    def layers(x: str, y: str, between: Sequence[Layer] = ()) -> list[Layer]:
        return [*clouds(study, x, y, **look), *between, base(study, x, y)]

    new_name, prior_name = (f"accuracy on {sweep.config[name]}" for name in ("new_task", "prior_task"))
    kl_name = f"forward KL on {sweep.config['new_task']}, {study.kl_unit}"
    new = Axis(f"{new_name} (new task)", learnt(study))
    prior = Axis(prior_name, padded(floats(study.table, "prior")))
    kl = Axis(kl_name, kl_range := padded(np.append(floats(points, "kl_forward"), 0.0)), percent=False)
    # A calibration's is in its section.
    curves = [] if sweep.is_calibration else laws(sweep.law, np.linspace(0, kl_range[1], 200), with_r2=True)
    forgotten = layers("kl_forward", "forgetting", curves)
    frontiers = [
        staircase(study.label(method), points.filter(pl.col("method") == method), style_of(index)[0])
        for index, method in enumerate(study.methods)
    ]
    panels = [
        Panel("Trade-off", new, prior, layers("new", "prior", frontiers)),
        Panel(
            "Forgetting" if sweep.is_calibration else "Forgetting law",
            kl,
            Axis(f"forgetting (drop in {prior_name})", height(forgotten)),
            forgotten,
        ),
        Panel("Learning against drift", kl, new, layers("kl_forward", "new")),
    ]
    return Figure("fig3", panels, columns=3, clipped=_below(sweep))


def frontier_figure(sweep: Sweep) -> Figure:
    """RR's Fig. 6, a panel per method: which checkpoints make its trade-off curve."""
    study, look = sweep.study, _look(sweep)
    columns = ceil(len(study.methods) / ceil(len(study.methods) / 5))
    new_range, prior_range = learnt(study), padded(floats(study.table, "prior"))
    panels = []
    for index, method in enumerate(study.methods):
        points, style = sweep.points.filter(pl.col("method") == method), style_of(index)
        new, prior = floats(points, "new"), floats(points, "prior")
        trade_off = frontier.trade_off_curve(new, prior)
        kept, pareto = trade_off.kept, trade_off.pareto
        shown: list[tuple[str, NDArray[np.bool_], dict[str, Any]]] = [
            ("farther below", ~kept, {**look, "opacity": look["opacity"] / 2}),
            ("within 2 points", kept & ~pareto, {**look, "opacity": 0.9}),
            ("Pareto set", pareto, {"size": 1.5 * look["size"], "opacity": 1, "outlined": True}),
        ]
        layers: list[Layer] = [
            replace(
                cloud(study.label(method), points.filter(pl.Series(mask)), "new", "prior", *style, **drawn), label=label
            )
            for label, mask, drawn in shown
        ]
        if trade_off.curve:
            x = np.linspace(new[kept].min(), new[kept].max(), 100)
            layers.append(Curve("trade-off curve", x, trade_off.curve.predict(x), INK))
        x_label = f"accuracy on {sweep.config['new_task']}" if index + columns >= len(study.methods) else ""
        y_label = f"accuracy on {sweep.config['prior_task']}" if index % columns == 0 else ""
        panels.append(Panel(study.label(method), Axis(x_label, new_range), Axis(y_label, prior_range), layers))
    return Figure("fig6", panels, columns, clipped=_below(sweep))


def _look(sweep: Sweep) -> dict[str, float]:
    # A paper-sized sweep would be a solid mass at the size that suits a quick one.
    return {"size": 4.0, "opacity": 0.6} if len(sweep.points) < 2_000 else {"size": 2.2, "opacity": 0.35}


def staircase(label: str, points: pl.DataFrame, color: str) -> Curve:
    """The Pareto frontier of prior against new accuracy."""
    new, prior = floats(points, "new"), floats(points, "prior")
    best = frontier.pareto_set(new, prior)
    order = np.argsort(new[best])
    return Curve(label, new[best][order], prior[best][order], color, steps=True)


def _below(sweep: Sweep) -> int:
    return sweep.points.filter(pl.col("new") < learnt(sweep.study)[0]).height
