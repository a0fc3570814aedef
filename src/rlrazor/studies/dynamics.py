"""Do larger KL steps point more along the forgetting gradient? Every step of a few runs; the paper's Fig. 10."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil

import numpy as np
import polars as pl

from rlrazor.analysis.law import finite
from rlrazor.analysis.statistics import (
    Correlation,
    Estimate,
    correlation,
    floats,
    mean_of,
    over,
    seed_means,
    verdict,
)
from rlrazor.experiments.parity_mnist.config import PAPER_LRS
from rlrazor.report.drawing import INK, PALETTE, Axis, Figure, Floats, Marker, Panel, Points, Range
from rlrazor.report.keyed import MORE_OR_LESS, Column, Judged, Keyed, in_short, table_of
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, how_many, minus, number, percent, written
from rlrazor.studies.engine import PlainStudy, section_of
from rlrazor.studies.grids import Grid

PRIOR, NEW = "cos_prior_gradient", "cos_new_gradient"
CHANGE, SIZE = "kl_change", "kl_of_step"
BLOCK = 25  # steps: neighbours are near copies of each other, blocks of this length hardly
DRAWN = 3_000  # points a panel; more only make the page heavy
BINS = 10
SHOWN = 0.99  # of the steps' changes of KL: a few of the first steps would squeeze the rest

COSINES = {"prior": PRIOR, "new": NEW}


def grids(quick: bool) -> list[Grid]:
    """Two methods at one learning rate, every step traced."""
    # At batch 512 a quick epoch is 118 steps, not 469.
    settings = {"batch_size": 512} if quick else {}
    return [Grid(("grpo", "sft-2"), PAPER_LRS[9:10], {"traced": True}, settings)]


@dataclass(frozen=True)
class Link:
    """The correlation of a cosine with the steps' change of KL in one method, None where there is none.

    `all`: over all steps. `seeds`: one per seed. `within`: of what is left of both without their blocks' means, which
    is without all that changes slowly in the course of a run. `of_size`: with KL(before || after) instead.
    """

    all: Correlation | None
    seeds: Estimate | None
    within: float | None
    of_size: float | None

    @classmethod
    def of(cls, steps: pl.DataFrame, cosine: str) -> "Link":
        """That of the steps of a method, which `in_blocks` has numbered."""
        per_seed = [r for rows in steps.partition_by("seed") if (r := pearson(rows, cosine, CHANGE)) is not None]
        centred = steps.with_columns(pl.col(name) - pl.col(name).mean().over("block") for name in (cosine, CHANGE))
        return cls(
            correlation(steps, cosine, CHANGE, "block"),
            over(per_seed),
            pearson(centred, cosine, CHANGE),
            pearson(steps, cosine, SIZE),
        )

    @property
    def r(self) -> str:
        """Pearson's correlation over all steps, such as `0.52 [0.41, 0.61]`."""
        return with_interval(self.all.pearson, self.all.pearson_interval) if self.all else NEVER

    @property
    def spearman(self) -> str:
        """Spearman's likewise."""
        return with_interval(self.all.spearman, self.all.spearman_interval) if self.all else NEVER


def pearson(steps: pl.DataFrame, x: str, y: str) -> float | None:
    """Without an interval."""
    found = correlation(steps, x, y, samples=0)
    return found.pearson if found else None


def in_blocks(points: pl.DataFrame) -> pl.DataFrame:
    """The steps, each with the `block` of consecutive steps of its run that it belongs to."""
    number_of = ((pl.col("step") - 1) // BLOCK).cast(pl.String)
    return points.with_columns(block=pl.concat_str("trajectory", number_of, separator="/"))


Links = dict[tuple[str, str], Link]
"""(method, "prior" or "new") -> link."""


def links_of(study: Study) -> Links:
    """How both cosines go with the change of KL over the steps of each method."""
    steps = in_blocks(study.points)
    return {
        (method, task): Link.of(steps.filter(pl.col("method") == method), COSINES[task])
        for method, task in product(study.methods, COSINES)
    }


def section(study: Study) -> Section:
    """The cosines of all steps with both gradients, against their change of KL."""
    links = links_of(study)
    prior, new = (
        in_short([judge(study, links, method, task) for method in study.methods], number, "", MORE_OR_LESS)
        for task in COSINES
    )
    finding = (
        f"Larger KL steps point along the prior task’s gradient (r per seed): {prior}; along the new task’s: {new}."
    )
    return section_of(study, "dynamics", finding, figure(study, links), tables_of(study, links))


def judge(study: Study, links: Links, method: str, task: str) -> Judged:
    """Whether larger KL steps point more along a gradient: by the correlations of the seeds, one each."""
    return Judged.of(study.label(method), links[method, task].seeds, len(study.seeds))


def tables_of(study: Study, links: Links) -> list[Keyed]:
    """The correlations, and the mean step."""
    columns = [
        Column[Link]("steps", "steps", lambda link: f"{link.all.points:,}" if link.all else NEVER),
        Column("r", "r with KL change\n[95 %]", lambda link: link.r),
        Column("seeds", "r per seed", lambda link: written(link.seeds, number)),
        Column("within", f"r within blocks\nof {how_many(BLOCK, 'step')}", lambda link: number(link.within)),
        Column("spearman", "Spearman\n[95 %]", lambda link: link.spearman),
        Column("of-size", "r with KL(before || after)", lambda link: number(link.of_size)),
        Column("verdict", "verdict", lambda link: MORE_OR_LESS[verdict(link.seeds, len(study.seeds))]),
    ]
    rows = {
        f"{method}.{task}": (f"{study.label(method)}, {task} task’s gradient", link)
        for (method, task), link in links.items()
    }
    return [table_of("Direction against change of KL", "cosine with", rows, columns), mean_step(study)]


def mean_step(study: Study) -> Keyed:
    """The mean over the steps of each method."""
    measured = {
        "cos-prior": ("cosine, prior task", PRIOR, "{:.3f}".format),
        "raise": ("steps that raise its loss, %", "raises", percent),
        "cos-new": ("cosine, new task", NEW, "{:.3f}".format),
        "change": ("KL change, nats", CHANGE, "{:.2g}".format),
        "length": ("length of the update", "update_norm", "{:.2g}".format),
    }

    steps = study.points.with_columns(raises=(pl.col(PRIOR) > 0).cast(pl.Float64))
    means = seed_means(steps, ["method"], [column for _, column, _ in measured.values()])

    def cell(method: str, column: str, form: Callable[[float], str]) -> str:
        return minus(written(mean_of(means.filter(method=method), column), form))

    columns = [
        Column[str](key, header, partial(cell, column=column, form=form))
        for key, (header, column, form) in measured.items()
    ]
    rows = {method: (study.label(method), method) for method in study.methods}
    return table_of("The mean step", "method", rows, columns)


def figure(study: Study, links: Links) -> Figure:
    """A row of panels for each gradient, a column for each method."""
    panels = []
    for (task, cosine), (place, method) in product(COSINES.items(), enumerate(study.methods)):
        own, label = study.points.filter(pl.col("method") == method), study.label(method)
        x_label = "change of KL by the step, nats" if task == "new" else ""
        y_label = f"cosine with {task} task’s gradient" if place == 0 else ""
        x_axis = Axis(x_label, spread(floats(own, CHANGE)), percent=False)
        y_axis = Axis(y_label, spread(floats(study.points, cosine)), percent=False)
        layers = [cloud(label, own, cosine, PALETTE[place % len(PALETTE)]), course(own, cosine)]
        panels.append(Panel(f"{label}: r = {links[method, task].r}", x_axis, y_axis, layers))
    return Figure("dynamics", panels, columns=len(study.methods))


def cloud(label: str, steps: pl.DataFrame, cosine: str, color: str) -> Points:
    """Every step, or as many as a page can bear."""
    drawn = steps.gather_every(max(1, ceil(len(steps) / DRAWN)))
    return Points(label, floats(drawn, CHANGE), floats(drawn, cosine), Marker(color, size=3.0, opacity=0.35))


def course(steps: pl.DataFrame, cosine: str) -> Points:
    """The mean cosine of each tenth of the steps, by their change of KL."""
    known = finite(steps, (CHANGE, cosine)).sort(CHANGE)
    tenths = np.array_split(np.arange(len(known)), min(BINS, max(len(known), 1)))
    x, y = (np.array([floats(known[part], name).mean() for part in tenths if part.size]) for name in (CHANGE, cosine))
    return Points("mean of each tenth", x, y, Marker(INK, size=5.5, line=True))


def spread(values: Floats) -> Range | None:
    """The range of the middle values, with a margin."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - SHOWN) / 2, (1 + SHOWN) / 2])
    margin = 0.06 * (high - low) or 0.01
    return float(low - margin), float(high + margin)


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """Such as `0.52 [0.41, 0.61]`."""
    return number(value) + ("" if interval is None else " [{}, {}]".format(*map(number, interval)))


STUDY = PlainStudy(section, grids=grids)
