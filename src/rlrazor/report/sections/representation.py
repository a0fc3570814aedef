"""Does RL keep the representation of unrelated inputs? CKNNA, and CKA, to the base on inputs of neither task."""

from pathlib import Path

import polars as pl

from rlrazor.analysis.statistics import (
    HALF_POINT,
    Estimate,
    by_group,
    difference,
    mean_of,
    near_accuracy,
    seed_means,
    verdict,
)
from rlrazor.report.drawing import Axis, Figure, Panel, style_of
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import clouds, learnt, means
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study, members, with_family
from rlrazor.report.tables import FAMILIES
from rlrazor.report.text import number, signed, with_seeds, written

TEXT = Path(__file__).with_suffix(".md")

NAMES = {"cknna_on_probe": "CKNNA", "cka_on_probe": "CKA"}
MAIN = "cknna_on_probe"

# What the similarity is of, unless the config's `representation` says it.
OF_IMAGES = (
    "Similarity of the last hidden layer to the base’s, 1 for no change, on 1,000 synthetic images of 1/f noise "
    "with task indicator 0: of neither task. White noise would not do, since it averages out in a dense layer; 1/f "
    "noise has the spectrum of natural images and none of either task’s pixels."
)


Sides = tuple[Estimate | None, Estimate | None, Estimate | None]
"""RL's mean, SFT's, and the one minus the other."""


def applies(study: Study) -> bool:
    """Whether the sweep measured the probe."""
    return MAIN in study.table.columns


def section(study: Study) -> Section:
    """RL against SFT at matched accuracy, every method beside them."""
    measured = [column for column in NAMES if column in study.points.columns]
    against = [_against_panel(study, column) for column in measured]
    along = [_along_panel(study, column) for column in measured]
    tables = [gap_table(study, column) for column in measured] + [method_table(study, column) for column in measured]
    numbers = {
        "inputs": str(study.description.get("representation", OF_IMAGES)),
        "margin": f"{100 * margin_of(study):g}",
        "rl": members(study, "RL"),
        "sft": members(study, "SFT"),
    }
    return told(study, TEXT, Shown(finding(study), Figure("representation", [*against, *along], 2), tables, numbers))


def finding(study: Study) -> str:
    """Whether RL keeps more than SFT does, at each new accuracy."""
    judged = []
    for target in study.thresholds:
        gap = sides(study, MAIN, target)[2]
        judged.append(Judged.of(f"at new = {target:.0%}", gap, len(study.seeds)))
    return f"CKNNA to the base on unrelated inputs, RL against SFT: {in_short(judged, number, unit='')}."


def margin_of(study: Study) -> float:
    """How near a new accuracy has to be to count as equal: half a point, unless a small test set needs more."""
    return float(study.description.get("accuracy_margin", HALF_POINT))


def sides(study: Study, column: str, target: float) -> Sides:
    """RL's and SFT's mean at a new accuracy, in the seeds that have both, and the one minus the other."""
    near = near_accuracy(with_family(study).drop_nulls("family"), ["family"], target, [column], margin_of(study))
    rl, sft = (near.filter(pl.col("family") == family) for family in FAMILIES)
    rl, sft = rl.join(sft, on="seed", how="semi"), sft.join(rl, on="seed", how="semi")
    return mean_of(rl, column), mean_of(sft, column), difference(rl, sft, column)


def gap_table(study: Study, column: str) -> Keyed:
    """RL beside SFT at each new accuracy."""
    name, total = NAMES[column], len(study.seeds)
    columns = [
        Column[Sides]("rl", "RL", lambda sides: written(sides[0], number)),
        Column("sft", "SFT", lambda sides: written(sides[1], number)),
        Column("gap", "RL minus SFT", lambda sides: signed(sides[2], number)),
        Column("n", "seeds", lambda sides: f"{sides[2].seeds if sides[2] else 0} of {total}"),
        Column("verdict", "RL against SFT", lambda sides: verdict(sides[2], total)),
    ]
    rows = {
        f"{name.lower()}.{100 * at:g}": (f"new = {at:.0%} ± {100 * margin_of(study):g}", sides(study, column, at))
        for at in study.thresholds
    }
    return table_of(f"{name} to the base at equal accuracy", "at", rows, columns)


def method_table(study: Study, column: str) -> Keyed:
    """Each family and method at each new accuracy."""
    points, name = with_family(study), NAMES[column]

    def at(target: float) -> Column[tuple[str, str]]:
        def kept(one: tuple[str, str]) -> str:
            by, value = one
            found = near_accuracy(points.filter(pl.col(by) == value), [by], target, [column], margin_of(study))
            mean, seeds = mean_of(found, column), points.filter(pl.col(by) == value)["seed"].n_unique()
            return with_seeds(written(mean, number), mean, seeds)

        return Column(f"at-{100 * target:g}", f"new = {target:.0%} ± {100 * margin_of(study):g}", kept)

    of_families = {family: (family, ("family", family)) for family in FAMILIES}
    of_methods = {method: (study.label(method), ("method", method)) for method in study.methods}
    rows = {f"{value}.{name.lower()}": of for value, of in {**of_families, **of_methods}.items()}
    return table_of(f"{name} to the base on unrelated inputs", "method", rows, list(map(at, study.thresholds)))


def _against_panel(study: Study, column: str) -> Panel:
    """The similarity against new accuracy, all checkpoints."""
    layers = clouds(study, "new", column, size=4.0 if len(study.points) < 2_000 else 2.2, opacity=0.5)
    name = f"{NAMES[column]} to the base"
    title = f"{NAMES[column]} at equal accuracy"
    return Panel(title, Axis("new accuracy", learnt(study)), Axis(name, percent=False), layers)


def _along_panel(study: Study, column: str) -> Panel:
    """Each method's mean over its longest runs, by epoch, with an interval over seeds."""
    layers = []
    for index, method in enumerate(study.methods):
        rows = study.points.filter(pl.col("method") == method).filter(pl.col("epochs") == pl.col("epochs").max())
        by_epoch = seed_means(rows.with_columns(pl.col("epoch").round(2)), ["epoch"], [column]).sort("epoch")
        found = by_group(by_epoch, "epoch", column)
        layers.append(means(study.label(method), [*found.values()], [*found], style_of(index), line=True))
    name = f"{NAMES[column]} to the base"
    return Panel(f"{NAMES[column]} along training", Axis("epoch", percent=False), Axis(name, percent=False), layers)
