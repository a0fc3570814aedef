"""Which drift measure predicts forgetting? Every measure that the sweep took, ranked; the paper's Table 1 beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.carry_over import gap, over_methods
from rlrazor.analysis.forecast import FORWARD
from rlrazor.analysis.law import LeftOut, PredictorSummary, error_of, r2_of
from rlrazor.analysis.statistics import Estimate, Standing, verdict
from rlrazor.report.drawing import PALETTE, SYMBOLS, WHITE, Axis, Figure, Hover, Marker, Panel, Points
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import across, r2s
from rlrazor.report.measures import GROUPS, MAIN_MEASURES, MEASURES, NEW, PAPER, SIMILARITIES, Measure
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import fit_cells
from rlrazor.report.text import NEVER, how_many, number, percent, signed

TEXT = Path(__file__).with_suffix(".md")

NEAREST = 3  # measures that the finding names, beside forward KL


@dataclass(frozen=True)
class Ranked:
    """A measure and how well it explains forgetting."""

    measure: Measure
    fits: PredictorSummary

    @property
    def r2(self) -> float | None:
        """R2 of the quadratic over all checkpoints, what the paper's Table 1 ranks by."""
        return r2_of(self.fits.quadratic)

    @property
    def left_out(self) -> LeftOut | None:
        """By the monotone law, on methods not in its fit."""
        return self.fits.saturating.left_out if self.fits.saturating else None

    @property
    def error(self) -> float | None:
        """Left-out error of the monotone law, fraction of 1."""
        return error_of(self.left_out)

    @property
    def gain(self) -> Estimate | None:
        """How much smaller that is than the error of guessing, method by method."""
        guess = self.fits.baseline
        return gap(guess.by_method, self.left_out.by_method) if guess and self.left_out else None

    @property
    def verdict(self) -> Standing:
        """Whether it serves a method not in the fit better than guessing does."""
        return verdict(self.gain, self.fits.counts.methods)


def applies(study: Study) -> bool:
    """Whether the sweep took more measures than the page's laws are about."""
    return any(column in study.table.columns for column in MEASURES if column not in MAIN_MEASURES)


def section(study: Study) -> Section:
    """All measures of the sweep, ranked by the R2 of their quadratic."""
    ranked = ranking(study.points)
    return told(study, TEXT, Shown(finding(ranked), _figure(ranked), [table(ranked), place_table(ranked)]))


def ranking(points: pl.DataFrame) -> list[Ranked]:
    """The measures that `points` has, best quadratic first; last those that allow no fit."""
    present = [name for name in MEASURES if name in points.columns]
    falling = [name for name in present if name.startswith(SIMILARITIES)]
    drifts = points.with_columns((1 - pl.col(name)).alias(name) for name in falling)
    ranked = [Ranked(MEASURES[fit.predictor], fit) for fit in law.summarise(drifts, present, samples=0)]
    return sorted(ranked, key=lambda one: -1.0 if one.r2 is None else one.r2, reverse=True)


def finding(ranked: Sequence[Ranked]) -> str:
    """Whether those that carry over best to a method not seen, and forward KL, beat guessing there."""
    tested = by_error(ranked)
    best = tested or [one for one in ranked if one.r2 is not None]
    if not best:
        return "The sweep is too small to fit a law to any measure."
    named = [one for place, one in enumerate(best) if place < NEAREST or one.measure.column == FORWARD]
    judged = in_short([Judged(one.measure.full_name, one.gain, one.verdict) for one in named])
    which = how_many(len(best), "measure")
    if tested and len(best) > NEAREST:
        beside = f", and of {named[-1].measure.full_name}" if len(named) > NEAREST else ""
        which = f"the {NEAREST} of {which} that err least{beside}"
    return f"Gain over guessing on a method not in the fit, of {which}: {judged}."


def by_error(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Those that have a left-out error, the lowest first."""
    return sorted((one for one in ranked if one.error is not None), key=lambda one: one.error or 0.0)


def table(ranked: Sequence[Ranked]) -> Keyed:
    """Every measure: what it explains, and what it forecasts."""

    def paper(one: Ranked) -> str:
        return "{:.2f} ± {:.2f}".format(*PAPER[one.measure.column]) if one.measure.column in PAPER else NEVER

    columns = [
        Column[Ranked]("group", "measured on", lambda one: one.measure.group),
        Column("r2", "quadratic R²", lambda one: number(one.r2)),
        Column("by-seed", "R² per seed", lambda one: fit_cells(one.fits.quadratic)[1]),
        Column("monotone", "monotone R²", lambda one: number(r2_of(one.fits.saturating))),
        Column("spearman", "Spearman", lambda one: number(one.fits.spearman)),
        Column("quadratic-error", "left-out error, quadratic", lambda one: percent(error_of(one.fits.quadratic))),
        Column("error", "left-out error, monotone", lambda one: _over_methods(one.left_out)),
        Column("guess", "baseline", lambda one: _over_methods(one.fits.baseline)),
        Column("gain", "gain over baseline", lambda one: signed(one.gain)),
        Column("verdict", "against baseline", lambda one: one.verdict),
        Column("paper", "paper’s R²", paper),
    ]
    rows = {one.measure.column: (one.measure.label, one) for one in ranked}
    return table_of("All drift measures", "measure", rows, columns)


def place_table(ranked: Sequence[Ranked]) -> Keyed:
    """Who comes first, and where forward KL on new-task inputs stands: by R2, and by left-out error."""

    def peers(order: Sequence[Ranked]) -> list[Ranked]:
        return [one for one in order if one.measure.group == NEW]

    columns = [
        Column[Sequence[Ranked]]("first", "the first", lambda order: order[0].measure.full_name if order else NEVER),
        Column("forward", "place of forward KL", _place),
        Column("count", "of", lambda order: str(len(order))),
        Column("peer", "its place among those on new-task inputs", lambda order: _place(peers(order))),
        Column("peers", "of", lambda order: str(len(peers(order)))),
    ]
    rows = {
        "by-r2": ("R² of the quadratic", [one for one in ranked if one.r2 is not None]),
        "by-error": ("left-out error of the monotone law", by_error(ranked)),
    }
    return table_of("The order", "by", rows, columns)


def _place(order: Sequence[Ranked]) -> str:
    """The place of forward KL."""
    columns = [one.measure.column for one in order]
    return str(columns.index(FORWARD) + 1) if FORWARD in columns else NEVER


def _over_methods(left_out: LeftOut | None) -> Estimate | None:
    return over_methods(left_out.by_method) if left_out else None


# The figure


def _figure(ranked: Sequence[Ranked]) -> Figure:
    shown = [one for one in reversed(ranked) if one.r2 is not None]  # the best on top
    panels = [_r2_panel(shown)]
    if any(one.error is not None for one in shown):
        panels.append(_error_panel(shown))
    return Figure("predictors", panels, columns=len(panels), height=200 + 24 * len(shown))


def _r2_panel(shown: Sequence[Ranked]) -> Panel:
    """What is explained: the mean over seeds with its standard deviation; with one seed, R2 of all checkpoints."""
    dots = [
        r2s(group.label, [shown[int(place)].fits.quadratic for place in group.y], group.y, group.marker)
        for group in _by_group(shown)
    ]
    of_paper = {place: PAPER[one.measure.column][0] for place, one in enumerate(shown) if one.measure.column in PAPER}
    x, y = np.array([*of_paper.values()], float), np.array([*of_paper], float)
    paper = Points("the paper’s Table 1", x, y, Marker(WHITE, "diamond", size=9, outlined=True))
    several = any(one.fits.quadratic and one.fits.quadratic.r2_seed_sd is not None for one in shown)
    label = "R², mean ± standard deviation over seeds" if several else "R²"
    names = Axis.of([one.measure.full_name for one in shown], margin=0.7)
    return Panel("Explained: R² of the quadratic", Axis(label, (-0.03, 1.03), percent=False), names, [paper, *dots])


def _error_panel(shown: Sequence[Ranked]) -> Panel:
    """What is forecast; the dashed line is guessing."""
    axis = Axis.of([""] * len(shown), margin=0.7)
    dots = _by_group(shown)
    guesses = [100 * mean for one in shown if (mean := error_of(one.fits.baseline)) is not None]
    guess = [across("guessing the mean", guesses[-1], axis.ends)] if guesses else []
    end = 1.08 * max([*guesses, *(float(np.nanmax(one.x, initial=0.0)) for one in dots)])
    error = Axis("error on a method not in the fit, accuracy points", (0.0, end), percent=False)
    return Panel("Forecast: left-out error of the monotone law", error, axis, [*dots, *guess])


def _by_group(shown: Sequence[Ranked]) -> list[Points]:
    """Left-out errors of the measures of each group, which are called by name when hovered over."""
    clouds = []
    for group, color, symbol in zip(GROUPS, PALETTE, SYMBOLS, strict=False):
        own = {place: one for place, one in enumerate(shown) if one.measure.group == group}
        x = np.array([np.nan if one.error is None else 100 * one.error for one in own.values()], float)
        names = [(one.measure.full_name,) for one in own.values()]
        hover = Hover("<b>%{customdata[0]}</b><br>%{x:.3~f}<extra></extra>", names)
        clouds.append(Points(group, x, np.array([*own], float), Marker(color, symbol), hover=hover))
    return clouds
