"""KL on which inputs makes a law that holds for a method it was not fitted to, also for one that protects the old?

Which inputs there are, and which methods protect, a `ProbeColumns` says: those of the digits here, those of language
models in `text_probes`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.carry_over import ByMethod, CarryOver, examine, gap, over_methods, over_seeds, per_seed
from rlrazor.analysis.forecast import PROBE, measured
from rlrazor.analysis.statistics import Estimate, Standing, floats, mean_or, over, verdict
from rlrazor.report.drawing import PALETTE, Axis, Figure, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.keyed import gap as gap_column
from rlrazor.report.layers import clouds, laws, padded, spots
from rlrazor.report.sections.kl_laws import left_out_panel
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
class ProbeColumns:
    """What KL is measured on, by column; the columns that are `drawn`; and which methods protect the old."""

    measures: Mapping[str, str]
    drawn: Collection[str]
    protects: Callable[[str], bool]


DIGITS = ProbeColumns(MEASURES, (KL, "kl_forward_on_unseen", "kl_forward_on_noise"), PROTECTED.__contains__)


@dataclass(frozen=True)
class Tested:
    """A probe and what its law is worth; `protecting`: those of the methods that protect the old.

    `carried_of_seeds`: in each seed, errors on methods that protect, by a law of those that do not.
    """

    name: str
    of: CarryOver
    protecting: Collection[str]
    carried_of_seeds: Mapping[int, ByMethod]

    @property
    def plain(self) -> Collection[str]:
        """The methods that do not protect."""
        return [method for method in self.of.errors if method not in self.protecting]

    @cached_property
    def carried(self) -> ByMethod:
        """Errors on methods that protect, by a law of those that do not, over seeds."""
        return over_seeds(self.carried_of_seeds.values())

    def error(self, methods: Collection[str]) -> Estimate | None:
        """Mean left-out error on some of the methods, each counting once."""
        return over_methods({method: error for method, error in self.of.errors.items() if method in methods})

    def gain(self, methods: Collection[str]) -> Estimate | None:
        """By how much it is smaller than that of guessing, on some of the methods."""
        guesses = {method: guess for method, guess in self.of.guesses.items() if method in methods}
        return gap(guesses, self.of.errors)

    @property
    def of_protecting(self) -> Standing:
        """Whether its law serves a method that protects better than guessing does."""
        return verdict(self.gain(self.protecting), len(set(self.protecting).intersection(self.of.guesses)))


def examined(study: Study, probes: ProbeColumns = DIGITS) -> list[Tested]:
    """Every probe that the study measured."""
    present = [name for name in probes.measures if name in study.points.columns]
    protecting = [method for method in study.methods if probes.protects(method)]
    return [
        Tested(probes.measures[name], examine(study.points, name, 0), protecting, carried(study, name, protecting))
        for name in present
    ]


def carried(study: Study, column: str, protecting: Collection[str]) -> dict[int, ByMethod]:
    """In each seed, the mean absolute error on each method that protects, of a law fitted to the others."""

    def errors(rows: pl.DataFrame) -> ByMethod:
        plain = rows.filter(~pl.col("method").is_in(list(protecting)))
        fitted = law.fit_saturating(floats(plain, column), floats(plain, "forgetting"))
        of = {method: rows.filter(pl.col("method") == method) for method in protecting}
        return {
            method: float(np.abs(floats(own, "forgetting") - fitted.predict(floats(own, column))).mean())
            for method, own in of.items()
            if not own.is_empty()
        }

    return per_seed(measured(study.points, [column]), errors)


def means(of_seeds: Mapping[int, ByMethod], methods: Collection[str]) -> dict[int, float]:
    """By seed the mean over some of the methods, each counting once; of the seeds that have any of them."""
    chosen = {
        seed: [value for method, value in of_seed.items() if method in methods] for seed, of_seed in of_seeds.items()
    }
    return {seed: float(np.mean(values)) for seed, values in chosen.items() if values}


def section(study: Study) -> Section:
    """The laws of the probes side by side."""
    found = examined(study)
    return section_of(study, NAME, finding(found), figure(study, found, DIGITS), tables(study, found))


def finding(found: Sequence[Tested]) -> str:
    """Which probes' laws serve a method that is not in the fit, and one that protects."""
    judged = [Judged(one.name, one.of.gain, one.of.verdict) for one in _by_error(found)]
    text = f"KL on these inputs, gain over guessing on a method not in the fit: {in_short(judged)}."
    held = [Judged(one.name, one.gain(one.protecting), one.of_protecting) for one in _by_error(found)]
    return f"{text} On methods that protect: {in_short(held)}." if len(_protecting(found)) > 1 else text


def tables(study: Study, found: Sequence[Tested]) -> list[Keyed]:
    """What each law is worth, over methods and over seeds; its error on each method; and the least of them."""
    return [law_table(found), seed_table(study, found), method_table(study, found), order_table(found)]


def law_table(found: Sequence[Tested]) -> Keyed:
    """`PROBE.error`, `PROBE.protected`, `PROBE.carried`, ...: what the law of each probe explains and forecasts."""
    columns = [
        Column[Tested]("r2", "monotone R², by seed", lambda one: written(one.of.r2, number)),
        Column("error", "left-out error, points", lambda one: written(one.of.error)),
        Column("gain", "gain over guessing", lambda one: signed(one.of.gain)),
        Column("verdict", "against guessing", lambda one: one.of.verdict),
        Column("plain", "left-out error, not protecting", lambda one: written(one.error(one.plain))),
        Column("protected", "left-out error, protecting", lambda one: written(one.error(one.protecting))),
        Column("protected-gain", "its gain over guessing", lambda one: signed(one.gain(one.protecting))),
        Column("protected-verdict", "against guessing", lambda one: one.of_protecting),
        Column("carried", "protecting, by a law of the others", lambda one: written(over_methods(one.carried))),
        Column("holds", "law holds", lambda one: one.of.holds),
    ]
    rows = {_key(one): (one.name, one) for one in found}
    return table_of("KL on each probe as a law of forgetting", "probe", rows, columns)


def seed_table(study: Study, found: Sequence[Tested]) -> Keyed:
    """`PROBE.seeds-error`, `PROBE.seeds-gap`, ...: the same errors, a mean over methods in each seed, over seeds.

    `lead`: by how much the error is smaller than that of KL on the new task's inputs.
    """
    first = next((one.of.errors_of_seeds for one in found if one.of.column == KL), {})

    def mean(of_seeds: Mapping[int, ByMethod], methods: Collection[str]) -> Estimate | None:
        return over(means(of_seeds, methods).values())

    def lead(one: Tested, of_seeds: Mapping[int, ByMethod], methods: Collection[str]) -> Estimate | None:
        others, own = means(of_seeds, methods), means(one.of.errors_of_seeds, methods)
        return over(others[seed] - own[seed] for seed in own if seed in others)

    def of_new(one: Tested) -> Estimate | str | None:
        return NEVER if one.of.column == KL else lead(one, first, one.protecting)

    columns = [
        Column[Tested](
            "seeds-error", "left-out error, points", lambda one: mean(one.of.errors_of_seeds, one.of.errors)
        ),
        Column("seeds-guess", "of guessing", lambda one: mean(one.of.guesses_of_seeds, one.of.errors)),
        gap_column("seeds-gap", "gain over guessing", lambda one: lead(one, one.of.guesses_of_seeds, one.of.errors)),
        Column(
            "seeds-protected", "left-out error, protecting", lambda one: mean(one.of.errors_of_seeds, one.protecting)
        ),
        Column("seeds-protected-guess", "of guessing", lambda one: mean(one.of.guesses_of_seeds, one.protecting)),
        gap_column(
            "seeds-protected-gap",
            "gain over guessing",
            lambda one: lead(one, one.of.guesses_of_seeds, one.protecting),
        ),
        gap_column("lead-gap", "gain over the new task’s KL", of_new),
        Column(
            "seeds-carried",
            "protecting, by a law of the others",
            lambda one: mean(one.carried_of_seeds, one.protecting),
        ),
    ]
    rows = {_key(one): (one.name, one) for one in found}
    return table_of("The same, ± over seeds", "probe", rows, columns, len(study.seeds))


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
    methods = set(found[0].of.errors) if found else set()
    groups = {"best": ("of all methods", methods), "best-protected": ("of those that protect", _protecting(found))}
    rows = {key: (name, _least(found, chosen)) for key, (name, chosen) in groups.items()}
    return table_of("The probe that errs least", "on the methods left out", rows, columns)


def _protecting(found: Sequence[Tested]) -> Collection[str]:
    return found[0].protecting if found else ()


def _least(found: Sequence[Tested], methods: Collection[str]) -> tuple[Tested, Estimate | None] | None:
    known = [(one, error) for one in found if (error := one.error(methods)) is not None]
    return min(known, key=lambda row: row[1].mean, default=None)


def _by_error(found: Sequence[Tested]) -> list[Tested]:
    return sorted(found, key=lambda one: mean_or(one.of.error, np.inf))


def _key(one: Tested) -> str:
    names = {KL: "new", PROBE: "generic"}
    return names.get(one.of.column) or one.of.column.removeprefix("kl_forward_on_")


def figure(study: Study, found: Sequence[Tested], probes: ProbeColumns) -> Figure:
    """Forgetting by KL on some of the probes, and the errors of all on methods that protect and that do not."""
    panels = []
    for one in found:
        if one.of.column in probes.drawn:
            drifts = floats(study.points, one.of.column)
            span = padded(np.append(drifts[np.isfinite(drifts)], 0.0))
            layers = [*clouds(study, one.of.column, "forgetting"), *laws(one.of.summary, np.linspace(0, span[1], 200))]
            axis = Axis(f"KL, {study.kl_unit}", span, percent=False)
            panels.append(Panel(f"KL on {one.name}", axis, Axis("forgetting (drop in accuracy)"), layers))
    return Figure(NAME, [*panels, _error_panel(found)], columns=2)


def _error_panel(found: Sequence[Tested]) -> Panel:
    """Two dots for each probe: the left-out error on methods that protect and on the others."""
    ranked = _by_error(found)[::-1]
    groups = {
        "protecting": (0.12, (PALETTE[1], "square"), [one.protecting for one in ranked]),
        "others": (-0.12, (PALETTE[0], "circle"), [one.plain for one in ranked]),
    }
    dots = []
    for name, (shift, style, methods) in groups.items():
        errors = [one.error(own) for one, own in zip(ranked, methods, strict=True)]
        places = [place + shift for place in range(len(ranked))]
        dots.append(spots(f"methods: {name}", errors, places, style, along="x"))
    return left_out_panel([one.name for one in ranked], dots, over_methods(ranked[0].of.guesses) if ranked else None)


STUDY = PlainStudy(section, grids=grids)
