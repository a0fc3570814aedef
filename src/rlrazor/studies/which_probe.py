"""KL on which inputs makes a law that holds for a method it was not fitted to, also for one that protects the old?"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.carry_over import ByMethod, CarryOver, examine, gap, over_methods, per_seed
from rlrazor.analysis.forecast import measured
from rlrazor.analysis.statistics import Estimate, floats, verdict
from rlrazor.report.drawing import PALETTE, Axis, Figure, Layer, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import across, clouds, laws, padded, spots
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, number, percent, signed, written
from rlrazor.studies.engine import KL, PlainStudy, section_of
from rlrazor.studies.grids import LRS, ONE, Grid

NAME = "which-probe"
PLAIN, PROTECTED = ("sft-1", "sft-2", "oracle", "grpo", "dr-grpo"), ("replay", "lwf", "ewc", "sft-2+kl")
MEASURES = {
    KL: "the new task’s images",
    "kl_forward_on_prior": "the scored images of the prior task",
    "kl_forward_on_unseen": "other images of the prior task",
    "kl_forward_on_digits": "the new task’s images, asked as the prior task",
    "kl_forward_on_dots": "dots, asked as the prior task",
    "kl_forward_on_noise": "noise, asked as the prior task",
}
DRAWN = (KL, "kl_forward_on_unseen", "kl_forward_on_noise")
OWN = {"probes": True}


def grids(quick: bool) -> list[Grid]:
    """Methods that let the old go as it will, and methods that protect it, each measured on every probe."""
    some, few = (LRS[1:4:2], ONE) if quick else (LRS, LRS)
    return [
        Grid(PLAIN, some, OWN),
        Grid(("replay",), few, OWN),
        *(Grid(("lwf",), few, {**OWN, "strength": strength}) for strength in ((1.0,) if quick else (0.3, 1.0))),
        *(Grid(("ewc",), few, {**OWN, "strength": strength}) for strength in ((1e3,) if quick else (1e2, 1e4))),
        *(Grid(("sft-2+kl",), few, OWN, {"kl_coef": weight}) for weight in ((1.0,) if quick else (0.1, 1.0))),
    ]


@dataclass(frozen=True)
class Tested:
    """A probe, what its law is worth, and `carried`: errors on methods that protect, by a law of those that do not."""

    name: str
    of: CarryOver
    carried: ByMethod

    def error(self, methods: Collection[str]) -> Estimate | None:
        """Mean left-out error on some of the methods, each counting once."""
        return over_methods({method: error for method, error in self.of.errors.items() if method in methods})

    def gain(self, methods: Collection[str]) -> Estimate | None:
        """By how much it is smaller than that of guessing, on some of the methods."""
        guesses = {method: guess for method, guess in self.of.guesses.items() if method in methods}
        return gap(guesses, self.of.errors)


def examined(study: Study) -> list[Tested]:
    """Every probe that the study measured."""
    present = [name for name in MEASURES if name in study.points.columns]
    return [Tested(MEASURES[name], examine(study.points, name, 0), carried(study.points, name)) for name in present]


def carried(points: pl.DataFrame, column: str) -> ByMethod:
    """Mean absolute error on each method that protects, of a law fitted to the others in its seed, over seeds."""

    def errors(rows: pl.DataFrame) -> ByMethod:
        plain = rows.filter(pl.col("method").is_in(PLAIN))
        fitted = law.fit_saturating(floats(plain, column), floats(plain, "forgetting"))
        of = {method: rows.filter(pl.col("method") == method) for method in PROTECTED}
        return {
            method: float(np.abs(floats(own, "forgetting") - fitted.predict(floats(own, column))).mean())
            for method, own in of.items()
            if not own.is_empty()
        }

    seeds = list(per_seed(measured(points, [column]), errors).values())
    names = dict.fromkeys(name for of_seed in seeds for name in of_seed)
    return {name: float(np.mean([of_seed[name] for of_seed in seeds if name in of_seed])) for name in names}


def section(study: Study) -> Section:
    """The laws of the probes side by side."""
    found = examined(study)
    judged = [Judged(one.name, one.of.gain, one.of.verdict) for one in _by_error(found)]
    finding = f"KL on these inputs, gain over guessing on a method not in the fit: {in_short(judged)}."
    tables = [law_table(found), method_table(study, found), order_table(found)]
    return section_of(study, NAME, finding, figure(study, found), tables)


def law_table(found: Sequence[Tested]) -> Keyed:
    """`PROBE.error`, `PROBE.protected`, `PROBE.carried`, ...: what the law of each probe explains and forecasts."""
    columns = [
        Column[Tested]("r2", "monotone R², by seed", lambda one: written(one.of.r2, number)),
        Column("error", "left-out error, points", lambda one: written(one.of.error)),
        Column("gain", "gain over guessing", lambda one: signed(one.of.gain)),
        Column("verdict", "against guessing", lambda one: one.of.verdict),
        Column("plain", "left-out error, not protecting", lambda one: written(one.error(PLAIN))),
        Column("protected", "left-out error, protecting", lambda one: written(one.error(PROTECTED))),
        Column("protected-gain", "its gain over guessing", lambda one: signed(one.gain(PROTECTED))),
        Column(
            "protected-verdict",
            "against guessing",
            lambda one: verdict(one.gain(PROTECTED), len(set(PROTECTED).intersection(one.of.guesses))),
        ),
        Column("carried", "protecting, by a law of the others", lambda one: written(over_methods(one.carried))),
        Column("holds", "law holds", lambda one: one.of.holds),
    ]
    rows = {_key(one): (one.name, one) for one in found}
    return table_of("KL on each probe as a law of forgetting", "probe", rows, columns)


def method_table(study: Study, found: Sequence[Tested]) -> Keyed:
    """`METHOD.PROBE`: the left-out error of each method by the law of each probe."""

    def column(one: Tested) -> Column[str]:
        return Column(_key(one), one.name, lambda method: percent(one.of.errors.get(method)))

    guess: Mapping[str, float] = found[0].of.guesses if found else {}
    guessing = Column[str]("guess", "guessing the mean", lambda method: percent(guess.get(method)))
    rows: dict[str, tuple[str, str]] = {method: (study.label(method), method) for method in study.methods}
    return table_of("Left-out error of each method, points", "method", rows, [*map(column, found), guessing])


def order_table(found: Sequence[Tested]) -> Keyed:
    """`best.probe`, `best-protected.probe`: which errs least on a method left out, of all and of those that protect."""
    columns = [
        Column[tuple[Tested, Estimate | None] | None]("probe", "probe", lambda row: row[0].name if row else NEVER),
        Column("least", "left-out error, points", lambda row: written(row[1]) if row else NEVER),
    ]
    groups = {"best": ("of all methods", (*PLAIN, *PROTECTED)), "best-protected": ("of those that protect", PROTECTED)}
    rows = {key: (name, _least(found, methods)) for key, (name, methods) in groups.items()}
    return table_of("The probe that errs least", "on the methods left out", rows, columns)


def _least(found: Sequence[Tested], methods: Collection[str]) -> tuple[Tested, Estimate | None] | None:
    known = [(one, error) for one in found if (error := one.error(methods)) is not None]
    return min(known, key=lambda row: row[1].mean, default=None)


def _by_error(found: Sequence[Tested]) -> list[Tested]:
    return sorted(found, key=lambda one: one.of.error.mean if one.of.error else np.inf)


def _key(one: Tested) -> str:
    return "new" if one.of.column == KL else one.of.column.removeprefix("kl_forward_on_")


def figure(study: Study, found: Sequence[Tested]) -> Figure:
    """Forgetting by KL on three of the probes, and the errors of all on methods that protect and that do not."""
    panels = []
    for one in found:
        if one.of.column in DRAWN:
            drifts = floats(study.points, one.of.column)
            span = padded(np.append(drifts[np.isfinite(drifts)], 0.0))
            layers = [*clouds(study, one.of.column, "forgetting"), *laws(one.of.summary, np.linspace(0, span[1], 200))]
            axis = Axis(f"KL, {study.kl_unit}", span, percent=False)
            panels.append(Panel(f"KL on {one.name}", axis, Axis("forgetting (drop in accuracy)"), layers))
    return Figure(NAME, [*panels, _error_panel(found)], columns=2)


def _error_panel(found: Sequence[Tested]) -> Panel:
    """Two dots for each probe: the left-out error on methods that protect and on the others."""
    ranked = _by_error(found)[::-1]
    axis = Axis.of([one.name for one in ranked], margin=0.6)
    layers: list[Layer] = []
    groups = (("protecting", PROTECTED, 0.12, (PALETTE[1], "square")), ("others", PLAIN, -0.12, (PALETTE[0], "circle")))
    for label, methods, shift, style in groups:
        places = [place + shift for place in range(len(ranked))]
        layers.append(spots(f"methods: {label}", [one.error(methods) for one in ranked], places, style, along="x"))
    if ranked and (guess := over_methods(ranked[0].of.guesses)) is not None:
        layers.append(across("guessing the mean", 100 * guess.mean, axis.ends))
    error = Axis("left-out error of the monotone law, accuracy points", percent=False)
    return Panel("Asked about a method not in the fit", error, axis, layers)


STUDY = PlainStudy(section, grids=grids)
