"""Does SFT on the samples of an RL policy forget as little as that policy? The paper's Fig. 9, a teacher per level."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import polars as pl

from rlrazor.analysis.imitation import Students, taught_by_level
from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import (
    Estimate,
    difference,
    floats,
    mean_of,
    near_accuracy,
    with_params,
)
from rlrazor.experiments.parity_mnist.config import PAPER_LRS, TAUGHT_AT, TEACHER
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, WHITE, Axis, Figure, Floats, Layer, Marker, Panel, Points
from rlrazor.report.keyed import Column, Judged, Keyed, gap, in_short, table_of
from rlrazor.report.layers import base, cloud, learnt, padded
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import MATCH
from rlrazor.report.text import NEVER, by_seeds, how_many, nats, signed, written
from rlrazor.studies.engine import KL, PlainStudy, section_of
from rlrazor.studies.grids import Grid

NAME = "distilled"
KIND = ("method", "labels_per_image", "epochs")  # of students; the first in the table is the paper's


def grids(quick: bool) -> list[Grid]:
    """RL, and at each level its students: the paper's, for longer, with more labels, and with correct ones only."""
    # RL's from 5.5e-5 to 4.4e-4, students' from 1.2e-4 to 6.6e-4: they learn the task more slowly.
    lrs, students_lrs = (PAPER_LRS[9:12:2],) * 2 if quick else (PAPER_LRS[7:13], PAPER_LRS[9:14:2])
    short = {} if quick else {"epochs": (2,)}
    grids = [Grid((TEACHER,), lrs, settings=short)]
    for level in TAUGHT_AT[:2] if quick else TAUGHT_AT:
        grids.append(Grid(("rl-distilled",), students_lrs, {}, short, level))
        if not quick:
            grids.append(Grid(("rl-distilled",), students_lrs[:1], {}, {"epochs": (6,)}, level))
        grids.append(Grid(("rl-distilled",), students_lrs, {"labels_per_image": 64}, short, level))
        grids.append(Grid(("rl-distilled-correct",), students_lrs, {}, short, level))
    return grids


def students_of(study: Study) -> list[Students]:
    """Kind by kind, and level by level; a longer run's start, too, belongs to its kind."""
    taught = taught_by_level(with_params(study.table, labels_per_image=1), study.description.get("teachers"))
    usual = set(study.points.filter(method=TEACHER)["epochs"])
    found = []
    for (method, labels, epochs), of_kind in taught.group_by(KIND, maintain_order=True):
        more = [] if labels == 1 else [(f"{labels}-labels", f"{labels} labels an image")]
        more += [] if epochs in usual else [(f"{epochs}-epochs", how_many(int(str(epochs)), "epoch"))]
        kind = ", ".join([study.label(str(method)), *(name for _, name in more)])
        for (level,), rows in of_kind.sort("level", maintain_order=True).group_by(["level"], maintain_order=True):
            key = ".".join([str(method), *(short for short, _ in more), f"{100 * float(str(level)):g}"])
            found.append(Students(key, kind, float(str(level)), rows))
    return found


def section(study: Study) -> Section:
    """Students against their own teachers, level by level, and what changes with more labels, or correct ones only."""
    students, seeds = students_of(study), len(study.seeds)
    gaps = [(one.name, mean_of(one.matched(), "gap")) for one in students]
    told = in_short([Judged.of(name, gap, seeds) for name, gap in gaps])
    finding = f"Prior score kept by students against that of their own teachers, at the teachers’ new score: {told}."
    return section_of(study, NAME, finding, figure(study, students), tables_of(study, students), tuned=True)


def tables_of(study: Study, students: Sequence[Students]) -> list[Keyed]:
    """Students beside their teachers; how far they get; where they end; what they keep at any level; the best."""
    rl, in_nats = study.points.filter(method=TEACHER), partial(written, form=nats)
    levels, rates = sorted({one.level for one in students}), sorted({lr for one in students for lr in one.rows["lr"]})
    usual = {one.level: one for one in students if one.kind == students[0].kind}

    def typical(one: Students) -> Estimate | None:
        own, others = (near_accuracy(rows, ["method"], one.level, ["prior"]) for rows in (one.rows, rl))
        return difference(own, others, "prior")

    def against_usual(one: Students, rows: Callable[[Students], pl.DataFrame], column: str) -> Estimate | str | None:
        first = usual.get(one.level)
        return NEVER if first is one else difference(rows(one), rows(first), column) if first else None

    matched = [
        Column[Students]("teacher-new", "teacher’s new, %", lambda one: mean_of(one.teachers, "teacher_new")),
        Column("teacher-prior", "teacher’s prior, %", lambda one: mean_of(one.teachers, "teacher_prior")),
        Column("teacher-kl", "teacher’s forward KL", lambda one: mean_of(one.teachers, "teacher_kl"), in_nats),
        Column("prior", "student’s prior, %", lambda one: mean_of(one.matched(), "prior")),
        Column("kl", "student’s forward KL", lambda one: mean_of(one.matched(), KL), in_nats),
        gap("gap", "student − teacher, points", lambda one: mean_of(one.matched(), "gap")),
    ]
    leeway = [
        gap("near.gap", f"within {100 * MATCH:g} points", lambda one: mean_of(one.matched(MATCH), "gap")),
        gap("typical.gap", "without choosing", typical),
    ]
    far = [
        Column[Students]("beyond", "best new − teacher’s new", lambda one: mean_of(one.best, "beyond"), signed),
        Column("lowest", "lowest prior on the way − teacher’s", lambda one: mean_of(one.lowest(), "gap"), signed),
        Column(
            "first.new", "best new − the first’s", lambda one: against_usual(one, lambda of: of.best, "new"), signed
        ),
        gap("first.gap", "prior − the first’s", lambda one: against_usual(one, Students.matched, "prior")),
    ]
    ends = [
        Column(f"end.{name}.{lr:.1e}", f"{name}, lr {lr:.1e}", partial(_end, name=name, lr=lr), signed)
        for name in ("new", "prior")
        for lr in rates
    ]
    kept = [Column(f"at-{100 * at:g}", f"new ≥ {at:.0%}", partial(_kept, at=at)) for at in levels]
    rows = {one.key: (one.name, one) for one in students}
    policies = {TEACHER: (study.label(TEACHER), rl), **{one.key: (one.name, one.rows) for one in students}}
    corner, seeds = "student, teacher’s level", len(study.seeds)
    return [
        table_of("At the teacher’s own new accuracy", corner, rows, matched, seeds),
        table_of("Student − teacher in prior accuracy, points, otherwise", corner, rows, leeway, seeds),
        table_of("How far students get, and what labels and time are worth, points", corner, rows, far, seeds),
        table_of("At the end of training, minus the teacher’s, points", corner, rows, ends, seeds),
        table_of("Prior accuracy kept, %, whatever the teacher’s level", "policies", policies, kept, seeds),
        *([best_table(study, students, levels[-1])] if levels else []),
    ]


def best_table(study: Study, students: Sequence[Students], at: float) -> Keyed:
    """The best students at this level, chosen as a learning rate is, on the other seeds; against RL itself."""
    rl = matched(study.points.filter(method=TEACHER), ["method"], at)
    policies = [  # one run may be of several kinds, such as a longer one's beginning
        one.rows.with_columns(kind=pl.lit(one.name), trajectory=pl.format("{}, {}", "trajectory", pl.lit(one.key)))
        for one in students
    ]
    best = matched(pl.concat(policies, how="diagonal_relaxed"), [], at, ["kind"])
    columns = [
        Column[pl.DataFrame]("arm", "who keeps most", lambda rows: by_seeds(rows.sort("seed")["kind"].to_list())),
        Column("prior", "prior kept, %", lambda rows: mean_of(rows, "prior")),
        gap("gap", f"minus {study.label(TEACHER)}’s, points", lambda rows: difference(rows, rl, "prior")),
    ]
    rows = {"best": ("all students", best)}
    return table_of(f"The best at new ≥ {at:.0%}", "of", rows, columns, len(study.seeds))


def _end(one: Students, name: str, lr: float) -> Estimate | None:
    return mean_of(one.ends(lr), f"{name}_beyond")


def _kept(rows: pl.DataFrame, at: float) -> Estimate | None:
    return mean_of(matched(rows, ["method"], at), "prior")


def figure(study: Study, students: Sequence[Students]) -> Figure:
    """Whole runs, of teachers and of students, in the planes of new accuracy and of KL; a column per level."""
    levels, prior = sorted({one.level for one in students}), padded(floats(study.table, "prior"))
    panels = []
    for column in ("new", KL):
        for level in levels:
            own = [one for one in students if one.level == level]
            in_new = column == "new"
            end = max(0.01, *(floats(one.rows, name).max() for one in own for name in (KL, "teacher_kl")))
            # Where RL goes on to in KL would squeeze teachers and students together.
            across = learnt(study) if in_new else (-0.05 * end, 1.15 * end)
            x_label = "new accuracy" if in_new else f"forward KL, {study.kl_unit}"
            title, layers = f"Teachers at {level:.0%} and students", _layers(study, own, column)
            x_axis = Axis(x_label, across, percent=in_new)
            panels.append(Panel(title, x_axis, Axis("prior accuracy", prior), layers))
    if not panels:
        layers = _layers(study, [], "new")
        panels = [Panel("No teacher reaches its level", Axis("new accuracy"), Axis("prior accuracy"), layers)]
    return Figure(NAME, panels, columns=max(len(levels), 1))


def _layers(study: Study, students: Sequence[Students], column: str) -> list[Layer]:
    """RL; the teachers' runs, a line each, and the mean run of each kind of students; the teachers."""
    rl, label, style = study.points.filter(method=TEACHER), study.label(TEACHER), (PALETTE[0], SYMBOLS[0])
    layers: list[Layer] = [cloud(label, rl, column, "prior", *style, size=2.5, opacity=0.2)]
    if students:
        teachers = students[0].teachers
        for run in teachers["teacher_run"]:
            x, y = _course(study, rl.filter(run_id=run), column)
            layers.append(Points(f"{label}, the teachers’ runs", x, y, Marker(*style, 2.5, 0.4, line=True)))
        for place, one in enumerate(students, 1):
            x, y = _course(study, one.shown(), column)
            marker = Marker(PALETTE[place], SYMBOLS[place % len(SYMBOLS)], size=4.0, line=True)
            layers.append(Points(one.kind, x, y, marker))
        x, y = (floats(teachers, f"teacher_{name}") for name in ("new" if column == "new" else "kl", "prior"))
        middle = np.array([x.mean()]), np.array([y.mean()])
        layers.append(Points("mean of teachers", *middle, Marker(WHITE, "diamond", size=8.0, outlined=True)))
        layers.append(Points("teacher", x, y, Marker(INK, "diamond", size=5.0)))
    return [*layers, base(study, column, "prior")]


def _course(study: Study, runs: pl.DataFrame, column: str) -> list[Floats]:
    """The way from the bases of runs of one length, one a seed: means over seeds, checkpoint by checkpoint."""
    bases = study.bases.filter(pl.col("seed").is_in(runs["seed"].unique().to_list()))
    by_step = pl.concat([rows.select("step", column, "prior") for rows in (bases, runs)]).group_by("step").mean()
    return [floats(by_step.sort("step"), name) for name in (column, "prior")]


STUDY = PlainStudy(section, grids=grids)
