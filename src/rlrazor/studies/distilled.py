"""Does SFT on the samples of an RL policy forget as little as that policy? The paper's Fig. 9, a teacher per level."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    at_accuracy,
    best_checkpoints,
    difference,
    direction,
    floats,
    near_accuracy,
    with_params,
)
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist.config import PAPER_LRS, TAUGHT_AT, TEACHER
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, WHITE, Figure, Layer, Panel, Points, Range
from rlrazor.report.layers import base, cloud, learnt, padded
from rlrazor.report.sections.statistics import over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import MATCH, Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, in_words, nats, signed, written
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import Grid

RL = "grpo"
ARM = ("method", "labels_per_image", "epochs")  # of the students; the first in the table is the paper's
KL = "kl_forward"

Arm = tuple[str, int, int]


def section(study: Study) -> Section:
    """Students against their own teachers, level by level, and what changes with more labels, or correct ones only."""
    points, taught = with_params(study.points, labels_per_image=1), taught_by_level(study)
    return Section(
        "distilled",
        "Does SFT on an RL policy’s samples forget as little as RL?",
        "The paper’s Fig. 9 fine-tunes a base on what an RL-trained policy answers, and finds the same trade-off: what "
        "matters would be the policy that is reached, not the way there. Here each student is judged against its own "
        f"teacher, at the teacher’s new accuracy, for teachers at several levels of {study.label(RL)}’s frontier.",
        finding(study, points, taught),
        _figure(study, points, taught),
        [
            _matched_table(study, points, taught),
            _differences_table(study, taught),
            _rates_table(study, taught),
            _judged_table(study, points, taught),
        ],
        f"{how_many(len(points), 'checkpoint')} of {how_many(points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}. Learning rates: {_rates(study, points)}. Teacher: per seed and level "
        f"the {study.label(RL)} checkpoint with the highest prior accuracy among those whose new accuracy is at least "
        "the level. Its students start from the base and learn from labels that were sampled from it, once, before "
        "training, its mistakes included; “correct”: from its distribution restricted to the correct labels. Student: "
        "over its learning rates and time, the checkpoint with the highest prior accuracy among those whose new "
        "accuracy is at least its teacher’s own; a seed without one is left out, and counted. Teacher and student are "
        f"both chosen on the scores shown. Within {100 * MATCH:g} points: the student’s new accuracy may be that much "
        "lower. Without choosing: the mean over all of a level’s students within half a point of the level, minus "
        f"{study.label(RL)}’s likewise. The first: the kind of students in the first row, of the same level. On the "
        "way: up to the chosen checkpoint, in its run. Lines, from the base on: the teachers’ runs, one per seed, and "
        "the means over seeds of the chosen students’ runs; where no student gets to its teacher’s accuracy, of the "
        f"one that gets farthest. {INTERVALS}",
    )


def taught_by_level(study: Study) -> pl.DataFrame:
    """The students' checkpoints, once for each level that their teacher teaches at, with its scores.

    Columns besides: `level`, `teacher_new`, `teacher_prior`, `teacher_kl`. Teachers that do not reach their level do
    not count. Raises RazorError where the description names no teachers, or one that the table does not hold.
    """
    named = study.description.get("teachers")
    if not named or "teacher" not in study.points.columns:
        raise RazorError("The study of RL-distilled SFT names no teachers: run the same command again.")
    scores = study.table.select(
        pl.format("{}/{}", "run_id", "step").alias("teacher"),
        pl.col("run_id").alias("teacher_run"),
        *(pl.col(column).alias(f"teacher_{name}") for name, column in (("new", "new"), ("prior", "prior"), ("kl", KL))),
    )
    chosen = pl.DataFrame(named).select("level", "seed", pl.format("{}/{}", "run_id", "step").alias("teacher")).unique()
    teachers = chosen.join(scores, on="teacher", how="left")
    if teachers["teacher_new"].null_count():
        raise RazorError("The study of RL-distilled SFT names a teacher that its table lacks: run the command again.")
    teachers = teachers.filter(pl.col("teacher_new") >= pl.col("level"))
    # Not the distinct checkpoints: the start of a longer run belongs to its arm as well.
    return with_params(study.table, labels_per_image=1).join(teachers, on=["teacher", "seed"], maintain_order="left")


def at_teachers_accuracy(taught: pl.DataFrame, margin: float = 0.0) -> pl.DataFrame:
    """Per arm, level and seed the student that keeps most, of those no more than `margin` below its teacher's new.

    A row for each seed whose students get there, with `gap`, its prior accuracy minus its teacher's.
    """
    # Accuracies are counts over a test set: the last term is for those at exactly the margin.
    reached = taught.filter(pl.col("new") >= pl.col("teacher_new") - margin - 1e-9)
    ranked = reached.sort("prior", descending=True, maintain_order=True)
    best = ranked.unique([*ARM, "level", "seed"], keep="first", maintain_order=True)
    return best.with_columns(gap=pl.col("prior") - pl.col("teacher_prior"))


def lowest_on_the_way(taught: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """Per row of `chosen`, of `at_teachers_accuracy`, the lowest prior accuracy of its run up to there.

    `gap` is that minus the teacher's.
    """
    keys = [*ARM, "level", "seed", "run_id"]
    until = taught.join(chosen.select(*keys, last="step"), on=keys).filter(pl.col("step") <= pl.col("last"))
    lowest = until.group_by(keys, maintain_order=True).agg(pl.min("prior"), pl.first("teacher_prior"))
    return lowest.with_columns(gap=pl.col("prior") - pl.col("teacher_prior"))


def finding(study: Study, points: pl.DataFrame, taught: pl.DataFrame) -> str:
    """What each kind of students keeps beyond its teachers, and whether any keeps more than RL does."""
    if taught.is_empty():
        return "Students and teachers cannot be compared: no teacher reaches its level of new accuracy."
    clauses = [_clause(study, taught, arm) for arm in _arms(taught)]
    return (
        "Prior accuracy of a student minus that of its own teacher, at the teacher’s new accuracy, in points: "
        f"{'; '.join(clauses)}. {_most_kept(study, points, taught)} ({over_seeds(len(study.seeds))})."
    )


def _most_kept(study: Study, points: pl.DataFrame, taught: pl.DataFrame) -> str:
    """The students that keep most at the highest level, of any teachers, against RL itself."""
    at = max(_levels(taught))
    rl = best_checkpoints(points.filter(pl.col("method") == RL), ["method"], at)
    kept = {of: best_checkpoints(_of(taught, *of), ["method"], at) for of in _cells(taught)}
    whole = {of: _over(rows, "prior") for of, rows in kept.items() if len(rows) == len(study.seeds)}
    ranked = sorted(((found.mean, of) for of, found in whole.items() if found), reverse=True)
    if not ranked:
        return f"None of the students gets to {at:.0%} in all seeds"
    _, best = ranked[0]
    gap = difference(kept[best], rl, "prior")
    told = {1: "more than", 0: "not to be told from", -1: "less than"}[direction(gap, len(study.seeds))]
    return (
        f"At {at:.0%}, whoever their teacher, {_name(study, best[0])} keeps most where teachers are at {best[1]:.0%}, "
        f"{written(whole[best])} %: {told} {study.label(RL)} ({signed(gap)})"
    )


def _clause(study: Study, taught: pl.DataFrame, arm: Arm) -> str:
    """An arm's differences, level by level, and the verdict on them."""
    matched, near = at_teachers_accuracy(taught), at_teachers_accuracy(taught, MATCH)
    sizes: list[str] = []
    verdicts: dict[str, list[str]] = {}
    for level in _levels(taught):
        gap, total = _over(_of(matched, arm, level), "gap"), _seeds(taught, arm, level)
        size = "none gets there" if gap is None else signed(gap)
        if gap is None or gap.seeds < total:
            leeway = _over(_of(near, arm, level), "gap")
            told = [f"{gap.seeds} of {total} seeds"] if gap else []
            told += [f"within {100 * MATCH:g} points {_with_seeds(leeway, total)}"] if leeway else []
            size += f" ({'; '.join(told)})" if told else ""
        sizes.append(f"{size} at {level:.0%}")
        verdicts.setdefault(_verdict(gap, total, len(study.seeds)), []).append(f"{level:.0%}")
    verdict_at = in_words([f"{verdict} at {in_words(where)}" for verdict, where in verdicts.items()])
    return f"{_name(study, arm)} {', '.join(sizes)}, which {verdict_at}"


def _verdict(gap: Estimate | None, total: int, seeds: int) -> str:
    if gap is None or 2 * gap.seeds <= total:
        return "does not get to its teacher’s accuracy in most seeds"
    return {1: "keeps more", 0: "cannot be told from its teacher", -1: "keeps less"}[direction(gap, seeds)]


def _matched_table(study: Study, points: pl.DataFrame, taught: pl.DataFrame) -> Table:
    """Each level's teachers beside their students; the same with leeway, and without any choice."""
    matched, near = at_teachers_accuracy(taught), at_teachers_accuracy(taught, MATCH)
    of_rl = points.filter(pl.col("method") == RL)
    rows = []
    for arm, level in _cells(taught):
        own, teachers, total = _of(matched, arm, level), _teachers(taught, arm, level), _seeds(taught, arm, level)
        similar = near_accuracy(_of(taught, arm, level), ["method"], level, ["prior"])
        typical = difference(similar, near_accuracy(of_rl, ["method"], level, ["prior"]), "prior")
        rows.append(
            [
                _cell_name(study, arm, level),
                written(_over(teachers, "teacher_new")),
                f"{written(_over(teachers, 'teacher_prior'))} / {written(_over(teachers, 'teacher_kl'), nats)}",
                NEVER if own.is_empty() else f"{written(_over(own, 'prior'))} / {written(_over(own, KL), nats)}",
                *(_with_seeds(gap, total) for gap in (_over(own, "gap"), _over(_of(near, arm, level), "gap"), typical)),
            ]
        )
    headers = ["student, teacher’s level", "teacher’s new, %", "teacher’s prior, % / KL, nats", "student’s"]
    headers += ["student − teacher, points", f"within {100 * MATCH:g} points", "without choosing"]
    return Table("Prior accuracy and forward KL at the teacher’s own new accuracy", headers, rows)


def _differences_table(study: Study, taught: pl.DataFrame) -> Table:
    """How far students get, what they go through, and what more labels or correct ones are worth to them."""
    matched = at_teachers_accuracy(taught)
    lowest = lowest_on_the_way(taught, matched)
    rows = []
    for arm, level in _cells(taught):
        total = _seeds(taught, arm, level)
        usual = _arms(taught)[0]
        best, plain_best = _best_new(taught, arm, level), _best_new(taught, usual, level)
        own, plain = _of(matched, arm, level), _of(matched, usual, level)
        against = [difference(best, plain_best, "new"), difference(own, plain, "prior")]
        rows.append(
            [
                _cell_name(study, arm, level),
                signed(_over(best, "beyond")),
                _with_seeds(_over(_of(lowest, arm, level), "gap"), total),
                *([NEVER] * 2 if arm == usual else [_with_seeds(gap, total) for gap in against]),
            ]
        )
    headers = ["student, teacher’s level", "best new − teacher’s new", "lowest prior on the way − teacher’s prior"]
    headers += ["best new − the first’s", "prior − the first’s"]
    return Table("How far students get, and what labels and time are worth, points", headers, rows)


def _rates_table(study: Study, taught: pl.DataFrame) -> Table:
    """Where each learning rate ends: how far from its teacher's new accuracy, and from its prior accuracy."""
    keys = [*ARM, "level", "seed", "lr"]
    ends = taught.sort("step").group_by(keys, maintain_order=True).last()
    ends = ends.with_columns(
        beyond=pl.col("new") - pl.col("teacher_new"), gap=pl.col("prior") - pl.col("teacher_prior")
    )
    rates = sorted(ends["lr"].unique().to_list())
    rows = []
    for arm, level in _cells(taught):
        own = [_of(ends, arm, level).filter(pl.col("lr") == lr) for lr in rates]
        shown = [f"{signed(_over(at, 'beyond'))} / {signed(_over(at, 'gap'))}" if len(at) else NEVER for at in own]
        rows.append([_cell_name(study, arm, level), *shown])
    headers = ["student, teacher’s level", *(f"learning rate {lr:.1e}" for lr in rates)]
    return Table("At the end of training: new accuracy / prior accuracy, minus the teacher’s, points", headers, rows)


def _judged_table(study: Study, points: pl.DataFrame, taught: pl.DataFrame) -> Table:
    """Students of each level judged at every level: what comes of judging them at another than their teacher's."""
    groups = {study.label(RL): points.filter(pl.col("method") == RL)}
    groups |= {_cell_name(study, arm, level): _of(taught, arm, level) for arm, level in _cells(taught)}
    rows = []
    for name, group in groups.items():
        kept = [at_accuracy(group, ["method"], at).to_dicts() for at in _levels(taught)]
        rows.append([name, *(cell(row, "prior") if row["n_seeds"] else NEVER for [row] in kept)])
    headers = ["policies", *(f"new ≥ {level:.0%}" for level in _levels(taught))]
    return Table("Prior accuracy kept, %, whatever the teacher’s level", headers, rows)


def _figure(study: Study, points: pl.DataFrame, taught: pl.DataFrame) -> Figure:
    """Whole runs, of teachers and of students, in the planes of new accuracy and of KL; a column per level."""
    levels, prior = _levels(taught), padded(floats(study.table, "prior"))
    panels = [
        Panel(
            f"Teachers at {level:.0%} and students",
            "new accuracy" if column == "new" else f"forward KL, {study.kl_unit}",
            "prior accuracy",
            _layers(study, points, taught, level, column),
            learnt(study) if column == "new" else _near(taught, level),
            prior,
            x_percent=column == "new",
        )
        for column in ("new", KL)
        for level in levels
    ]
    if not panels:
        of_rl = points.filter(pl.col("method") == RL)
        layers = [cloud(study.label(RL), of_rl, "new", "prior", *_STYLES[0]), base(study, "new", "prior")]
        panels = [Panel("No teacher reaches its level", "new accuracy", "prior accuracy", layers)]
    return Figure("distilled", panels, columns=max(len(levels), 1))


_STYLES = tuple(zip(PALETTE[:5], SYMBOLS[:5], strict=True))


def _layers(study: Study, points: pl.DataFrame, taught: pl.DataFrame, level: float, column: str) -> list[Layer]:
    of_rl = points.filter(pl.col("method") == RL)
    layers: list[Layer] = [cloud(study.label(RL), of_rl, column, "prior", *_STYLES[0], size=2.5, opacity=0.2)]
    teachers = _teachers(taught, _arms(taught)[0], level)
    runs = points.filter(pl.col("run_id").is_in(teachers["teacher_run"].to_list()))
    layers += _courses(study, f"{study.label(RL)}, the teachers’ runs", runs, column, *_STYLES[0])
    for arm, style in zip(_arms(taught), _STYLES[1:], strict=False):
        layers.append(_mean_course(study, _name(study, arm), _shown(taught, arm, level), column, *style))
    at = "teacher_new" if column == "new" else "teacher_kl"
    x, y = floats(teachers, at), floats(teachers, "teacher_prior")
    middle = np.array([x.mean()]), np.array([y.mean()])
    layers.append(Points("mean of teachers", *middle, WHITE, "diamond", size=8.0, outlined=True))
    layers.append(Points("teacher", x, y, INK, "diamond", size=5.0))
    return [*layers, base(study, column, "prior")]


def _near(taught: pl.DataFrame, level: float) -> Range:
    """The range of KL that a level's teachers and students have: where RL goes on to would squeeze them together."""
    own = taught.filter(pl.col("level") == level)
    end = 1.15 * max(floats(own, KL).max(), floats(own, "teacher_kl").max(), 0.01)
    return -0.04 * end, end


def _shown(taught: pl.DataFrame, arm: Arm, level: float) -> pl.DataFrame:
    """Per seed the run of the chosen student; where none gets to its teacher's accuracy, the run that gets farthest."""
    own = _of(taught, arm, level)
    chosen = _of(at_teachers_accuracy(taught), arm, level)
    farthest = own.sort("new", descending=True, maintain_order=True).unique("seed", keep="first", maintain_order=True)
    shown = pl.concat([chosen.select("seed", "run_id"), farthest.select("seed", "run_id")]).unique("seed", keep="first")
    return own.filter(pl.col("run_id").is_in(shown["run_id"].to_list()))


def _courses(study: Study, label: str, runs: pl.DataFrame, column: str, color: str, symbol: str) -> list[Layer]:
    """Each run's way from the base, a line."""
    layers: list[Layer] = []
    for (seed,), rows in runs.sort("step").group_by(["seed"], maintain_order=True):
        start = study.bases.filter(pl.col("seed") == seed)
        x, y = (np.concatenate([floats(start, name), floats(rows, name)]) for name in (column, "prior"))
        layers.append(Points(label, x, y, color, symbol, size=2.5, opacity=0.4, line=True))
    return layers


def _mean_course(study: Study, label: str, runs: pl.DataFrame, column: str, color: str, symbol: str) -> Points:
    """The way from the bases of runs of one length, one a seed: means over seeds, checkpoint by checkpoint."""
    start = study.bases.filter(pl.col("seed").is_in(runs["seed"].unique().to_list()))
    by_step = pl.concat([start.select("step", column, "prior"), runs.select("step", column, "prior")])
    means = by_step.group_by("step").mean().sort("step")
    return Points(label, floats(means, column), floats(means, "prior"), color, symbol, size=4.0, line=True)


def _levels(taught: pl.DataFrame) -> list[float]:
    return sorted(taught["level"].unique().to_list())


def _arms(taught: pl.DataFrame) -> list[Arm]:
    """The kinds of students, in the order of the table."""
    return [(str(row[0]), int(row[1]), int(row[2])) for row in taught.select(ARM).unique(maintain_order=True).rows()]


def _cells(taught: pl.DataFrame) -> Iterator[tuple[Arm, float]]:
    for arm in _arms(taught):
        for level in _levels(taught):
            if _seeds(taught, arm, level):
                yield arm, level


def _of(rows: pl.DataFrame, arm: Arm, level: float) -> pl.DataFrame:
    same = [pl.col(name) == value for name, value in zip(ARM, arm, strict=True)]
    return rows.filter(*same, pl.col("level") == level)


def _seeds(taught: pl.DataFrame, arm: Arm, level: float) -> int:
    return int(_of(taught, arm, level)["seed"].n_unique())


def _teachers(taught: pl.DataFrame, arm: Arm, level: float) -> pl.DataFrame:
    """A row for each teacher that an arm's students of a level have."""
    return _of(taught, arm, level).unique("seed", keep="first", maintain_order=True)


def _best_new(taught: pl.DataFrame, arm: Arm, level: float) -> pl.DataFrame:
    """Per seed the highest new accuracy, and how far it is beyond the teacher's."""
    best = _of(taught, arm, level).group_by("seed", maintain_order=True).agg(pl.max("new"), pl.first("teacher_new"))
    return best.with_columns(beyond=pl.col("new") - pl.col("teacher_new"))


def _over(rows: pl.DataFrame, column: str) -> Estimate | None:
    """The mean over rows, one a seed."""
    return None if rows.is_empty() else Estimate.over(rows.sort("seed")[column].to_list())


def _with_seeds(gap: Estimate | None, total: int) -> str:
    """A difference with its sign, and the seeds that allow it where not all of `total` do."""
    some = f" ({gap.seeds} of {total} seeds)" if gap and gap.seeds < total else ""
    return signed(gap) + some


def _name(study: Study, arm: Arm) -> str:
    method, labels, epochs = arm
    of_rl = study.points.filter(pl.col("method") == RL)["epochs"].to_list()
    longer = "" if epochs in of_rl else f", {how_many(epochs, 'epoch')}"
    return study.label(method) + ("" if labels == 1 else f", {labels} labels an image") + longer


def _cell_name(study: Study, arm: Arm, level: float) -> str:
    return f"{_name(study, arm)}, {level:.0%}"


def _rates(study: Study, points: pl.DataFrame) -> str:
    """The learning rates of each kind of policy: "3 from 1.3e-04 to 2.9e-04 for A and B"."""
    by_grid: dict[tuple[float, ...], list[str]] = {}
    for (method,), rows in points.group_by(["method"], maintain_order=True):
        by_grid.setdefault(tuple(sorted(set(rows["lr"]))), []).append(study.label(str(method)))
    return "; ".join(
        f"{len(grid)} from {min(grid):.1e} to {max(grid):.1e} for {in_words(names)}" for grid, names in by_grid.items()
    )


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    # RL's from 5.5e-5 to 4.4e-4, students' from 1.2e-4 to 6.6e-4: they learn the task more slowly.
    lrs, students_lrs = (PAPER_LRS[9:12:2],) * 2 if quick else (PAPER_LRS[7:13], PAPER_LRS[9:14:2])
    short = {} if quick else {"epochs": (2,)}
    many = {"labels_per_image": 64}
    grids = [Grid((TEACHER,), lrs, settings=short)]
    for level in TAUGHT_AT[:2] if quick else TAUGHT_AT:
        grids.append(Grid(("rl-distilled",), students_lrs, {}, short, level))
        if not quick:
            grids.append(Grid(("rl-distilled",), students_lrs[:1], {}, {"epochs": (6,)}, level))
        grids.append(Grid(("rl-distilled",), students_lrs, many, short, level))
        grids.append(Grid(("rl-distilled-correct",), students_lrs, {}, short, level))
    return grids


STUDY = PlainStudy(grids, section)
