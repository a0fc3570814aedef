"""Several output folders side by side, a new task each: RL against SFT, the paper's Fig. 2."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from rlrazor.analysis.statistics import Estimate, at_accuracy, best_checkpoints, difference, direction, shared_threshold
from rlrazor.errors import RazorError
from rlrazor.report import tables
from rlrazor.report.drawing import PALETTE, Figure, Layer, Panel
from rlrazor.report.figures import staircase
from rlrazor.report.layers import base, cloud, learnt
from rlrazor.report.page import write_comparison
from rlrazor.report.sections.representation import members, with_family
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import FAMILIES, Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, signed

_STYLES = {"RL": (PALETTE[0], "circle"), "SFT": (PALETTE[1], "square")}


@dataclass(frozen=True, eq=False)
class _Task:
    """A folder: its sweep with a column `family`, and what RL keeps more than SFT at the highest accuracy of both."""

    study: Study
    points: pl.DataFrame
    at: float | None
    gap: Estimate | None

    @property
    def name(self) -> str:
        return str(self.study.description["new_task"])


def compare_folders(folders: Sequence[Path], out: Path) -> tuple[Section, Path]:
    """Write OUT/comparison.html and OUT/figures/fig2.*, a panel per folder; return what it found and the page's path.

    Raises RazorError for fewer than two folders, for one that is named twice or holds no sweep, and when `out` cannot
    be written.
    """
    if len(folders) < 2 or len(set(map(os.path.realpath, folders))) < len(folders):
        raise RazorError("A comparison needs at least two different output folders: name each once.")
    section = comparison([_task(folder) for folder in folders])
    return section, write_comparison(section, out)


def _task(folder: Path) -> _Task:
    config, table, points, bases = tables.read_sweep(folder)
    study = Study("fig2", config, table, points, bases, of_sweep=True)
    sorted_out = with_family(study).drop_nulls("family")
    at = shared_threshold(sorted_out, bases, ["family"], study.thresholds)
    if at is None:
        return _Task(study, sorted_out, None, None)
    best = best_checkpoints(sorted_out, ["family"], at)
    rl, sft = (best.filter(pl.col("family") == family) for family in FAMILIES)
    return _Task(study, sorted_out, at, difference(rl, sft, "prior"))


def comparison(tasks: Sequence[_Task]) -> Section:
    """The section of the comparison page."""
    counts = "; ".join(
        f"{task.name}: {how_many(len(task.points), 'checkpoint')}, {how_many(len(task.study.seeds), 'seed')}, RL being "
        f"{members(task.study, 'RL')}, SFT being {members(task.study, 'SFT')}"
        for task in tasks
    )
    return Section(
        "fig2",
        "Does RL forget less than SFT, task by task?",
        "The paper’s Fig. 2: at equal accuracy on the new task, which of the two families of methods keeps more of the "
        "prior tasks?",
        finding(tasks),
        Figure("fig2", [_panel(task) for task in tasks], columns=min(len(tasks), 3)),
        [_kept(task) for task in tasks],
        f"{counts}. Lines: the Pareto frontier of each family, all seeds and methods pooled. Compared at the highest "
        "threshold above the base’s new accuracy that both reach in all seeds. Kept: per family and seed the best "
        "prior accuracy of its checkpoints with at least the new accuracy given, chosen on the score shown, which "
        f"flatters most the family with most checkpoints. {INTERVALS}",
    )


def finding(tasks: Sequence[_Task]) -> str:
    """Per task what RL keeps more than SFT, then on how many of the tasks it forgets less."""
    shown = []
    for task in tasks:
        if task.at is None or task.gap is None:
            shown.append(f"{task.name}: no accuracy that both reach")
        else:
            shown.append(f"{task.name} {signed(task.gap)} (new ≥ {task.at:.0%})")
    signs = [direction(task.gap, len(task.study.seeds)) for task in tasks]
    counts = f"RL forgets less on {signs.count(1)} of {how_many(len(tasks), 'task')}, SFT on {signs.count(-1)}"
    single = any(len(task.study.seeds) == 1 for task in tasks)
    caveat = "; where there is one seed, chance is not ruled out" if single else ""
    return f"Prior accuracy that RL keeps minus what SFT keeps, points: {'; '.join(shown)}. {counts}{caveat}."


def _panel(task: _Task) -> Panel:
    layers: list[Layer] = []
    for family, style in _STYLES.items():
        own = task.points.filter(pl.col("family") == family)
        if len(own):
            layers.append(cloud(family, own, "new", "prior", *style, opacity=0.35))
            layers.append(staircase(f"{family} frontier", own, style[0]))
    return Panel(
        str(task.study.description["title"]),
        f"accuracy on {task.name} (new task)",
        f"accuracy on {task.study.description['prior_task']}",
        [*layers, base(task.study, "new", "prior")],
        learnt(task.study),
    )


def _kept(task: _Task) -> Table:
    levels = task.study.thresholds
    found = {at: at_accuracy(task.points, ["family"], at) for at in levels}
    rows = []
    for family in FAMILIES:
        own = [cells.filter(pl.col("family") == family).to_dicts() for cells in found.values()]
        rows.append([family, *(cell(of[0], "prior") if of else NEVER for of in own)])
    title = f"{task.study.description['title']}: best prior accuracy, %"
    return Table(title, ["family", *(f"new ≥ {at:.0%}" for at in levels)], rows)
