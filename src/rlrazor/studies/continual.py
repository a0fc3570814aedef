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
from rlrazor.experiments.continual.config import ALONE, JOINT, PENALTIES, RATES, parts_of
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
    Contrast,
    comparison_table,
    judge_all,
    pairs_of,
    text_of,
)
from rlrazor.studies.own_sequence import is_own

MAPS = 5  # methods whose matrices are drawn
CLAIMS: Mapping[str, str] = {  # what forgetting may follow
    "spent": "KL accumulated, each stage from the one before, new inputs",
    "kl_forward": "KL to the base, new inputs",
    "old": "KL to the base, old inputs",
}
OUTCOMES: Mapping[str, tuple[str, Any]] = {  # of a method: its name, and how it is written
    "accuracy": ("ACC, %", written),
    "backward": ("BWT, points", signed),
    "forward": ("FWT, points", signed),
    "forgotten": ("forgotten of earlier tasks, points", signed),
    "prior": ("prior kept, %", written),
    "kl_forward": ("KL spent, {unit}", lambda estimate: written(estimate, nats)),
}
EARLIER = Contrast("backward", "kept of earlier tasks (BWT)", "points", percent)
RL, SFT = {"method": "RL"}, {"method": "SFT"}  # the means over a family's methods
TO_BASE, TO_BEFORE = {"method": "RL+kl"}, {"method": "RL+kl-before"}  # the same of its methods with a penalty
OF_FAMILIES = (
    Against("SFT’s mean", SFT, "sft", RL, EARLIER),
    Against("SFT’s mean", SFT, "sft-prior", RL, PRIOR),
)
OF_PENALTIES = (
    Against("RL with a KL penalty to the stage before", TO_BEFORE, "before", TO_BASE, EARLIER),
    Against("RL with a KL penalty to the stage before", TO_BEFORE, "before-prior", TO_BASE, PRIOR),
)
TWO = ("sft-2", "sft-two")  # what each method is compared with, by its name in either family of policies
ABSENT = "\0"  # of a number that there is none of: its paragraph is left out


def section(study: Study) -> Section:
    """Its part of the report."""
    courses = courses_of(_ends(study).filter(~pl.col("order").is_in([RATES, ALONE, JOINT])), study.bases)
    of_courses = replace(study, points=outcomes_of(study, courses))
    at = At((study.description["config"]["target"],), lambda points, bases, by, thresholds: thresholds[0])
    compared = Compared.make(of_courses, Arms(("method",), lambda study, arm: label_of(study, arm[0])), at)
    outcomes, of_families = outcome_table(compared), there(compared, OF_FAMILIES)
    against = [*of_families, *there(compared, OF_PENALTIES), *there(compared, of_methods(study))]
    tables = [outcomes, *(comparison_table(compared, one) for one in against), *claims_tables(courses)]
    told = [f"{one.measure.name} against {one.title}: {in_short(judge_all(compared, one))}" for one in of_families] or [
        f"{label}: ACC {cells['accuracy']} %, prior kept {cells['prior']} %" for label, cells in outcomes.rows.values()
    ]
    numbers = {name: text for name, text in numbers_of(tables).items() if text != NEVER or name.endswith("gap")}
    prose = read_prose(text_of("continual"), {"at": f"{compared.at:.0%}", **numbers}, ABSENT)
    counts = f"{how_many(len(courses), 'sequence')}, {how_many(len(study.seeds), 'seed')}. {JUDGED if against else ''}"
    note = "\n\n".join(one for one in [*prose.note.split("\n\n"), counts.strip()] if ABSENT not in one)
    shown, finding = [table.table for table in tables], f"{'; '.join(told)}."
    return Section("continual", prose.title, prose.question, finding, figure_of(study, courses), shown, note)


def label_of(study: Study, method: str) -> str:
    """A method's name for people, or that of the mean over a family's methods, with the penalty."""
    plain, penalty = parts_of(method)
    return plain + PENALTIES[penalty] if plain in study.families else study.label(method)


def there(compared: Compared, comparisons: Sequence[Against]) -> list[Against]:
    """The comparisons of which both sides were run."""
    return [one for one in comparisons if any(with_it in compared.arms for _, with_it in pairs_of(compared, one))]


def of_methods(study: Study) -> list[Against]:
    """Each method with SFT on two labels, where that was run."""
    return [
        Against(study.label(name), {"method": name}, key, measure=measure)
        for name in study.methods
        if name in TWO
        for key, measure in (("earlier", EARLIER), ("prior", PRIOR))
    ]


def outcomes_of(study: Study, courses: Sequence[Course]) -> pl.DataFrame:
    """A row per method and seed, the mean over its orders, and the lowest score of all stages; and families' means."""
    table = pl.DataFrame([course.outcome() for course in courses], infer_schema_length=None)
    table = _mean_over(table, ["method", "seed"])
    means, run = [], table["method"].unique()
    for family, methods in study.families.items():
        plain = [name for name in methods if name in run and "+" not in name]
        for penalty in PENALTIES:
            own = table.filter(pl.col("method").is_in([name + penalty for name in plain]))
            if own["method"].n_unique() == len(plain) > 0:  # or it would be the mean of other methods
                means.append(_mean_over(own.drop("method"), ["seed"]).with_columns(method=pl.lit(family + penalty)))
    if {RL["method"], SFT["method"]} <= {one["method"][0] for one in means}:
        table = pl.concat([*means, table], how="diagonal_relaxed")
    return table.with_columns(trajectory=pl.format("{}, seed {}", "method", "seed"), step=pl.lit(0))


def _mean_over(table: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    return table.group_by(by, maintain_order=True).agg(pl.exclude(*by, "new").mean(), pl.min("new"))


def outcome_table(compared: Compared) -> Keyed:
    """What each method's courses did, and what it does with all tasks at once, and with each alone."""
    ends, rows = _ends(compared.study), {}
    beside = {"joint": (JOINT, "new"), "joint-prior": (JOINT, "prior"), "alone-prior": (ALONE, "prior")}
    headers = ("all at once: ACC, %", "all at once: prior kept, %", "alone: prior kept, %")
    run = {name for name, (order, _) in beside.items() if len(ends.filter(order=order))}
    more = {name: header for name, header in zip(beside, headers, strict=True) if name in run}
    for arm in compared.arms:
        own = compared.rows(arm)
        cells = {
            name: form(None if own[name].null_count() else Estimate.over(own[name].to_list()))
            for name, (_, form) in OUTCOMES.items()
        }
        for name in more:
            order, column = beside[name]
            of = ends.filter(method=arm[0], order=order).group_by("seed", maintain_order=True).agg(pl.mean(column))
            cells[name] = written(Estimate.over(of[column].to_list())) if len(of) else NEVER
        cells |= {"n": str(len(own)), "learned": str(len(own.filter(pl.col("new") >= compared.at)))}
        rows[compared.key(arm)] = (compared.label(arm), cells)
    columns = {name: header.format(unit=compared.study.kl_unit) for name, (header, _) in OUTCOMES.items()} | more
    return Keyed("After the last stage", "method", {**columns, "n": "seeds", "learned": "all learned in"}, rows)


def claims_tables(courses: Sequence[Course]) -> list[Keyed]:
    """Which KL tells what is forgotten: one quadratic in each, over the ends of all stages, of enough sequences."""
    columns = {"r2": "R²", "interval": "95 %", "error": "left-out error, points", "baseline": "guessing", "n": "stages"}
    tables = []
    for old in ("prior", "earlier"):
        stages, rows = pl.DataFrame([row for course in courses for row in course.stages(old)]), {}
        for fit in law.summarise(stages, list(CLAIMS), samples=0) if len(courses) >= law.MIN_GROUPS else []:
            if fit.quadratic is None:
                continue
            interval = law.bootstrap(partial(quadratic_r2, fit.predictor), stages)
            cells = [number(fit.quadratic.r2), " to ".join(map(number, interval)) if interval else NEVER]
            cells += [percent(one.mean) if one else NEVER for one in (fit.quadratic.left_out, fit.baseline)]
            cells.append(str(fit.checkpoints))
            rows[f"{old}.{fit.predictor}"] = (CLAIMS[fit.predictor], dict(zip(columns, cells, strict=True)))
        if rows:
            tables.append(Keyed(f"What tells how much of the {old} task is forgotten", "forward KL", columns, rows))
    return tables


def quadratic_r2(column: str, stages: pl.DataFrame) -> float:
    """R2 of a quadratic in this KL. Raises RazorError as the fit does."""
    x, y = floats(stages, column), floats(stages, "forgetting")
    return law.r_squared(y, law.fit_quadratic(x, y).predict(x))


def figure_of(study: Study, courses: Sequence[Course]) -> Figure:
    """The matrices of the first order, means over the seeds, and the prior score stage by stage.

    Of methods without a penalty, where there are any.
    """
    maps, curves = [], []
    lowest = min(0.4, *(float(one.scores.min()) for one in courses))
    for at, method in enumerate([name for name in study.methods if "+" not in name] or study.methods):
        own = [one for one in courses if one.method == method]
        first = [one for one in own if one.order == own[0].order]
        scores, tasks = np.mean([one.scores for one in first], axis=0), first[0].tasks
        rows = ["base", *(f"{place}: {task}" for place, task in enumerate(tasks, 1))]
        maps.append(heat_map(study.label(method), scores, rows, lowest, ("score on task", "after")))
        prior = np.asarray(np.mean([floats(one.rows, "prior") for one in own], axis=0), np.float64)
        marker = Marker(PALETTE[at % len(PALETTE)], SYMBOLS[at % len(SYMBOLS)], line=True)
        curves.append(Points(study.label(method), np.linspace(0, len(prior) - 1, len(prior)), prior, marker))
    stages = Axis("stages", ticks=[(float(at), str(at)) for at in range(max(len(one.rows) for one in courses))])
    prior_panel = Panel("Prior score, mean over sequences", stages, Axis("prior score"), curves)
    return Figure("continual", [*maps[:MAPS], prior_panel], min(3, len(maps) + 1))


def _ends(study: Study) -> pl.DataFrame:
    """The last checkpoint of each run, in each order that it is in."""
    return study.table.filter(pl.col("method") != BASE).unique(["run_id", "order"], keep="last", maintain_order=True)


KIND = Kind(section, lambda study: "stage" in study.table.columns and not is_own(study))
