"""Several output folders side by side, a new task each: RL against SFT, the paper's Fig. 2."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import Estimate, Standing, by_group, difference, shared_threshold
from rlrazor.analysis.statistics import verdict as verdict_of
from rlrazor.errors import RazorError
from rlrazor.report.drawing import PALETTE, Axis, Figure, Layer, Panel
from rlrazor.report.figures import staircase
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import base, cloud, learnt
from rlrazor.report.page import write_comparison
from rlrazor.report.prose import read_prose
from rlrazor.report.study import Section, Study, members, with_family
from rlrazor.report.sweep import read_sweep
from rlrazor.report.tables import FAMILIES
from rlrazor.report.text import INTERVALS, MATCHED, NEVER, how_many, signed

TEXT = Path(__file__).with_suffix(".md")

NAME = "fig2"
_STYLES = {"RL": (PALETTE[0], "circle"), "SFT": (PALETTE[1], "square")}


@dataclass(frozen=True, eq=False)
class FolderSweep:
    """A folder's sweep, and what RL keeps more than SFT at the highest new accuracy that both reach in all seeds."""

    study: Study

    @property
    def name(self) -> str:
        """The new task's."""
        return str(self.study.description["new_task"])

    @cached_property
    def points(self) -> pl.DataFrame:
        """The checkpoints of the two families."""
        return with_family(self.study).drop_nulls("family")

    @cached_property
    def at(self) -> float | None:
        """The accuracy, above the base's; None where there is none."""
        return shared_threshold(self.points, self.study.bases, ["family"], self.study.thresholds)

    @cached_property
    def gap(self) -> Estimate | None:
        """RL's prior accuracy there minus SFT's, seed by seed."""
        if self.at is None:
            return None
        reported = matched(self.points, ["family"], self.at)
        rl, sft = (reported.filter(pl.col("family") == family) for family in FAMILIES)
        return difference(rl, sft, "prior")

    @property
    def verdict(self) -> Standing:
        """Whether RL is better."""
        return verdict_of(self.gap, len(self.study.seeds))


def compare_folders(folders: Sequence[Path], out: Path) -> tuple[Section, Path]:
    """Write OUT/comparison.html and OUT/figures/fig2.*, a panel per folder; return what it found and the page's path.

    Raises RazorError for fewer than two folders, for one that is named twice or holds no sweep, and when `out` cannot
    be written.
    """
    if len(folders) < 2 or len(set(map(os.path.realpath, folders))) < len(folders):
        raise RazorError("A comparison needs at least two different output folders: name each once.")
    section = comparison([FolderSweep(read_sweep(folder, NAME)) for folder in folders])
    return section, write_comparison(section, out)


def comparison(tasks: Sequence[FolderSweep]) -> Section:
    """The section of the comparison page."""
    counts = [
        f"{task.name}: {how_many(len(task.points), 'checkpoint')}, {how_many(len(task.study.seeds), 'seed')}, RL being "
        f"{members(task.study, 'RL')}, SFT being {members(task.study, 'SFT')}"
        for task in tasks
    ]
    prose = read_prose(TEXT, {"tasks": "; ".join(counts), "intervals": INTERVALS, "matched": MATCHED})
    figure = Figure(NAME, [_panel(task) for task in tasks], columns=min(len(tasks), 3))
    tables = [gap_table(tasks).table, *(kept_table(task).table for task in tasks)]
    return Section(NAME, prose.title, prose.question, finding(tasks), figure, tables, prose.note)


def finding(tasks: Sequence[FolderSweep]) -> str:
    """On which tasks RL keeps more than SFT."""
    judged = [
        Judged(task.name if task.at is None else f"{task.name} at new ≥ {task.at:.0%}", task.gap, task.verdict)
        for task in tasks
    ]
    return f"Prior accuracy that RL keeps, against SFT: {in_short(judged)}."


def gap_table(tasks: Sequence[FolderSweep]) -> Keyed:
    """What RL keeps more than SFT, task by task."""
    columns = [
        Column[FolderSweep]("at", "compared at", lambda task: NEVER if task.at is None else f"new ≥ {task.at:.0%}"),
        Column("gap", "RL minus SFT, points", lambda task: signed(task.gap)),
        Column("n", "seeds", lambda task: str(task.gap.seeds if task.gap else 0)),
        Column("verdict", "RL against SFT", lambda task: task.verdict),
    ]
    rows = {str(place): (task.name, task) for place, task in enumerate(tasks)}  # two may have the same name
    return table_of("Prior accuracy kept", "new task", rows, columns)


def kept_table(task: FolderSweep) -> Keyed:
    """What each family keeps at each new accuracy."""

    def at(threshold: float) -> Column[str]:
        kept = by_group(matched(task.points, ["family"], threshold), "family", "prior")
        return Column(f"at-{100 * threshold:g}", f"new ≥ {threshold:.0%}", kept.get)

    title, columns = f"{task.study.description['title']}: prior accuracy kept, %", list(map(at, task.study.thresholds))
    rows = {family: (family, family) for family in FAMILIES}
    return table_of(title, "family", rows, columns, len(task.study.seeds))


def _panel(task: FolderSweep) -> Panel:
    layers: list[Layer] = []
    for family, style in _STYLES.items():
        own = task.points.filter(pl.col("family") == family)
        if len(own):
            layers.append(cloud(family, own, "new", "prior", *style, opacity=0.35))
            layers.append(staircase(f"{family} frontier", own, style[0]))
    layers.append(base(task.study, "new", "prior"))
    new, prior = f"accuracy on {task.name} (new task)", f"accuracy on {task.study.description['prior_task']}"
    return Panel(str(task.study.description["title"]), Axis(new, learnt(task.study)), Axis(prior), layers)
