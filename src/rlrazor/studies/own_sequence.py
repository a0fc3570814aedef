"""A user's own sequence: what is left of every task after each stage, and what the stages cost."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.ahead import finished_of, forecast
from rlrazor.analysis.sequences import Course, courses_of, transfer
from rlrazor.analysis.statistics import floats
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Axis, Curve, Figure, Floats, Layer, Marker, Panel, Points
from rlrazor.report.heat import heat_map
from rlrazor.report.keyed import Keyed
from rlrazor.report.layers import across
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Kind, Section, Study
from rlrazor.report.text import how_many, minus, nats, percent
from rlrazor.runs.records import BASE


def section(study: Study) -> Section:
    """All of its report."""
    stages = study.table.filter(pl.col("method") != BASE)
    ends = stages.unique("run_id", keep="last", maintain_order=True)
    (course,) = courses_of(ends, study.bases)
    asked = list(study.description["config"]["tasks"])
    costs, spent = cost_table(course, study), float(course.spent[-1])
    of, prior = transfer(course.scores), course.column("prior")
    lost = (
        "" if of.backward is None else minus(f", earlier tasks {100 * of.backward:+.1f} points since they were trained")
    )
    budget = "" if (most := study.description["kl_budget"]) is None else f" of {most:g}"
    trained = f"{len(course.tasks)} of {how_many(len(asked), 'task')}"
    finding = (
        f"After {trained}: mean score {percent(of.accuracy)} %{lost}; prior score {percent(prior[-1])} % after "
        f"{percent(prior[0])} %; {nats(spent)} nats spent{budget}."
    )
    figure = figure_of(course, stages, study)
    names = {"method": study.label(course.method), "tasks": how_many(len(asked), "task"), "unit": study.kl_unit}
    names |= {"command": study.description["command"], "updates": f"{int(floats(course.rows[1:], 'step').sum()):,}"}
    path = Path(__file__).with_suffix(".md")
    return told(study, path, Shown(finding, figure, [scores_table(course, asked), costs], names))


def scores_table(course: Course, asked: Sequence[str]) -> Keyed:
    """Every task's score, and the prior score, of the base and after each stage."""
    columns = {f"score_{task}": f"{task}, %" for task in asked} | {"prior": "prior, %"}
    rows = {
        str(at): (f"{at}: {row['task']}" if at else "base", {name: percent(row[name]) for name in columns})
        for at, row in enumerate(course.rows.to_dicts())
    }
    return Keyed("What is left after each stage", "after", columns, rows)


def cost_table(course: Course, study: Study) -> Keyed:
    """What each stage had to cost, was forecast to, and did."""
    headers = ("score before, %", "score after, %", "at least", "forecast", "cost", "spent so far")
    columns = dict(zip(("before", "after", "least", "forecast", "kl", "spent"), headers, strict=True))
    config, finished, rows = study.description["config"], finished_of(course.rows.to_dicts()), {}
    target = config["target"] if config["scored"] == "sampled" else 1.0
    for at, (stage, task, spent) in enumerate(zip(finished, course.tasks, course.spent, strict=True)):
        ahead = forecast(stage.before, 0.0, target, finished[:at])
        costs = (nats(one) for one in (ahead.least, ahead.kl, stage.kl, spent))
        cells = dict(zip(columns, (percent(stage.before), percent(stage.after), *costs), strict=True))
        if (budget := study.description["kl_budget"]) is not None:
            cells["left"] = nats(budget - spent)
        rows[f"cost {at + 1}"] = (f"{at + 1}: {task}", cells)
    columns |= {} if study.description["kl_budget"] is None else {"left": "left of the budget"}
    return Keyed(f"What each stage cost, {study.kl_unit}", "stage", columns, rows)


def figure_of(course: Course, stages: pl.DataFrame, study: Study) -> Figure:
    """The matrix; scores over all updates, stage after stage; and the KL that they cost."""
    labels = ["base", *(f"{at}: {task}" for at, task in enumerate(course.tasks, 1))]
    lowest = min(0.4, float(course.scores.min()))
    matrix = heat_map(study.label(course.method), course.scores, labels, lowest, ("score on task", "after"))
    points = pl.concat([course.rows[:1], stages], how="diagonal_relaxed")
    earlier = points["stage"].fill_null(1).to_numpy() - 1  # stages before each checkpoint's own
    updates = floats(points, "step") + np.array([0, *floats(course.rows[1:], "step").cumsum()])[earlier]
    cost = np.nan_to_num(floats(points, "kl_forward_since_before")) + np.array([0, *course.spent])[earlier]
    scores = [
        Points(task, updates, floats(points, f"score_{task}"), Marker(color, symbol, line=True))
        for task, color, symbol in zip(study.description["config"]["tasks"], cycle(PALETTE), cycle(SYMBOLS))
    ]
    scores.append(Points("prior tasks", updates, floats(points, "prior"), Marker(INK, "star", line=True)))
    costs: list[Layer] = [Points("spent", updates, cost, Marker(PALETTE[5], line=True))]
    if (budget := study.description["kl_budget"]) is not None:
        costs.append(Curve("budget", np.array([0.0, updates[-1]]), np.array([budget, budget]), INK, dashed=True))
    axis = Axis("updates, all stages", percent=False)
    ends = floats(course.rows[1:], "step").cumsum()
    panels = [
        Panel(title, axis, upwards, [*layers, *_borders(ends, highest)])
        for title, upwards, layers, highest in (
            ("Scores", Axis("score"), scores, 1.0),
            ("KL spent", Axis(study.kl_unit, percent=False), costs, max(float(cost.max()), budget or 0.0)),
        )
    ]
    return Figure("own-sequence", [matrix, *panels], 3)


def _borders(ends: Floats, highest: float) -> list[Layer]:
    """A line where each stage but the last ends."""
    return [across("" if at else "a stage ends", end, (0.0, highest)) for at, end in enumerate(ends[:-1])]


def is_own(study: Study) -> bool:
    """Whether its table is of a user's own sequence, of one method, and not of a comparison of methods."""
    return "kl_budget" in study.description


KIND = Kind(section, is_own)
