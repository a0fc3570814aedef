"""Do larger KL steps point more along the forgetting gradient? Every step of a few runs; the paper's Fig. 10."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import Correlation, Estimate, correlation, floats, seed_means
from rlrazor.report.drawing import INK, PALETTE, Axis, Figure, Floats, Marker, Panel, Points, Range
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, in_words, number, written
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import PAPER_LRS, Grid

PRIOR, NEW = "cos_prior_gradient", "cos_new_gradient"
CHANGE, SIZE = "kl_change", "kl_of_step"
BLOCK = 25  # steps: neighbours are near copies of each other, blocks of this length hardly
DRAWN = 3_000  # points a panel; more only make the page heavy
BINS = 10
SHOWN = 0.99  # of the steps' changes of KL: a few of the first steps would squeeze the rest

_NAMES = {PRIOR: "prior task’s gradient", NEW: "new task’s gradient"}


@dataclass(frozen=True)
class Link:
    """The correlation of a cosine with the steps' change of KL in one method, None where there is none.

    `all`: over all steps. `seeds`: one per seed. `within`: of what is left of both without their blocks' means, which
    is without all that changes slowly in the course of a run. `of_size`: with KL(before || after) instead.
    """

    label: str
    all: Correlation | None
    seeds: Estimate | None
    within: float | None
    of_size: float | None

    @property
    def sign(self) -> int:
        """Of Pearson's correlation, 0 where its interval holds 0 or there is none."""
        if self.all is None or self.all.pearson_interval is None:
            return 0
        low, high = self.all.pearson_interval
        return int(low > 0) - int(high < 0)

    @property
    def r(self) -> str:
        """Pearson's correlation over all steps, such as `0.52 [0.41, 0.61]`."""
        return _with_interval(self.all.pearson, self.all.pearson_interval) if self.all else NEVER


Links = Mapping[tuple[str, str], Link]
"""(method, cosine) -> link."""


def section(study: Study) -> Section:
    """The cosines of all steps with both gradients, against their change of KL."""
    steps = in_blocks(study.points)
    found = links(study, steps)
    return Section(
        "dynamics",
        "Do larger KL steps point more along the forgetting gradient?",
        "The paper’s Fig. 10 looks at every training step: does an update that takes the policy further from its base, "
        "in KL on the new task’s inputs, also point more along the gradient of the prior task’s loss?",
        finding(study, found),
        _figure(study, steps, found),
        [_correlations(study, found), _averages(study, steps)],
        f"{how_many(len(steps), 'step')} of {how_many(steps['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}. Cosine: between the step’s update of all weights and the gradient, at "
        "the weights before it, of the prior task’s cross-entropy, or of the new task’s expected error 1 − E[R]. "
        "Positive: the step raises that loss. KL change: of KL(base || policy) on the new task’s inputs, over the "
        "step. Neighbouring steps resemble each other, so intervals of r are from a bootstrap that draws blocks of "
        f"{BLOCK} consecutive steps. r per seed: one r a seed, then their mean. r within blocks: the blocks’ means "
        "subtracted first, so that what merely changes in the course of training (the warm-up, the distance already "
        f"gone) does not count. {INTERVALS} Circles: the mean cosine of each tenth of a method’s steps, by KL change. "
        f"Each panel shows the middle {SHOWN:.0%} of the values.",
    )


def in_blocks(points: pl.DataFrame) -> pl.DataFrame:
    """The steps, each with the `block` of consecutive steps of its run that it belongs to."""
    number_of = ((pl.col("step") - 1) // BLOCK).cast(pl.String)
    return points.with_columns(block=pl.concat_str("trajectory", number_of, separator="/"))


def links(study: Study, steps: pl.DataFrame) -> Links:
    """How both cosines go with the change of KL over the steps of each method."""
    return {
        (method, cosine): _link(study.label(method), steps.filter(pl.col("method") == method), cosine)
        for method, cosine in product(study.methods, _NAMES)
    }


def _link(label: str, steps: pl.DataFrame, cosine: str) -> Link:
    per_seed = [r for rows in steps.partition_by("seed") if (r := _pearson(rows, cosine, CHANGE)) is not None]
    centred = steps.with_columns(pl.col(name) - pl.col(name).mean().over("block") for name in (cosine, CHANGE))
    return Link(
        label,
        correlation(steps, cosine, CHANGE, "block"),
        Estimate.over(per_seed) if per_seed else None,
        _pearson(centred, cosine, CHANGE),
        _pearson(steps, cosine, SIZE),
    )


def _pearson(steps: pl.DataFrame, x: str, y: str) -> float | None:
    found = correlation(steps, x, y, samples=0)
    return found.pearson if found else None


def finding(study: Study, found: Links) -> str:
    """In which methods larger KL steps point along the prior task's gradient, and how it is with the new task's."""
    prior, new = ([found[method, cosine] for method in study.methods] for cosine in (PRIOR, NEW))
    if not any(one.all for one in prior):
        return "The runs have too few steps that differ to correlate their direction with their change of KL."
    by_sign = {sign: [one for one in prior if one.sign == sign] for sign in (1, -1, 0)}
    clauses = [
        f"{words} in {in_words([f'{one.label} (r = {one.r})' for one in of_sign])}"
        for words, of_sign in (
            ("more along the prior task’s gradient", by_sign[1]),
            ("less along the prior task’s gradient", by_sign[-1]),
            ("no more and no less along the prior task’s gradient, as far as can be told,", by_sign[0]),
        )
        if of_sign
    ]
    if len(by_sign[1]) == len(prior):
        paper = ", as the paper finds"
    else:
        paper = ", against the paper" if len(by_sign[-1]) == len(prior) else ""
    others = in_words([f"{one.r} in {one.label}" for one in new])
    return (
        f"Steps that raise KL more point {', and '.join(clauses)}{paper}; for the new task’s gradient r is "
        f"{others} (95 % intervals over blocks of steps, {how_many(len(study.seeds), 'seed')})."
    )


def _correlations(study: Study, found: Links) -> Table:
    rows = []
    for method, (cosine, name) in product(study.methods, _NAMES.items()):
        link = found[method, cosine]
        if link.all is None:
            continue
        rows.append(
            [
                f"{link.label}, {name}",
                f"{link.all.points:,}",
                link.r,
                written(link.seeds, _signed),
                _signed(link.within),
                _with_interval(link.all.spearman, link.all.spearman_interval),
                _signed(link.of_size),
            ]
        )
    headers = ["cosine with", "steps", "r with KL change\n[95 %]", "r per seed", "r within blocks", "Spearman\n[95 %]"]
    return Table("Direction against change of KL", [*headers, "r with KL(before || after)"], rows)


def _averages(study: Study, steps: pl.DataFrame) -> Table:
    signs = steps.with_columns((pl.col(PRIOR) > 0).cast(pl.Float64).alias("forgets"))
    columns = [PRIOR, "forgets", NEW, CHANGE, "update_norm"]
    rows = [
        [
            study.label(row["method"]),
            cell(row, PRIOR, _fine),
            cell(row, "forgets"),
            cell(row, NEW, _fine),
            cell(row, CHANGE, _short),
            cell(row, "update_norm", _short),
        ]
        for row in seed_means(signs, ["method"], columns).to_dicts()
    ]
    headers = ["method", "cosine, prior task", "steps that raise its loss, %", "cosine, new task", "KL change, nats"]
    return Table("The mean step", [*headers, "length of the update"], rows)


def _figure(study: Study, steps: pl.DataFrame, found: Links) -> Figure:
    panels = []
    for cosine, name in _NAMES.items():
        within = _spread(floats(steps, cosine))
        for index, method in enumerate(study.methods):
            own = steps.filter(pl.col("method") == method)
            link = found[method, cosine]
            panels.append(
                Panel(
                    f"{link.label}: r = {link.r}",
                    Axis(
                        "change of KL by the step, nats" if cosine == NEW else "",
                        _spread(floats(own, CHANGE)),
                        percent=False,
                    ),
                    Axis(f"cosine with {name}" if index == 0 else "", within, percent=False),
                    [_cloud(link.label, own, cosine, PALETTE[index % len(PALETTE)]), _course(own, cosine)],
                )
            )
    return Figure("dynamics", panels, columns=len(study.methods))


def _cloud(label: str, steps: pl.DataFrame, cosine: str, color: str) -> Points:
    drawn = steps.gather_every(max(1, ceil(len(steps) / DRAWN)))
    return Points(label, floats(drawn, CHANGE), floats(drawn, cosine), Marker(color, size=3.0, opacity=0.35))


def _course(steps: pl.DataFrame, cosine: str) -> Points:
    """The mean cosine of each tenth of the steps, by their change of KL."""
    finite = steps.filter(pl.col(CHANGE).is_finite(), pl.col(cosine).is_finite()).sort(CHANGE)
    tenths = np.array_split(np.arange(len(finite)), min(BINS, max(len(finite), 1)))
    x, y = (np.array([floats(finite[part], name).mean() for part in tenths if part.size]) for name in (CHANGE, cosine))
    return Points("mean of each tenth", x, y, Marker(INK, "circle", size=5.5, line=True))


def _spread(values: Floats) -> Range | None:
    """The range of the middle values, with a margin."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = np.quantile(finite, [(1 - SHOWN) / 2, (1 + SHOWN) / 2])
    margin = 0.06 * (high - low) or 0.01
    return float(low - margin), float(high + margin)


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return _signed(value) + ("" if interval is None else " [{}, {}]".format(*map(_signed, interval)))


def _signed(value: float | None) -> str:
    return number(value).replace("-", "−")


def _fine(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    # At batch 512 a quick epoch is 118 steps, not 469.
    settings = {"batch_size": 512} if quick else {}
    return [Grid(("grpo", "sft-2"), PAPER_LRS[9:10], {"traced": True}, settings)]


STUDY = PlainStudy(grids, section)
