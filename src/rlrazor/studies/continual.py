"""Tasks in sequence: the score matrix, what a sequence costs, RL against SFT, and which KL tells what is forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.sequences import Course, courses_of
from rlrazor.analysis.statistics import Estimate, floats
from rlrazor.experiments.continual.config import ALONE, JOINT, RATES
from rlrazor.report.drawing import PALETTE, SYMBOLS, Axis, Figure, Marker, Panel, Points
from rlrazor.report.heat import heat_map
from rlrazor.report.keyed import Keyed, in_short, numbers_of
from rlrazor.report.prose import read_prose
from rlrazor.report.study import Kind, Section, Study
from rlrazor.report.text import NEVER, how_many, nats, number, percent, signed, written
from rlrazor.runs.records import BASE
from rlrazor.studies.engine import (
    JUDGED,
    PRIOR,
    Against,
    Arms,
    At,
    Compared,
    Measure,
    comparison_table,
    judge_all,
    text_of,
)

MAPS = 5  # methods whose matrices are drawn, those without a penalty first
CLAIMS: Mapping[str, str] = {  # what forgetting may follow
    "spent": "KL accumulated, each stage from the one before, new inputs",
    "kl_forward": "KL to the base, new inputs",
    "old": "KL to the base, old inputs",
}
OUTCOMES: Mapping[str, tuple[str, Any]] = {  # of a sequence: its name, and how it is written
    "accuracy": ("ACC, %", written),
    "backward": ("BWT, points", signed),
    "forward": ("FWT, points", signed),
    "forgotten": ("forgotten of earlier tasks, points", signed),
    "prior": ("prior kept, %", written),
    "kl_forward": ("KL spent, nats", lambda estimate: written(estimate, nats)),
}
EARLIER = Measure("backward", "kept of earlier tasks (BWT)", "points", percent)
RL, SFT = {"method": "RL"}, {"method": "SFT"}  # the means over a family's methods
COMPARED = (
    Against("SFT’s mean", SFT, "sft", RL, EARLIER),
    Against("SFT’s mean", SFT, "sft-prior", RL, PRIOR),
    Against("SFT-2", {"method": "sft-2"}, "earlier", measure=EARLIER),
    Against("SFT-2", {"method": "sft-2"}, "prior", measure=PRIOR),
)


def section(study: Study) -> Section:
    """Its part of the report."""
    courses = courses_of(_ends(study).filter(~pl.col("order").is_in([RATES, ALONE, JOINT])), study.bases)
    of_courses = replace(study, points=outcomes_of(study, courses))
    at = At((study.description["config"]["target"],), lambda points, bases, by, thresholds: thresholds[0])
    compared = Compared.make(of_courses, Arms(("method",), lambda study, arm: study.label(arm[0])), at)
    tables = [outcome_table(compared), *(comparison_table(compared, one) for one in COMPARED), *claims_tables(courses)]
    told = [(one, in_short(judge_all(compared, one))) for one in COMPARED[:2]]
    finding = "; ".join(f"{one.measure.name} against {one.title}: {verdicts}" for one, verdicts in told)
    prose = read_prose(text_of("continual"), {"at": f"{compared.at:.0%}", **numbers_of(tables)})
    note = f"{prose.note}\n\n{how_many(len(courses), 'sequence')}, {how_many(len(study.seeds), 'seed')}. {JUDGED}"
    shown = [table.table for table in tables]
    return Section("continual", prose.title, prose.question, f"{finding}.", figure_of(study, courses), shown, note)


def outcomes_of(study: Study, courses: Sequence[Course]) -> pl.DataFrame:
    """A row per course, and the means over the families' methods; a `seed` is a pair of seed and order."""
    table = pl.DataFrame([course.outcome() for course in courses], infer_schema_length=None)
    means = []
    for family, methods in study.families.items():
        own = table.filter(pl.col("method").is_in([name for name in methods if "+" not in name]))
        mean = own.group_by("start", maintain_order=True).agg(pl.exclude("method", "new").mean(), pl.min("new"))
        means.append(mean.with_columns(method=pl.lit(family)))
    table = pl.concat([*means, table], how="diagonal_relaxed")
    pair = pl.col("start").rank("dense").cast(pl.Int64)
    return table.with_columns(seed=pair, trajectory=pl.concat_str("method", "start", separator=", "), step=pl.lit(0))


def outcome_table(compared: Compared) -> Keyed:
    """What each method's courses did, and what it does with all tasks at once, and with each alone."""
    ends, rows = _ends(compared.study), {}
    beside = {"joint": (JOINT, "new"), "joint-prior": (JOINT, "prior"), "alone-prior": (ALONE, "prior")}
    for arm in compared.arms:
        own = compared.rows(arm)
        cells = {
            name: form(None if own[name].null_count() else Estimate.over(own[name].to_list()))
            for name, (_, form) in OUTCOMES.items()
        }
        for name, (order, column) in beside.items():
            of = ends.filter(method=arm[0], order=order).group_by("seed", maintain_order=True).agg(pl.mean(column))
            cells[name] = written(Estimate.over(of[column].to_list())) if len(of) else NEVER
        cells |= {"n": str(len(own)), "learned": str(len(own.filter(pl.col("new") >= compared.at)))}
        rows[compared.key(arm)] = (compared.label(arm), cells)
    columns = {name: header for name, (header, _) in OUTCOMES.items()}
    columns |= {"joint": "all at once: ACC, %", "joint-prior": "prior kept, %", "alone-prior": "alone: prior kept, %"}
    return Keyed("After the last stage", "method", {**columns, "n": "sequences", "learned": "all learned in"}, rows)


def claims_tables(courses: Sequence[Course]) -> list[Keyed]:
    """Which KL tells what is forgotten: one quadratic in each, over the ends of all stages."""
    columns = {"r2": "R²", "interval": "95 %", "error": "left-out error, points", "baseline": "guessing", "n": "stages"}
    tables = []
    for old in ("prior", "earlier"):
        stages, rows = pl.DataFrame([row for course in courses for row in course.stages(old)]), {}
        for fit in law.summarise(stages, list(CLAIMS), samples=0) if len(stages) else []:
            low, high = law.bootstrap(partial(quadratic_r2, fit.predictor), stages) or (None, None)
            left = fit.quadratic and fit.quadratic.left_out
            cells = [number(fit.quadratic.r2 if fit.quadratic else None), f"{number(low)} to {number(high)}"]
            cells += [percent(one.mean) if one else NEVER for one in (left, fit.baseline)]
            cells.append(str(fit.checkpoints))
            rows[f"{old}.{fit.predictor}"] = (CLAIMS[fit.predictor], dict(zip(columns, cells, strict=True)))
        tables.append(Keyed(f"What tells how much of the {old} task is forgotten", "forward KL", columns, rows))
    return tables


def quadratic_r2(column: str, stages: pl.DataFrame) -> float:
    """R2 of a quadratic in this KL. Raises RazorError as the fit does."""
    x, y = floats(stages, column), floats(stages, "forgetting")
    return law.r_squared(y, law.fit_quadratic(x, y).predict(x))


def figure_of(study: Study, courses: Sequence[Course]) -> Figure:
    """The matrices of the first order, means over the seeds, and the prior score stage by stage."""
    maps, curves = [], []
    for at, method in enumerate(study.methods):
        own = [one for one in courses if one.method == method]
        first = [one for one in own if one.tasks == courses[0].tasks]
        scores = np.mean([one.scores for one in first], axis=0)
        tasks, label = first[0].tasks, study.label(method)
        maps.append((method, heat_map(label, scores, ["base", *tasks], tasks, ("score on", "after"))))
        prior = np.asarray(np.mean([floats(one.rows, "prior") for one in own], axis=0), np.float64)
        marker = Marker(PALETTE[at % len(PALETTE)], SYMBOLS[at % len(SYMBOLS)], line=True)
        curves.append(Points(label, np.linspace(0, len(prior) - 1, len(prior)), prior, marker))
    shown = [panel for _, panel in sorted(maps, key=lambda one: "+" in one[0])][:MAPS]
    ticks = [(float(at), str(at)) for at in range(len(courses[0].rows))]
    stages = Axis("stages", ticks=ticks)
    prior_panel = Panel("Prior score, mean over sequences", stages, Axis("prior score"), curves)
    return Figure("continual", [*shown, prior_panel], 3)


def _ends(study: Study) -> pl.DataFrame:
    """The last checkpoint of each run, in each order that it is in."""
    return study.table.filter(pl.col("method") != BASE).unique(["run_id", "order"], keep="last", maintain_order=True)


KIND = Kind(section, lambda study: "stage" in study.table.columns)
