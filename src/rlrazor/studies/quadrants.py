"""On-policy data or negative examples: which of the two makes RL forget less? The paper's Fig. 4, on this task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import polars as pl

from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import (
    Estimate,
    in_all_seeds,
    over,
    shared_threshold,
)
from rlrazor.errors import RazorError
from rlrazor.report.drawing import PALETTE, Axis, Layer, Panel
from rlrazor.report.keyed import MORE_OR_LESS, Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import height, level, means
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, nats, signed, written
from rlrazor.studies import panels
from rlrazor.studies.engine import (
    KL,
    Arm,
    Arms,
    At,
    Compared,
    PlainStudy,
    Style,
    figure_of,
    kept_table,
    levels_table,
    rates_panels,
    rates_tables,
    section_of,
)
from rlrazor.studies.grids import LRS, Grid

Quadrant = tuple[bool, bool]
"""On-policy, with negative examples."""

# Unless the config says otherwise.
QUADRANTS: Mapping[str, Quadrant] = {
    "grpo": (True, True),
    "reinforce": (True, False),
    "sft-2": (False, False),
    "simpo": (False, True),
}
COLORS = {(True, True): PALETTE[0], (True, False): PALETTE[5], (False, False): PALETTE[4], (False, True): PALETTE[1]}
DATA = {True: "on-policy", False: "offline"}
WITH = {True: "with negatives", False: "no negatives"}
# What each factor is worth: the weights of its quadrants.
FACTORS: Mapping[str, tuple[str, Mapping[Quadrant, float]]] = {
    "data": ("being on-policy", {of: 0.5 if of[0] else -0.5 for of in COLORS}),
    "negatives": ("negative examples", {of: 0.5 if of[1] else -0.5 for of in COLORS}),
    "interaction": ("interaction", {of: 1.0 if of[0] == of[1] else -1.0 for of in COLORS}),
}


def grids(quick: bool) -> list[Grid]:
    """The four, at the same learning rates."""
    return [Grid(tuple(QUADRANTS), LRS[1:4] if quick else LRS)]


def applies(study: Study) -> bool:
    """Whether the sweep's config says which methods the four are, and it has runs of them all."""
    return "quadrants" in study.description and set(quadrants_of(study)) <= set(study.methods)


def quadrants_of(study: Study) -> Mapping[str, Quadrant]:
    """The four methods, one for each quadrant.

    Those of the config's `quadrants`: method -> [on-policy, with negatives]. Where it names several for a quadrant, the
    first that the study has runs of. Raises RazorError where it leaves a quadrant without a method.
    """
    named: Mapping[str, Sequence[bool]] = study.description.get("quadrants", QUADRANTS)
    first: dict[Quadrant, str] = {}
    for method in sorted(named, key=lambda name: name not in study.methods):
        own, wrong = named[method]
        first.setdefault((bool(own), bool(wrong)), method)
    if len(first) < len(QUADRANTS):
        raise RazorError(
            "The config's quadrants leave one of the four without a method: on-policy or offline, each with and "
            "without negatives."
        )
    return {method: of for of, method in first.items()}


def label(study: Study, arm: Arm) -> str:
    """The method and its quadrant."""
    own, wrong = quadrants_of(study)[arm[0]]
    return f"{study.label(arm[0])}: {DATA[own]}, {WITH[wrong]}"


def style(compared: Compared, arm: Arm) -> Style:
    """A colour for each quadrant, a diamond with negatives."""
    of = quadrants_of(compared.study)[arm[0]]
    return COLORS[of], "diamond" if of[1] else "circle"


def all_reach(points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], at: Sequence[float]) -> float | None:
    """The highest new score above the base's that all four reach in all seeds."""
    highest = shared_threshold(points, bases, by, at)
    if highest is None or in_all_seeds(points, by, highest) < len(QUADRANTS):
        return None
    return highest


def compared_in(study: Study) -> Compared:
    """The four, at the highest new score that can be compared: a threshold, or one of three points below the lowest."""
    four = list(quadrants_of(study))
    lowest = study.thresholds[0]
    ladder = (*(round(lowest - point / 100, 4) for point in (3, 2, 1)), *study.thresholds)
    of = Arms(("method",), label, lambda points: points.filter(pl.col("method").is_in(four)), style)
    return Compared.make(study, of, At(ladder, all_reach))


def levels_of(compared: Compared) -> dict[str, float]:
    """The lowest and the highest new score at which the four are compared, and what thresholds lie between."""
    untuned, highest = max(compared.study.bases["new"]), compared.at
    lowest, *between = sorted({highest, *(at for at in compared.study.thresholds if untuned < at <= highest)})
    return {"lowest": lowest, **{f"at-{100 * at:g}": at for at in between if at < highest}, "highest": highest}


def effects(
    kept: pl.DataFrame, column: str, quadrants: Mapping[str, Quadrant] = QUADRANTS
) -> Mapping[str, Estimate | None]:
    """The main effects and the interaction of the 2 x 2, of `column`, over the seeds that all four methods have.

    `kept` has a row per method and seed. None where no seed has all four.
    """
    scores: dict[int, dict[Quadrant, float]] = {}
    for row in kept.sort("seed").to_dicts():
        scores.setdefault(row["seed"], {})[quadrants[row["method"]]] = row[column]
    whole = [of for of in scores.values() if len(of) == len(QUADRANTS)]
    worth = {
        factor: [sum(weight * of[quadrant] for quadrant, weight in weights.items()) for of in whole]
        for factor, (_, weights) in FACTORS.items()
    }
    return {factor: over(values) for factor, values in worth.items()}


def judge(compared: Compared, at: float, column: str = "prior") -> dict[str, Judged]:
    """What each factor is worth at a new score."""
    reported = matched(compared.points, ["method"], at)
    found = effects(reported, column, quadrants_of(compared.study)) if compared.reached else dict.fromkeys(FACTORS)
    seeds = len(compared.study.seeds)
    return {factor: Judged.of(FACTORS[factor][0], gap, seeds) for factor, gap in found.items()}


def section(study: Study) -> Section:
    """The four methods at equal score, and what each of the two factors is worth."""
    compared = compared_in(study)
    levels = levels_of(compared)
    ends = list(dict.fromkeys((levels["lowest"], levels["highest"])))
    drawn = [panels.learning(compared), panels.trade_off(compared)]
    finding = "Nothing can be compared: at no new score above the base’s are all four there in all seeds."
    if compared.reached:
        drawn += [square(compared, at) for at in ends]
        judged = {at: judge(compared, at) for at in ends}
        told = [f"at new ≥ {at:.0%}: {in_short([of['data'], of['negatives']])}" for at, of in judged.items()]
        cautions = compared.rates.cautions if compared.rates else ""
        finding = f"What each is worth in prior score kept, {'; '.join(told)}. {cautions}".strip()
    drawn += rates_panels(compared)
    four, figure = replace(study, points=compared.points), figure_of("quadrants", drawn)
    return section_of(four, "quadrants", finding, figure, tables_of(compared), compared.at, tuned=True)


def tables_of(compared: Compared) -> list[Keyed]:
    """The 2 x 2, what each factor is worth, and the four methods."""
    of_methods = [kept_table(compared), levels_table(compared), *rates_tables(compared)]
    return [square_table(compared), worth_table(compared), *of_methods]


class Row(NamedTuple):
    """What a factor is worth at a new score."""

    at: float
    factor: str
    prior: Judged
    kl: Judged


def square_table(compared: Compared) -> Keyed:
    """Who the four are, and what they keep."""
    columns = {"without": WITH[False], "with": WITH[True]}
    rows = {name: (name, dict.fromkeys(columns, NEVER)) for name in DATA.values()}
    for method, (own, wrong) in quadrants_of(compared.study).items():
        prior = compared.kept[method,]["prior"] if (method,) in compared.kept else None
        rows[DATA[own]][1]["with" if wrong else "without"] = f"{compared.study.label(method)}: {written(prior)}"
    return Keyed(f"Prior kept at new ≥ {compared.at:.0%}, %", "", columns, rows)


def worth_table(compared: Compared) -> Keyed:
    """What each factor is worth at each new score."""

    def told(row: Row) -> str:
        return MORE_OR_LESS[row.prior.verdict] if row.factor == "interaction" else row.prior.verdict

    columns = [
        Column[Row]("at", "new ≥", lambda row: f"{row.at:.0%}"),
        Column("gap", "prior kept, points", lambda row: signed(row.prior.gap)),
        Column("kl-gap", f"forward KL, {compared.study.kl_unit}", lambda row: signed(row.kl.gap, nats)),
        Column("verdict", "verdict", told),
    ]
    rows = {}
    for name, at in levels_of(compared).items():
        kl = judge(compared, at, KL)
        for factor, prior in judge(compared, at).items():
            rows[f"{name}.{factor}"] = (prior.label, Row(at, factor, prior, kl[factor]))
    return table_of("What each is worth", "factor", rows, columns)


def square(compared: Compared, at: float) -> Panel:
    """The 2 x 2 itself: what is kept without and with negatives, a line for each kind of data."""
    cells, four = compared.kept_at(at), quadrants_of(compared.study)
    layers: list[Layer] = []
    texts = []
    for own, name in DATA.items():
        pair = sorted((method for method in four if four[method][0] is own), key=lambda method: four[method][1])
        # Beside each other, not to hide an interval behind another.
        places = [float(four[method][1]) + (-0.02 if own else 0.02) for method in pair]
        kept = [cells[method,]["prior"] for method in pair]
        layers.append(means(name, kept, places, (PALETTE[0 if own else 1], "square"), line=True))
        named = zip(places, kept, map(compared.study.label, pair), strict=True)
        texts += [(x, one.mean, label) for x, one, label in named if one]
    axis = Axis.of([WITH[False], WITH[True]])
    layers.append(level("base’s prior", panels.base_prior(compared), axis.ends))
    return Panel(f"Kept at new ≥ {at:.0%}", axis, Axis("prior accuracy", height(layers)), layers, texts=texts)


STUDY = PlainStudy(section, applies, grids=grids)
