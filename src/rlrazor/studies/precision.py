"""Is the sparsity of an update rounding? The same runs with float32 and with bfloat16 weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    difference,
    direction,
    floats,
    matched_accuracy,
    near_accuracy,
    seed_means,
    with_params,
)
from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Figure, Layer, Panel, Range
from rlrazor.report.layers import cloud, learnt, means
from rlrazor.report.sections.statistics import over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Table
from rlrazor.report.text import INTERVALS, cell, how_many, in_words, nats, percent, signed, written
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import LRS, Grid

SPARSITY, RANK = "weight_sparsity", "weight_rank"
PRECISIONS = ("float32", "bfloat16")
ARM = ("method", "precision")
TARGETS = (*reversed(THRESHOLDS), 0.94, 0.93)
SPARSE = 0.5  # most parameters unchanged
FULL = 0.8  # of the full rank: every unit that no image switches on costs one

_SYMBOLS = ("circle", "diamond")


@dataclass(frozen=True)
class Comparison:
    """One method's sparsity at one new accuracy, over the seeds that have checkpoints there in both precisions."""

    label: str
    float32: Estimate
    bfloat16: Estimate
    gap: Estimate
    ranks: Sequence[float]

    @property
    def is_dense_to_sparse(self) -> bool:
        """Whether most parameters move in float32, and do not in bfloat16."""
        return self.float32.mean < SPARSE <= self.bfloat16.mean


def section(study: Study) -> Section:
    """Sparsity and rank of the update in both precisions, at equal accuracy."""
    points = with_params(study.points, precision=PRECISIONS[0])
    at, compared = comparisons(study, points)
    floor = floor_of(points)
    return Section(
        "precision",
        "Is the sparsity of an update rounding?",
        "Fine-tuning with RL has been reported to change only a small part of the weights. The paper says that this is "
        "bfloat16 rounding small changes away. Here the same runs are trained with float32 weights, and with weights "
        "rounded to bfloat16 after every step.",
        finding(study, at, compared, floor),
        _figure(study, points, floor),
        _tables(study, points, at),
        f"{how_many(len(points), 'checkpoint')}, {how_many(len(study.seeds), 'seed')}. Sparsity: the share of "
        "parameters exactly as they were in the base. In bfloat16 runs every weight, the base’s too, is rounded to the "
        "nearest bfloat16, which has 8 significant bits: a change of less than about 0.2 % of a weight is lost. "
        f"{_about_floor(floor)}Rank: singular values of each layer’s update above numpy’s tolerance, as a share of "
        "full rank. Equal accuracy: the mean over all checkpoints of a seed whose new accuracy is within half a point "
        f"of the one given. {INTERVALS}",
    )


def comparisons(study: Study, points: pl.DataFrame) -> tuple[float, list[Comparison]]:
    """The new accuracy near which most seeds have checkpoints of both precisions, and each method's sparsity there."""
    best: tuple[float, list[Comparison]] = TARGETS[0], []
    for target in TARGETS:
        near = near_accuracy(points, ARM, target, [SPARSITY, RANK])
        compared = [one for method in study.methods if (one := _compare(study.label(method), near, method))]
        if sum(one.gap.seeds for one in compared) > sum(one.gap.seeds for one in best[1]):
            best = target, compared
    return best


def _compare(label: str, near: pl.DataFrame, method: str) -> Comparison | None:
    sides = [near.filter(pl.col("method") == method, pl.col("precision") == precision) for precision in PRECISIONS]
    gap = difference(sides[1], sides[0], SPARSITY)
    if gap is None:
        return None
    both = set(sides[0]["seed"]) & set(sides[1]["seed"])
    shared = [side.filter(pl.col("seed").is_in(both)).sort("seed") for side in sides]
    float32, bfloat16 = (Estimate.over(side[SPARSITY].to_list()) for side in shared)
    return Comparison(label, float32, bfloat16, gap, [Estimate.over(side[RANK].to_list()).mean for side in shared])


def floor_of(points: pl.DataFrame) -> float | None:
    """The least share of parameters that any float32 checkpoint left unchanged: hardly more than cannot move."""
    values = floats(points.filter(pl.col("precision") == PRECISIONS[0]), SPARSITY)
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else None


def finding(study: Study, at: float, compared: Sequence[Comparison], floor: float | None) -> str:
    """What rounding does to the sparsity of each method's update, near a new accuracy of `at`."""
    if not compared:
        return (
            "float32 and bfloat16 cannot be compared: in no seed does a method have checkpoints of both near the same "
            f"new accuracy ({in_words([f'{target:.0%}' for target in TARGETS])})."
        )
    plain = in_words([f"{written(one.float32)} % of {one.label}’s parameters" for one in compared])
    rounded = in_words([f"{written(one.bfloat16)} % of {one.label}’s" for one in compared])
    least = "" if floor is None else f" (the least of any float32 run is {percent(floor)} %)"
    seeds = max(one.gap.seeds for one in compared)
    return (
        f"At {at:.0%} new accuracy, float32 weights leave {plain} exactly unchanged{least}, bfloat16 weights "
        f"{rounded}: {_verdict(compared, len(study.seeds))}{_at_lowest_rate(study)}; {_about_ranks(compared)} "
        f"({over_seeds(seeds)})."
    )


def _verdict(compared: Sequence[Comparison], seeds: int) -> str:
    rising = [direction(one.gap, seeds) > 0 for one in compared]
    explained = [rises and one.is_dense_to_sparse for rises, one in zip(rising, compared, strict=True)]
    if all(explained):
        return "sparsity is rounding"
    if any(explained):
        labels = [one.label for one in compared]
        yes = [label for label, is_rounding in zip(labels, explained, strict=True) if is_rounding]
        return f"sparsity is rounding for {in_words(yes)}, not for {in_words([x for x in labels if x not in yes])}"
    gaps = in_words([f"{signed(one.gap)} points for {one.label}" for one in compared])
    if not all(rising):
        return f"rounding does not explain sparsity ({gaps})"
    if any(one.float32.mean >= SPARSE for one in compared):
        return f"rounding adds to a sparsity that is there without it ({gaps})"
    return f"rounding leaves more unchanged ({gaps}), but most parameters still move"


def _at_lowest_rate(study: Study) -> str:
    """What each precision leaves unchanged by the end of the runs at the lowest learning rate, where there are more."""
    points = with_params(study.points, precision=PRECISIONS[0])
    if points["lr"].n_unique() < 2:
        return ""
    lowest = points.filter(pl.col("lr") == pl.col("lr").min())
    last = lowest.filter(pl.col("step") == pl.col("step").max().over("trajectory"))
    said = []
    for method in study.methods:
        shares = [
            last.filter(pl.col("method") == method, pl.col("precision") == precision).sort("seed")[SPARSITY].to_list()
            for precision in PRECISIONS
        ]
        if all(shares):
            float32, bfloat16 = (written(Estimate.over(values)) for values in shares)
            said.append(f"{bfloat16} % of {study.label(method)}’s in bfloat16 and {float32} % in float32")
    rate = f"{lowest['lr'][0]:.1e}"
    return f"; at the end of training at the lowest learning rate, {rate}, it is {in_words(said)}" if said else ""


def _about_ranks(compared: Sequence[Comparison]) -> str:
    ranks = [rank for one in compared for rank in one.ranks]
    low, high = percent(min(ranks)), percent(max(ranks))
    within = f"{low} %" if low == high else f"{low} to {high} %"
    return f"the updates’ rank is {'nearly full, ' if min(ranks) >= FULL else ''}{within} of full"


def _about_floor(floor: float | None) -> str:
    if floor is None:
        return ""
    return (
        f"The dashed line, {percent(floor)} %, is the least that any float32 checkpoint left unchanged: weights from "
        "pixels that no image lights, and of units that no image switches on, have no gradient in any precision, and "
        "such units cost rank as well. "
    )


def _tables(study: Study, points: pl.DataFrame, at: float) -> list[Table]:
    targets = sorted({*THRESHOLDS, at})
    cells = matched_accuracy(points, ARM, targets, [SPARSITY, RANK, "prior", "kl_forward"])
    unchanged, others = [], []
    for method, precision in _arms(study, points):
        own = cells.filter(pl.col("method") == method, pl.col("precision") == precision).sort("target")
        name = _name(study, method, precision)
        unchanged.append([name, *(cell(row, SPARSITY) for row in own.to_dicts())])
        [row] = own.filter(pl.col("target") == at).to_dicts()
        others.append([name, cell(row, RANK), cell(row, "prior"), cell(row, "kl_forward", nats)])
    headers = ["arm", *(f"new = {target:.0%} ± 0.5" for target in targets)]
    return [
        Table("Parameters exactly unchanged, %", headers, unchanged),
        Table(f"At new = {at:.0%} ± 0.5", ["arm", "rank, % of full", "prior kept, %", "forward KL, nats"], others),
    ]


def _figure(study: Study, points: pl.DataFrame, floor: float | None) -> Figure:
    new, rates = learnt(study), floats(points, "lr")
    return Figure(
        "precision",
        [
            Panel(
                "Sparsity at equal accuracy",
                Axis("new accuracy", new),
                Axis("parameters unchanged", (-0.03, 1.03)),
                [*_clouds(study, points, SPARSITY), *_floor(floor, new)],
            ),
            Panel(
                "Sparsity after training",
                Axis(
                    "learning rate",
                    percent=False,
                    log=True,
                    ticks=[(rate, f"{rate:.2g}") for rate in sorted(set(rates.tolist()))],
                ),
                Axis("parameters unchanged", (-0.03, 1.03)),
                [*_by_rate(study, points), *_floor(floor, (float(rates.min()), float(rates.max())))],
            ),
            Panel(
                "Rank of the update",
                Axis("new accuracy", new),
                Axis("share of full rank", (-0.03, 1.03)),
                _clouds(study, points, RANK),
            ),
        ],
        columns=3,
    )


def _clouds(study: Study, points: pl.DataFrame, column: str) -> list[Layer]:
    return [
        cloud(_name(study, *arm), _of(points, arm), "new", column, *_style(study, *arm)) for arm in _arms(study, points)
    ]


def _by_rate(study: Study, points: pl.DataFrame) -> list[Layer]:
    """Each arm's last checkpoints, by learning rate."""
    last = points.filter(pl.col("step") == pl.col("step").max().over("trajectory"))
    layers: list[Layer] = []
    for arm in _arms(study, points):
        rates = seed_means(_of(last, arm).sort("lr"), ["lr"], [SPARSITY])
        layers.append(means(_name(study, *arm), rates, rates["lr"].to_list(), SPARSITY, *_style(study, *arm)))
    return layers


def _floor(floor: float | None, across: Range) -> list[Layer]:
    return [] if floor is None else [Curve("least in float32", np.array(across), np.full(2, floor), INK, dashed=True)]


def _arms(study: Study, points: pl.DataFrame) -> list[tuple[str, str]]:
    present = set(points.select(ARM).unique().rows())
    return [arm for method in study.methods for precision in PRECISIONS if (arm := (method, precision)) in present]


def _of(points: pl.DataFrame, arm: tuple[str, str]) -> pl.DataFrame:
    return points.filter(pl.col("method") == arm[0], pl.col("precision") == arm[1])


def _name(study: Study, method: str, precision: str) -> str:
    return f"{study.label(method)}, {precision}"


def _style(study: Study, method: str, precision: str) -> tuple[str, str]:
    return PALETTE[study.methods.index(method) % len(PALETTE)], _SYMBOLS[PRECISIONS.index(precision)]


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Grid(("grpo", "sft-2"), lrs, variant) for variant in ({}, {"precision": "bfloat16"})]


STUDY = PlainStudy(grids, section)
