"""How fresh do samples have to be? Learning from samples of the policy as it was k updates ago, up to the base's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    at_accuracy,
    best_checkpoints,
    difference,
    direction,
    floats,
    seed_means,
    threshold_most_reach,
    with_params,
)
from rlrazor.report.drawing import PALETTE, SYMBOLS, Axis, Curve, Figure, Layer, Panel, Points, Range
from rlrazor.report.layers import level, log_height, means, never, share_height
from rlrazor.report.sections.statistics import follows_kl, over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, in_words, nats, percent
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import ONE, Grid

NEVER_REFRESHED = 1_000_000  # updates: all samples are the base's
KL = "kl_forward"
ARM = ("method", "importance", "staleness")

_WEIGHTED = (PALETTE[5], PALETTE[4], PALETTE[3])  # beside the palette's first: a method's two colours are akin
_REFERENCES = (PALETTE[6], PALETTE[10])


@dataclass(frozen=True, eq=False)
class Series:
    """One method, with or without importance weights, at every age of its samples; see `series_of`."""

    label: str
    color: str
    symbol: str
    points: pl.DataFrame

    @property
    def ages(self) -> list[int]:
        """The ages of its samples, in updates, ascending."""
        return sorted(self.points["staleness"].unique().to_list())

    def change(self, age: int, threshold: float) -> Estimate | None:
        """Log of forward KL at this age over that on fresh samples, both at new >= `threshold`, seed by seed.

        A ratio, since the spread of KL between seeds grows with it.
        """
        logs = self.points.with_columns(log_kl=pl.col(KL).clip(1e-9).log())
        best = best_checkpoints(logs, ["staleness"], threshold)
        fresh, old = (best.filter(pl.col("staleness") == at) for at in (0, age))
        return difference(old, fresh, "log_kl")

    def kept(self, threshold: float) -> pl.DataFrame:
        """By age: KL and prior accuracy of the best checkpoints with new >= `threshold`."""
        return at_accuracy(self.points, ["staleness"], threshold, [KL, "prior"]).sort("staleness")

    def best(self) -> pl.DataFrame:
        """By age: the highest new accuracy, wherever in training."""
        highest = self.points.group_by("staleness", "seed").agg(pl.max("new"))
        return seed_means(highest, ["staleness"], ["new"]).sort("staleness")

    def last(self) -> pl.DataFrame:
        """By age: new accuracy at the end of training."""
        ends = self.points.filter(pl.col("step") == pl.col("step").max().over("trajectory"))
        return seed_means(ends, ["staleness"], ["new"]).sort("staleness")


def section(study: Study) -> Section:
    """KL, prior accuracy and what is learnt at all, by the age of the samples."""
    series = series_of(study)
    threshold = threshold_most_reach(_stale(study), study.bases, ARM, THRESHOLDS)
    return Section(
        "off-policy",
        "How fresh do samples have to be?",
        "RL is online and on-policy: it learns from what it has just sampled itself. Here it learns from samples that "
        "the policy drew k updates ago, with and without importance weighting. Where between RL and SFT does the KL "
        "land?",
        finding(study, series, threshold),
        _figure(study, series, threshold),
        _tables(series, threshold),
        _note(study, threshold),
    )


def series_of(study: Study) -> list[Series]:
    """The methods that were run on stale samples; at age 0 all weights are 1, so weighted ones start there too."""
    points = _stale(study)
    series: list[Series] = []
    for index, method in enumerate(points["method"].unique(maintain_order=True)):
        of_method = points.filter(pl.col("method") == method)
        for weighted, colors in ((False, PALETTE), (True, _WEIGHTED)):
            rows = of_method.filter((pl.col("importance") == weighted) | (pl.col("staleness") == 0))
            if rows["staleness"].max():
                label = f"{'weighted ' if weighted else ''}{study.label(method)}"
                series.append(Series(label, colors[index % len(colors)], SYMBOLS[len(series) % len(SYMBOLS)], rows))
    return series


def finding(study: Study, series: Sequence[Series], threshold: float | None) -> str:
    """What the oldest samples do to the KL of each series, and from what age on."""
    if not series:
        return "The study has no runs on stale samples, so nothing can be said of their age."
    if threshold is None:
        best = max(float(floats(one.points, "new").max()) for one in series)
        return (
            f"No run reaches a new accuracy of {min(THRESHOLDS):.0%} at whatever age of its samples (the best: "
            f"{best:.1%}), so there is nothing to compare."
        )
    seeds = len(study.seeds)
    said: dict[str, list[str]] = {"raise": [], "lower": [], "do not measurably change": [], "": []}
    for one in series:
        gap = one.change(one.ages[-1], threshold)
        if gap is None:
            said[""].append(one.label)
        else:
            verb = {1: "raise", -1: "lower", 0: "do not measurably change"}[direction(gap, seeds)]
            said[verb].append(_ends(one, threshold))
    verbs = [verb for verb, names in said.items() if verb and names]
    changes = [
        f"{verb} {'that' if index else 'the forward KL'} of {in_words(said[verb])}" for index, verb in enumerate(verbs)
    ]
    oldest = _age_in_words(max(one.ages[-1] for one in series))
    lost = f"{in_words(said[''])} never get{'s' if len(said['']) == 1 else ''} there on them" if said[""] else ""
    return (
        f"At {threshold:.0%} new accuracy, samples {oldest} instead of fresh ones "
        f"{', '.join(changes) or 'teach none of the methods enough'}{f'; {lost}' if lost else ''}"
        f"{_lasting(series, threshold, seeds)}{_compared(study, threshold)} ({over_seeds(seeds)})."
    )


def _ends(one: Series, threshold: float) -> str:
    """A series' KL on fresh samples and on its oldest."""
    cells = one.kept(threshold).to_dicts()
    return f"{one.label} ({cell(cells[0], KL, nats)} → {cell(cells[-1], KL, nats)} nats)"


def _lasting(series: Sequence[Series], threshold: float, seeds: int) -> str:
    """From which age on the KL differs from that on fresh samples, and whose; nothing where one seed cannot tell.

    One age that differs is no sign: among 20 comparisons at 95 %, one does by chance. Every older one has to, too.
    """
    if seeds == 1 or len(_ages(series)) < 3:
        return ""
    starts: dict[int, list[str]] = {}
    for one in series:
        start = None
        for age in reversed(one.ages[1:]):
            gap = one.change(age, threshold)
            if gap and not direction(gap, seeds):
                break
            start = age
        if start:
            starts.setdefault(start, []).append(one.label)
    if not starts:
        return ""
    said = [f"{_age(age)} for {in_words(starts[age])}" for age in sorted(starts)]
    return f"; lasting differences begin at age {in_words(said)}"


def _compared(study: Study, threshold: float) -> str:
    """Where methods without samples of their own land, if the study has any."""
    rows = at_accuracy(_references(study), ["method"], threshold, [KL]).drop_nulls(KL).to_dicts()
    said = in_words([f"{study.label(row['method'])} is at {cell(row, KL, nats)}" for row in rows])
    return f"; {said}" if rows else ""


def _stale(study: Study) -> pl.DataFrame:
    """The checkpoints of the methods that were run on stale samples, fresh ones among them."""
    points = with_params(study.points, staleness=0, importance=False)
    return points.filter((pl.col("staleness") > 0).any().over("method"))


def _references(study: Study) -> pl.DataFrame:
    points = with_params(study.points, staleness=0)
    return points.filter((pl.col("staleness") == 0).all().over("method"))


def _ages(series: Sequence[Series]) -> list[int]:
    return sorted({age for one in series for age in one.ages})


def _age(age: int) -> str:
    return "∞" if age >= NEVER_REFRESHED else str(age)


def _age_in_words(age: int) -> str:
    return "of the base (age ∞)" if age >= NEVER_REFRESHED else f"{how_many(age, 'update')} old"


def _tables(series: Sequence[Series], threshold: float | None) -> list[Table]:
    tables = [
        _table("Best new accuracy, %", series, [one.best() for one in series], "new"),
        _table("New accuracy at the end, %", series, [one.last() for one in series], "new"),
    ]
    if threshold is None:
        return tables
    kept = [one.kept(threshold) for one in series]
    return [
        _table(f"Forward KL at new ≥ {threshold:.0%}, nats", series, kept, KL),
        _table(f"Prior accuracy kept at new ≥ {threshold:.0%}, %", series, kept, "prior"),
        *tables,
    ]


def _table(title: str, series: Sequence[Series], by_age: Sequence[pl.DataFrame], column: str) -> Table:
    ages = _ages(series)
    rows = []
    for one, cells in zip(series, by_age, strict=True):
        at = {row["staleness"]: cell(row, column, nats if column == KL else percent) for row in cells.to_dicts()}
        rows.append([one.label, *(at.get(age, NEVER) for age in ages)])
    return Table(title, ["age of the samples, updates", *map(_age, ages)], rows)


def _figure(study: Study, series: Sequence[Series], threshold: float | None) -> Figure:
    best = [*_lines(series, [one.best() for one in series], "new"), _base(study, series, "new")]
    learnt = _panel(series, "What is learnt at all", "best new accuracy", best, share_height(best))
    if threshold is None:
        return Figure("off-policy", [learnt], columns=1)
    kept = [one.kept(threshold) for one in series]
    # Logarithmic: from a tenth of a nat to several, with intervals that are as wide as the mean is high.
    drift = [*_lines(series, kept, KL), *_levels(study, series, threshold, KL)]
    low, high = log_height(drift)
    drift.append(_absent(series, kept, threshold, 1.25 * low))
    prior = [
        *_lines(series, kept, "prior"),
        *_levels(study, series, threshold, "prior"),
        _base(study, series, "prior"),
    ]
    bottom, top = share_height(prior)
    prior.append(_absent(series, kept, threshold, bottom + 0.04 * (top - bottom)))
    at = f"at new ≥ {threshold:.0%}"
    return Figure(
        "off-policy",
        [
            _panel(series, f"Drift {at}", "forward KL, nats", drift, (low, high), log=True),
            _panel(series, f"Kept {at}", "prior accuracy", prior, (bottom, top)),
            learnt,
        ],
        columns=3,
    )


def _panel(
    series: Sequence[Series], title: str, y_label: str, layers: Sequence[Layer], y_range: Range, *, log: bool = False
) -> Panel:
    ticks = [(float(at), _age(age)) for at, age in enumerate(_ages(series))]
    return Panel(
        title,
        Axis("age of the samples, updates", _across(series), percent=False, ticks=ticks or None),
        Axis(y_label, y_range, percent=not log, log=log),
        layers,
    )


def _across(series: Sequence[Series]) -> Range:
    return -0.5, max(len(_ages(series)), 1) - 0.5


def _base(study: Study, series: Sequence[Series], column: str) -> Curve:
    return level("base", float(np.nanmean(floats(study.bases, column))), _across(series))


def _lines(series: Sequence[Series], by_age: Sequence[pl.DataFrame], column: str) -> list[Layer]:
    return [
        means(one.label, cells, _places(series, one, cells), column, one.color, one.symbol)
        for one, cells in zip(series, by_age, strict=True)
    ]


def _absent(series: Sequence[Series], kept: Sequence[pl.DataFrame], threshold: float, y: float) -> Points:
    """A mark for each series and age with which no seed gets there."""
    x, names = [], []
    for one, cells in zip(series, kept, strict=True):
        without = cells.filter(pl.col("n_seeds") == 0)
        x += _places(series, one, without)
        names += [f"{one.label}, age {_age(age)}" for age in without["staleness"]]
    return never(f"never reaches {threshold:.0%} new", names, x, y)


def _levels(study: Study, series: Sequence[Series], threshold: float, column: str) -> list[Layer]:
    """The methods without samples of their own, as lines across."""
    rows = at_accuracy(_references(study), ["method"], threshold, [column]).drop_nulls(column).to_dicts()
    return [
        level(study.label(row["method"]), row[column], _across(series), _REFERENCES[index % len(_REFERENCES)])
        for index, row in enumerate(rows)
    ]


def _places(series: Sequence[Series], one: Series, cells: pl.DataFrame) -> list[float]:
    """Where on the axis the ages in `cells` are: each series beside the others, so that no interval hides another."""
    shift = 0.13 * (series.index(one) - (len(series) - 1) / 2)
    order = _ages(series)
    return [order.index(age) + shift for age in cells["staleness"]]


def _note(study: Study, threshold: float | None) -> str:
    points = study.points
    rates = in_words([f"{lr:.1e}" for lr in sorted(points["lr"].drop_nulls().unique().to_list())])
    return (
        f"{how_many(len(points), 'checkpoint')}, {how_many(len(study.seeds), 'seed')}; learning rate {rates}, "
        f"{floats(points, 'step').max():,.0f} updates. Samples of age k come from the policy as it was k updates ago, "
        "for the first k updates from the base; ∞: always from the base. Weighted: each sample counts π/μ, the present "
        "policy’s probability over that of the policy that drew it, not clipped; at age 0 that is 1. REINFORCE on "
        "samples of the base without weights is SFT on the base’s own correct outputs, in effect oracle SFT: offline, "
        "yet KL-minimal. Stale samples of one’s own are not the labels of an external annotator. At new ≥ a threshold: "
        "per seed, the checkpoint with the highest prior accuracy of those that have reached it, chosen on the scores "
        f"that are shown.{_law(study, threshold)} Changes of KL are judged as ratios, since its spread grows "
        f"with it. An interval may reach beyond the axes. {INTERVALS}"
    )


def _law(study: Study, threshold: float | None) -> str:
    """Whether what is kept follows the KL, over all ages and methods."""
    if threshold is None:
        return ""
    return follows_kl(at_accuracy(_stale(study), ARM, threshold, [KL, "prior"]), threshold, "setting")


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    settings = {} if quick else {"epochs": (2,)}
    ages = (0, 8, NEVER_REFRESHED) if quick else (0, 1, 8, 64, 512, NEVER_REFRESHED)
    return [
        Grid(("sft-2", "oracle"), ONE, settings=settings),  # SFT, to compare with
        *(
            Grid(("grpo", "reinforce"), ONE, {"staleness": age, "importance": weighted} if age else {}, settings)
            for age in ages
            for weighted in ((False, True) if age else (False,))
        ),
    ]


STUDY = PlainStudy(grids, section)
