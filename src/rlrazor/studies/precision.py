"""Is the sparsity of an update rounding? The same runs with float32 and with bfloat16 weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    by_group,
    difference,
    floats,
    near_accuracy,
    seed_means,
    with_params,
)
from rlrazor.report.drawing import PALETTE, Axis, Figure, Layer, Panel, Range
from rlrazor.report.keyed import MORE_OR_LESS, Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import learnt, level, means
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS
from rlrazor.report.text import NEVER, nats, percent, signed, written
from rlrazor.studies.engine import KL, Arm, Arms, At, Compared, PlainStudy, Style, section_of
from rlrazor.studies.grids import LRS, Grid
from rlrazor.studies.panels import clouds
from rlrazor.studies.tables import ends_of

SPARSITY, RANK = "weight_sparsity", "weight_rank"
FULL, ROUNDED = "float32", "bfloat16"
TARGETS = (*reversed(THRESHOLDS), 0.94, 0.93)
SHARES = (-0.03, 1.03)
CELLS: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
    "unchanged": (SPARSITY, "unchanged, %", percent),
    "rank": (RANK, "rank, % of full", percent),
    "prior": ("prior", "prior, %", percent),
    "kl": (KL, "forward KL, nats", nats),
}


def grids(quick: bool) -> list[Grid]:
    """The same runs in both precisions."""
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Grid(("grpo", "sft-2"), lrs, variant) for variant in ({}, {"precision": ROUNDED})]


def where_most(points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], targets: Sequence[float]) -> float | None:
    """The new accuracy near which most seeds have checkpoints of both precisions; the first of several."""
    pairs = {}
    for target in targets:
        near = near_accuracy(points, by, target, [SPARSITY, RANK])
        pairs[target] = near.group_by("method", "seed").len().filter(pl.col("len") == 2).height
    best = max(targets, key=lambda target: pairs[target])
    return best if pairs[best] else None


def style(compared: Compared, arm: Arm) -> Style:
    """A colour for each method, a symbol for each precision."""
    return PALETTE[compared.place(arm, 0) % len(PALETTE)], "diamond" if arm[1] == ROUNDED else "circle"


ARMS = Arms(
    ("method", "precision"),
    label=lambda study, arm: f"{study.label(arm[0])}, {arm[1]}",
    prepare=lambda points: with_params(points, precision=FULL),
    style=style,
)


def section(study: Study) -> Section:
    """Sparsity and rank of the update in both precisions, at equal accuracy and after training."""
    compared = compared_in(study)
    rounded = [arm for arm in compared.arms if arm[1] == ROUNDED]
    near, end = (
        in_short([judge(compared, chosen, arm) for arm in rounded], words=MORE_OR_LESS) for chosen in places(compared)
    )
    finding = (
        f"Parameters left unchanged by bfloat16 against float32, at {compared.at:.0%} new accuracy: {near}; "
        f"after the lowest rate: {end}."
    )
    return section_of(study, "precision", finding, figure(compared), tables_of(compared), compared.at)


def compared_in(study: Study) -> Compared:
    """The arms, and the new accuracy at which they are compared."""
    return Compared.make(study, ARMS, At(TARGETS, where_most))


def places(compared: Compared) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What is compared, a row per arm and seed: means at equal accuracy, and the ends of runs at the lowest rate."""
    columns = [column for column, *_ in CELLS.values()]
    near = near_accuracy(compared.points, ARMS.by, compared.at, columns)
    return near, ends_of(compared.points.filter(pl.col("lr") == pl.col("lr").min()))


def tables_of(compared: Compared) -> list[Keyed]:
    """What is unchanged at each new accuracy, both places side by side, and the least."""
    near, end = places(compared)
    lowest, floor = f"{end['lr'][0]:.1e}", percent(floor_of(compared.points))
    return [
        by_accuracy(compared),
        side_by_side(compared, near, f"At new = {compared.at:.0%} ± 0.5"),
        side_by_side(compared, end, f"After training at the lowest learning rate, {lowest}", "end."),
        Keyed("Of all float32 checkpoints", "", {"floor": "least unchanged, %"}, {"": ("all", {"floor": floor})}),
    ]


def floor_of(points: pl.DataFrame) -> float | None:
    """The least share of parameters that any float32 checkpoint left unchanged: hardly more than cannot move."""
    values = floats(points.filter(pl.col("precision") == FULL), SPARSITY)
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else None


def judge(compared: Compared, chosen: pl.DataFrame, arm: Arm) -> Judged:
    """What an arm leaves unchanged beside the same method in float32; `chosen` has a row for each arm and seed."""
    gap = difference(compared.rows(arm, chosen), compared.rows((arm[0], FULL), chosen), SPARSITY)
    return Judged.of(compared.label(arm), gap, len(compared.study.seeds))


def by_accuracy(compared: Compared) -> Keyed:
    """What each arm leaves unchanged at each new accuracy."""

    def at(target: float) -> Column[Arm]:
        near = near_accuracy(compared.points, ARMS.by, target, [SPARSITY])
        kept = partial(compared.mean, table=near, column=SPARSITY)
        return Column(f"at-{100 * target:g}", f"new = {target:.0%} ± 0.5", kept)

    seeds = len(compared.study.seeds)
    return table_of("Parameters exactly unchanged, %", "arm", compared.named, list(map(at, THRESHOLDS)), seeds)


def side_by_side(compared: Compared, chosen: pl.DataFrame, title: str, prefix: str = "") -> Keyed:
    """Each arm's checkpoints, and what bfloat16 leaves unchanged beyond float32."""
    judged = {arm: judge(compared, chosen, arm) for arm in compared.arms if arm[1] == ROUNDED}
    columns = [
        *(
            Column(
                f"{prefix}{name}",
                header,
                partial(compared.mean, table=chosen, column=column),
                partial(written, form=form),
            )
            for name, (column, header, form) in CELLS.items()
        ),
        Column(
            f"{prefix}gap",
            "minus float32, points",
            lambda arm: signed(judged[arm].gap) if arm in judged else NEVER,
        ),
        Column(
            f"{prefix}verdict",
            "verdict",
            lambda arm: MORE_OR_LESS[judged[arm].verdict] if arm in judged else NEVER,
        ),
    ]
    return table_of(title, "arm", compared.named, columns, len(compared.study.seeds))


def figure(compared: Compared) -> Figure:
    """Sparsity by new accuracy and by learning rate, rank by new accuracy."""
    new, floor = Axis("new accuracy", learnt(compared.study)), floor_of(compared.points)
    rates = sorted(set(floats(compared.points, "lr").tolist()))
    by_rate = Axis("learning rate", percent=False, log=True, ticks=[(rate, f"{rate:.2g}") for rate in rates])
    unchanged = Axis("parameters unchanged", SHARES)
    sparsity = [*clouds(compared, "new", SPARSITY), *least(floor, new.ends)]
    after = [*after_training(compared), *least(floor, (rates[0], rates[-1]))]
    panels = [
        Panel("Sparsity at equal accuracy", new, unchanged, sparsity),
        Panel("Sparsity after training", by_rate, unchanged, after),
        Panel("Rank of the update", new, Axis("share of full rank", SHARES), clouds(compared, "new", RANK)),
    ]
    return Figure("precision", panels, columns=3)


def after_training(compared: Compared) -> list[Layer]:
    """Each arm's last checkpoints, by learning rate."""
    layers: list[Layer] = []
    for arm in compared.arms:
        ends = ends_of(compared.rows(arm)).sort("lr", maintain_order=True)
        rates = by_group(seed_means(ends, ["lr"], [SPARSITY]), "lr", SPARSITY)
        layers.append(means(compared.label(arm), [*rates.values()], [*rates], compared.style(arm), line=True))
    return layers


def least(floor: float | None, across: Range) -> list[Layer]:
    """What float32 leaves unchanged at least."""
    return [] if floor is None else [level("least in float32", floor, across)]


STUDY = PlainStudy(section, grids=grids)
