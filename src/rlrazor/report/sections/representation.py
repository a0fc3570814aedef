"""Does RL keep the representation of unrelated inputs? CKNNA, and CKA, to the base on inputs of neither task."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from rlrazor.analysis import frontier
from rlrazor.analysis.statistics import HALF_POINT, Estimate, difference, floats, matched_accuracy, near_accuracy
from rlrazor.report.drawing import PALETTE, SYMBOLS, Figure, Panel, Points
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import FAMILIES, THRESHOLDS, Table, families_of
from rlrazor.report.text import NEVER, cell, how_many, number, written

CKNNA, CKA = "cknna_on_probe", "cka_on_probe"
NAMES = {CKNNA: "CKNNA", CKA: "CKA"}
PAPER = {"RL": 0.94, "SFT": 0.56}  # Fig. 7 of arXiv:2509.04259: CKNNA of language models


# What the similarity is of, unless the config's `representation` says it.
OF_IMAGES = (
    "Similarity of the last hidden layer to the base’s, 1 for no change, on 1,000 synthetic images of 1/f noise "
    "with task indicator 0: of neither task. White noise would not do, since it averages out in a dense layer; 1/f "
    "noise has the spectrum of natural images and none of either task’s pixels."
)


def applies(study: Study) -> bool:
    """Whether the sweep measured the probe."""
    return CKNNA in study.table.columns


def section(study: Study) -> Section:
    """RL against SFT at matched accuracy, every method beside them."""
    points = with_family(study)
    of_families = points.drop_nulls("family")
    return Section(
        "representation",
        "Does RL keep the representation of unrelated inputs?",
        "The paper finds that at equal accuracy RL leaves a model’s representation of unrelated text nearly as it was "
        "(CKNNA to the base 0.94), and SFT does not (0.56). Is it so here?",
        finding(of_families, study.thresholds, _margin(study)),
        _figure(study),
        [_table(study, points, column) for column in _measured(study)],
        f"{study.description.get('representation', OF_IMAGES)} CKNNA compares mutual nearest neighbours only "
        "(Huh et al. 2024), CKA all pairs of inputs. "
        f"{how_many(len(points), 'checkpoint')}, {how_many(len(study.seeds), 'seed')}. "
        f"Matched: the mean over all checkpoints of a seed whose new accuracy is within {_points(study)} of the "
        "one given, then over seeds ± half the 95 % t-interval; differences are taken "
        f"seed by seed. RL: {members(study, 'RL')}. SFT: {members(study, 'SFT')}. Along training: mean over the "
        "learning rates and schedules of the longest runs, intervals over seeds.",
    )


def finding(points: pl.DataFrame, thresholds: Sequence[float] = THRESHOLDS, margin: float = HALF_POINT) -> str:
    """RL's CKNNA against SFT's at the lowest and the highest new accuracy that most seeds of both reach.

    `points` has `family`.
    """
    compared: list[tuple[float, Estimate, Estimate, Estimate]] = []
    for target in thresholds:
        near = near_accuracy(points, ["family"], target, [CKNNA], margin)
        rl, sft = (near.filter(pl.col("family") == family) for family in FAMILIES)
        gap = difference(rl, sft, CKNNA)
        if gap is None:
            continue
        both = set(rl["seed"]) & set(sft["seed"])
        rl_mean, sft_mean = (
            Estimate.over(side.filter(pl.col("seed").is_in(both))[CKNNA].to_list()) for side in (rl, sft)
        )
        compared.append((target, rl_mean, sft_mean, gap))
    if not compared:
        return (
            f"RL and SFT cannot be compared: no seed has checkpoints of both near a new accuracy of "
            f"{', '.join(f'{target:.0%}' for target in thresholds)}."
        )
    most = max(gap.seeds for *_, gap in compared)
    ends = [row for row in compared if row[3].seeds == most]
    (target, rl_mean, sft_mean, gap), highest = ends[0], ends[-1]
    scores = (
        f"RL’s CKNNA to the base on unrelated inputs is {written(rl_mean, number)}, SFT’s {written(sft_mean, number)}"
    )
    paper = f"(the paper, on language models: {PAPER['RL']} and {PAPER['SFT']})"
    sentence = f"At {target:.0%} new accuracy {scores} {paper}: {_verdict(gap)}"
    if highest[0] > target:
        numbers = f"{written(highest[1], number)} and {written(highest[2], number)}"
        sentence += f"; at {highest[0]:.0%} they are {numbers}: {_verdict(highest[3])}"
    return f"{sentence}."


def _verdict(gap: Estimate) -> str:
    if gap.half is None:
        side = "equal" if gap.mean == 0 else ("higher for RL" if gap.mean > 0 else "higher for SFT")
        return f"{side}, in the one seed there is, which leaves it open"
    size = f"{abs(gap.mean):.2f} ± {gap.half:.2f} over {gap.seeds} seeds"
    if abs(gap.mean) <= gap.half:
        return f"a difference of {size}, which does not tell them apart"
    return f"{'RL' if gap.mean > 0 else 'SFT'} keeps it better, by {size}"


def _table(study: Study, points: pl.DataFrame, column: str) -> Table:
    at, margin = study.thresholds, _margin(study)
    families = matched_accuracy(points.drop_nulls("family"), ["family"], at, [column], margin)
    methods = matched_accuracy(points, ["method"], at, [column], margin)
    named = [(family, families.filter(pl.col("family") == family)) for family in FAMILIES]
    named += [(study.label(method), methods.filter(pl.col("method") == method)) for method in study.methods]
    rows = []
    for name, found in named:
        shown = [cell(row, column, number) for row in found.to_dicts()]
        rows.append([name, *(shown or [NEVER] * len(at))])
    headers = ["method", *(f"new = {target:.0%} ± {100 * margin:g}" for target in at)]
    return Table(f"{NAMES[column]} to the base on unrelated inputs", headers, rows)


def _figure(study: Study) -> Figure:
    against = [
        Panel(
            f"{NAMES[column]} at equal accuracy",
            "new accuracy",
            f"{NAMES[column]} to the base",
            [
                Points(
                    study.label(method),
                    floats(rows, "new"),
                    floats(rows, column),
                    *_style(index),
                    size=4.0 if len(study.points) < 2_000 else 2.2,
                    opacity=0.5,
                )
                for index, method in enumerate(study.methods)
                for rows in [study.points.filter(pl.col("method") == method)]
            ],
            x_range=_reached(study),
            y_percent=False,
        )
        for column in _measured(study)
    ]
    along = [
        Panel(
            f"{NAMES[column]} along training",
            "epoch",
            f"{NAMES[column]} to the base",
            [_course(study, index, method, column) for index, method in enumerate(study.methods)],
            x_percent=False,
            y_percent=False,
        )
        for column in _measured(study)
    ]
    return Figure("representation", [*against, *along], columns=2)


def _course(study: Study, index: int, method: str, column: str) -> Points:
    """A method's mean over its longest runs, by epoch, with an interval over seeds."""
    rows = study.points.filter(pl.col("method") == method, pl.col(column).is_finite())
    rows = rows.filter(pl.col("epochs") == pl.col("epochs").max()).with_columns(pl.col("epoch").round(2))
    per_seed = rows.group_by("epoch", "seed").agg(pl.col(column).mean()).sort("epoch", "seed")
    epochs = per_seed["epoch"].unique(maintain_order=True).to_list()
    values = [per_seed.filter(pl.col("epoch") == epoch)[column].to_list() for epoch in epochs]
    ends = [frontier.t_interval(value) for value in values]
    return Points(
        study.label(method),
        np.array(epochs, float),
        np.array([np.mean(value) for value in values], float),
        *_style(index),
        error_low=np.array([low for low, _ in ends], float),
        error_high=np.array([high for _, high in ends], float),
        line=True,
    )


def _reached(study: Study) -> tuple[float, float]:
    """From the lowest base up: what learnt nothing is no matter of equal accuracy."""
    low, high = floats(study.bases, "new").min(), floats(study.points, "new").max()
    margin = 0.04 * (high - low) if high > low else 0.01
    return float(low - margin), float(max(high, low) + margin)


def _style(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]


def with_family(study: Study) -> pl.DataFrame:
    """The checkpoints with a column `family`: RL, SFT, or null for methods of neither."""
    families = families_of(study.description)
    family_of = {method: family for family, members in families.items() for method in members}
    return study.points.with_columns(
        family=pl.col("method").replace_strict(family_of, default=None, return_dtype=pl.String)
    )


def members(study: Study, family: str) -> str:
    """The methods of the family that the sweep has, for people."""
    among = families_of(study.description)[family]
    return ", ".join(study.label(method) for method in study.methods if method in among) or "none in this sweep"


def _measured(study: Study) -> list[str]:
    return [column for column in NAMES if column in study.points.columns]


def _margin(study: Study) -> float:
    """How near a new accuracy has to be to count as equal: half a point, unless a small test set needs more."""
    return float(study.description.get("accuracy_margin", HALF_POINT))


def _points(study: Study) -> str:
    margin = _margin(study)
    return "half a point" if margin == HALF_POINT else f"{100 * margin:g} points"
