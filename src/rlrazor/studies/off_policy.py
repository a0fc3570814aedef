"""How fresh do samples have to be? Learning from samples of the policy as it was k updates ago, up to the base's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import Standing, floats, seed_means, threshold_most_reach, with_params
from rlrazor.report.drawing import PALETTE, SYMBOLS, Axis, Layer, Panel, Range
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.layers import level, log_height, means, never, share_height
from rlrazor.report.study import Study
from rlrazor.report.tables import THRESHOLDS
from rlrazor.report.text import NEVER
from rlrazor.studies.engine import KL, Against, Arm, Arms, ArmStudy, At, Compared, Contrast, Kept, PanelOf, Style
from rlrazor.studies.grids import ONE, Grid
from rlrazor.studies.tables import ends_of, rank_table

NEVER_REFRESHED = 1_000_000  # updates: all samples are the base's
FRESH, BASE, WEIGHTED = "", "base", "weighted"
FROM_LABELS = ("sft-2", "oracle")  # they draw no samples, which could have an age
Series = tuple[str, str]
"""A method, and "" or WEIGHTED."""

Cells = Mapping[Arm, Kept]

COLORS = {"": PALETTE, WEIGHTED: (PALETTE[5], PALETTE[4], PALETTE[3])}  # a method's two colours are akin
LEVELS = (PALETTE[6], PALETTE[10])

# The spread of KL between seeds grows with it, so that differences are of its logarithm.
FACTOR = Contrast("log_kl", "forward KL", "doublings", "{:.2f}".format, lower_is_better=True)


def grids(quick: bool) -> list[Grid]:
    """Each age, from its second on with and without importance weights; SFT to compare with."""
    settings = {} if quick else {"epochs": (2,)}
    ages = (0, 8, NEVER_REFRESHED) if quick else (0, 1, 8, 64, 512, NEVER_REFRESHED)
    return [
        Grid(FROM_LABELS, ONE, settings=settings),
        *(
            Grid(("grpo", "reinforce"), ONE, {"staleness": age, "importance": weighted} if age else {}, settings)
            for age in ages
            for weighted in ((False, True) if age else (False,))
        ),
    ]


def prepare(points: pl.DataFrame) -> pl.DataFrame:
    """With `age` and `weights` in words, none for fresh samples, whose weights are 1, and `log_kl` in doublings."""
    rows = with_params(points, staleness=0, importance=False)
    return rows.with_columns(
        age=pl.col("staleness").cast(pl.String).replace({"0": FRESH, str(NEVER_REFRESHED): BASE}),
        weights=pl.when((pl.col("staleness") > 0) & pl.col("importance")).then(pl.lit(WEIGHTED)).otherwise(pl.lit("")),
        log_kl=pl.col(KL).clip(1e-9).log(2),
    ).sort("staleness", maintain_order=True)


def most_reach(points: pl.DataFrame, bases: pl.DataFrame, by: Sequence[str], at: Sequence[float]) -> float | None:
    """The new accuracy that most reach of the methods that were run on stale samples, if there are any."""
    stale = points.filter((pl.col("age") != FRESH).any().over("method"))
    return threshold_most_reach(points if stale.is_empty() else stale, bases, by, at)


def age_name(age: str) -> str:
    """For people."""
    return {FRESH: "0", BASE: "∞"}.get(age, age)


def name_of(study: Study, series: Series) -> str:
    """A method, with or without weights."""
    return " ".join(filter(None, (series[1], study.label(series[0]))))


def key(series: Series) -> str:
    """The same in the names of numbers."""
    return ".".join(filter(None, series))


def label(study: Study, arm: Arm) -> str:
    """Method, weights, and the age of its samples if it draws any."""
    name = name_of(study, arm[:2])
    return name if arm[0] in FROM_LABELS else f"{name}, age {age_name(arm[2])}"


def series_of(compared: Compared) -> list[Series]:
    """The methods that were run on stale samples, with weights and without, as far as they were."""
    return list(dict.fromkeys((method, weights) for method, weights, age in compared.arms if age != FRESH))


def ages_of(compared: Compared, series: Series) -> list[Arm]:
    """The arms of a series, from fresh samples on, which it shares with that of other weights."""
    method, weights = series
    return [arm for arm in compared.arms if arm in ((method, "", FRESH), (method, weights, arm[2]))]


def style(compared: Compared, arm: Arm) -> Style:
    """The colour and the symbol of its series; of methods without any, of a dashed line."""
    series = series_of(compared)
    methods = list(dict.fromkeys(method for method, _ in series))
    if arm[:2] not in series:
        return LEVELS[compared.place(arm, 0) % len(LEVELS)], SYMBOLS[0]
    colors = COLORS[arm[1]]
    return colors[methods.index(arm[0]) % len(colors)], SYMBOLS[series.index(arm[:2]) % len(SYMBOLS)]


def lasting(compared: Compared) -> Keyed:
    """The age from which on the KL differs from that on fresh samples, at every older one, too.

    One age that differs is no sign: among 20 comparisons at 95 %, one does by chance.
    """
    rows = {}
    for series in series_of(compared):
        fresh, *older = ages_of(compared, series)
        judged = [(arm[-1], compared.judge(arm, fresh, FACTOR).verdict) for arm in reversed(older)]
        told = [age for age, one in takewhile(lambda of: of[1] != Standing.OPEN, judged) if one != Standing.APART]
        rows[key(series)] = (name_of(compared.study, series), {"lasting": age_name(told[-1]) if told else NEVER})
    return Keyed("From which age on the KL differs for good", "", {"lasting": "age, updates"}, rows)


def best_new(compared: Compared) -> Cells:
    """Each arm's highest new accuracy, wherever in training."""
    return {arm: {"new": compared.mean(arm, compared.highest, "new")} for arm in compared.arms}


def learnt(compared: Compared) -> Keyed:
    """What is learnt at all."""
    last = seed_means(ends_of(compared.points), ARMS.by, ["new"])
    columns = [
        Column[Arm]("best", "the best", lambda arm: compared.mean(arm, compared.highest, "new")),
        Column("last", "at the end", lambda arm: compared.mean(arm, last, "new")),
    ]
    return table_of("New accuracy, %", "arm", compared.named, columns, len(compared.study.seeds))


def kept(compared: Compared) -> Cells:
    """What each arm keeps where arms are compared."""
    return compared.kept if compared.reached else {}


def by_age(title: str, y_label: str, column: str, cells_of: Callable[[Compared], Cells]) -> PanelOf:
    """`column` by age, a line for each series, lines across for methods without samples of their own."""

    def make(compared: Compared) -> Panel | None:
        cells, ages = cells_of(compared), compared.values(-1)
        if not cells:
            return None
        axis, is_kl = Axis.of([age_name(age) for age in ages], "age of the samples, updates"), column == KL
        layers = [*lines(compared, cells, column), *references(compared, cells, column, axis.ends)]
        if not is_kl:
            layers.append(level("base", float(np.nanmean(floats(compared.study.bases, column))), axis.ends))
        # Logarithmic: from a tenth of a nat to several, with intervals that are as wide as the mean is high.
        low, high = log_height(layers) if is_kl else share_height(layers)
        layers.append(absent(compared, cells, column, 1.25 * low if is_kl else low + 0.04 * (high - low)))
        y_axis = Axis(y_label, (low, high), percent=not is_kl, log=is_kl)
        return Panel(title.format(compared.at), axis, y_axis, layers)

    return make


def place_of(compared: Compared, series: Series, arm: Arm) -> float:
    """Where on the axis: each series beside the others, so that no interval hides another."""
    every = series_of(compared)
    return compared.place(arm, -1) + 0.13 * (every.index(series) - (len(every) - 1) / 2)


def lines(compared: Compared, cells: Cells, column: str) -> Iterator[Layer]:
    """A line for each series."""
    for series in series_of(compared):
        arms = ages_of(compared, series)
        found, places = [cells[arm][column] for arm in arms], [place_of(compared, series, arm) for arm in arms]
        yield means(name_of(compared.study, series), found, places, compared.style(arms[-1]), line=True)


def references(compared: Compared, cells: Cells, column: str, across: Range) -> Iterator[Layer]:
    """A line across for each method without samples of its own that gets there."""
    methods = {method for method, _ in series_of(compared)}
    for arm in compared.arms:
        if arm[0] not in methods and (found := cells[arm][column]):
            yield level(compared.study.label(arm[0]), found.mean, across, compared.style(arm)[0])


def absent(compared: Compared, cells: Cells, column: str, y: float) -> Layer:
    """A mark for each series and age with which no seed gets there."""
    places = {
        compared.label(arm): place_of(compared, series, arm)
        for series in series_of(compared)
        for arm in ages_of(compared, series)
        if cells[arm][column] is None
    }
    return never(f"never reaches {compared.at:.0%} new", list(places), list(places.values()), y)


FRESH_ONES = {"weights": "", "age": FRESH}
ARMS = Arms(("method", "weights", "age"), label, prepare, style)

STUDY = ArmStudy(
    "off-policy",
    grids,
    ARMS,
    against=[
        Against("that on fresh samples", FRESH_ONES, only={"age": BASE}, measure=FACTOR),
        Against("that on fresh samples, at every age", FRESH_ONES, "fresh", measure=FACTOR),
        Against("that of SFT-2", {**FRESH_ONES, "method": "sft-2"}, "sft-2", only={"age": BASE}, measure=FACTOR),
    ],
    panels=[
        by_age("Drift at new ≥ {:.0%}", "forward KL, nats", KL, kept),
        by_age("Kept at new ≥ {:.0%}", "prior accuracy", "prior", kept),
        by_age("What is learnt at all", "best new accuracy", "new", best_new),
    ],
    tables=[lasting, learnt, rank_table],
    at=At(THRESHOLDS, most_reach),
)
