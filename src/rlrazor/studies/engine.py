"""What a study is, and how its table becomes a section: the one place that compares, tabulates and judges.

To write a study, make two files. `studies/NAME.py` says what is run and what is compared:

    def grids(quick: bool) -> list[Grid]:
        return [Grid(("grpo", "sft-2"), MIDDLE, {"optimizer": name}) for name in ("adamw", "sgd")]

    STUDY = ArmStudy(
        "optimizers",
        grids,
        Arms(("method", "optimizer"), label=lambda study, arm: f"{study.label(arm[0])}, {arm[1]}"),
        against=[Against("AdamW", {"optimizer": "adamw"})],
        panels=[panels.kept(str), panels.trade_off],
    )

An arm is all runs that agree in the columns named, at any learning rate. What is compared is, per arm and seed, the
checkpoint that `rlrazor.analysis.matched` reports at a new-task score, at a learning rate that the other seeds chose;
each arm with the arm that differs from it as `against` says; seed by seed. Beside it stands the curve over learning
rates, where there are several. What more there is to see or to count, a study adds as functions of `Compared`: `panels`
make a panel each, `tables` a `Keyed` table, of `Column`s by `table_of`.

`studies/NAME.md` asks the question and says what to make of the answer, see `rlrazor.report.prose`. Its numbers are the
tables' cells: ARM.prior, ARM.drop, ARM.kl, ARM.lr, ARM.n, then ARM.gap, ARM.kl-gap and ARM.verdict of the first
comparison and ARM.KEY.gap and so on of the others; ARM is the arm's values with dots between them, without those that
are 0 or empty, such as `grpo.sgd`. `at`, `seeds`, `checkpoints` and `runs` are there, too.

A study of another shape is a `PlainStudy`: it makes its section itself of the same parts (`Compared`, `kept_table`,
`section_of`, `rlrazor.report.keyed.in_short`), and judges by the same `rlrazor.analysis.statistics.verdict`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import polars as pl

from rlrazor.analysis.forecast import FORWARD
from rlrazor.analysis.matched import RATE, matched, rows_of
from rlrazor.analysis.statistics import (
    Estimate,
    difference,
    floats,
    mean_of,
    shared_threshold,
)
from rlrazor.report.drawing import PALETTE, SYMBOLS, Figure, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.prose import Shown, told
from rlrazor.report.rates import Line, Rates, kept_columns
from rlrazor.report.study import Kind, Section, Study
from rlrazor.report.tables import THRESHOLDS
from rlrazor.report.text import INTERVALS, MATCHED, nats, of_all, percent, signed
from rlrazor.studies.grids import Grid

KL = FORWARD

Arm = tuple[Any, ...]
Style = tuple[str, str]
"""A colour and a symbol."""

Kept = Mapping[str, Estimate | None]
"""By column, what is kept; None where no seed gets there."""

Threshold = Callable[[pl.DataFrame, pl.DataFrame, Sequence[str], Sequence[float]], float | None]


def _as_it_is(table: pl.DataFrame) -> pl.DataFrame:
    return table


def by_value(compared: "Compared", arm: Arm) -> Style:
    """A colour for each value of the last column, a symbol for each of the first."""
    return PALETTE[compared.place(arm, -1) % len(PALETTE)], SYMBOLS[compared.place(arm, 0) % len(SYMBOLS)]


def by_method(compared: "Compared", arm: Arm) -> Style:
    """A colour and a symbol for each value of the first column."""
    place = compared.place(arm, 0)
    return PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]


@dataclass(frozen=True)
class Arms:
    """What makes an arm: the columns in which its checkpoints agree, the method first.

    `prepare` adds the columns that the table lacks, and leaves out the checkpoints that are no matter of the study.
    """

    by: tuple[str, ...]
    label: Callable[[Study, Arm], str]
    prepare: Callable[[pl.DataFrame], pl.DataFrame] = _as_it_is
    style: Callable[["Compared", Arm], Style] = by_value


@dataclass(frozen=True)
class Contrast:
    """What two arms differ in: a column of the checkpoints, and how a difference of it is written, with its unit."""

    column: str
    name: str
    unit: str
    form: Callable[[float], str]
    lower_is_better: bool = False


PRIOR = Contrast("prior", "prior score kept", "points", percent)


@dataclass(frozen=True)
class Against:
    """A comparison: of each arm that has the values of `only`, with the arm that has those of `reference` instead.

    `title` names the references for people; `key` stands in the names of its numbers, but for the first comparison.
    What differs is the `measure` of the checkpoints that are reported, which are chosen by prior score whatever it is.
    """

    title: str
    reference: Mapping[str, Any]
    key: str = ""
    only: Mapping[str, Any] = field(default_factory=dict)
    measure: Contrast = PRIOR

    def reference_of(self, by: Sequence[str], arm: Arm) -> Arm | None:
        """The arm that this one is compared with; None where it is not compared, or is one itself."""
        values = dict(zip(by, arm, strict=True))
        reference = tuple({**values, **self.reference}.values())
        chosen = all(values[name] == value for name, value in self.only.items())
        return reference if chosen and reference != arm else None


@dataclass(frozen=True)
class At:
    """Where arms are compared: at one of these new-task scores, chosen by `rule`."""

    thresholds: Sequence[float] = THRESHOLDS[:1]
    rule: Threshold = shared_threshold


@dataclass(frozen=True, eq=False)
class Compared:
    """A study's checkpoints, arm by arm, at the new-task score `at`; not `reached` where arms cannot be compared."""

    study: Study
    of: Arms
    points: pl.DataFrame
    at: float
    reached: bool

    @classmethod
    def make(cls, study: Study, of: Arms, where: At) -> "Compared":
        """Prepare the table and choose where to compare."""
        points = of.prepare(study.points)
        at = where.rule(points, study.bases, of.by, where.thresholds)
        return cls(study, of, points, min(where.thresholds) if at is None else at, at is not None)

    @cached_property
    def arms(self) -> list[Arm]:
        """Those that were run: methods in the order of the table, and so the arms of a method."""
        arms = self.points.select(self.of.by).unique(maintain_order=True).rows()
        methods = list(dict.fromkeys(arm[0] for arm in arms))
        return sorted(arms, key=lambda arm: methods.index(arm[0]))

    @cached_property
    def kept(self) -> dict[Arm, Kept]:
        """Of the checkpoints compared of each arm the prior score, forgetting and KL."""
        return self.kept_at(self.at)

    def kept_at(self, threshold: float) -> dict[Arm, Kept]:
        """The same at another new-task score."""
        reported, columns = matched(self.points, self.of.by, threshold), ("prior", "forgetting", KL)
        return {arm: {name: self.mean(arm, reported, name) for name in columns} for arm in self.arms}

    @cached_property
    def reported(self) -> pl.DataFrame:
        """The checkpoints compared, one of each arm and seed; none where arms cannot be compared."""
        found = matched(self.points, self.of.by, self.at)
        return found if self.reached else found.clear()

    @cached_property
    def rates(self) -> Rates | None:
        """The arms at each of their learning rates; None where the runs have none."""
        if RATE not in self.points.columns:
            return None
        lines = {self.key(arm): Line(arm, self.label(arm), self.style(arm)) for arm in self.arms}
        return Rates(self.points, self.of.by, self.at, lines)

    @cached_property
    def highest(self) -> pl.DataFrame:
        """By arm and seed: the highest new-task score, at any learning rate and time."""
        return self.points.group_by(*self.of.by, "seed", maintain_order=True).agg(pl.max("new"))

    def mean(self, arm: Arm, table: pl.DataFrame, column: str) -> Estimate | None:
        """Of the arm's rows of `table`, one per seed."""
        return mean_of(self.rows(arm, table), column)

    def rows(self, arm: Arm, table: pl.DataFrame | None = None) -> pl.DataFrame:
        """The arm's rows of `table`, or its checkpoints."""
        return rows_of(self.points if table is None else table, self.of.by, arm)

    def values(self, column: int) -> list[Any]:
        """The values of a column of the arms, in their order."""
        return list(dict.fromkeys(arm[column] for arm in self.arms))

    def place(self, arm: Arm, column: int) -> int:
        """The arm's place among the values of a column."""
        return self.values(column).index(arm[column])

    def label(self, arm: Arm) -> str:
        """What the arm is called."""
        return self.of.label(self.study, arm)

    def key(self, arm: Arm) -> str:
        """What the arm is called in the names of numbers."""
        return ".".join(f"{value:g}" if isinstance(value, float) else str(value) for value in arm if value)

    @property
    def named(self) -> dict[str, tuple[str, Arm]]:
        """The arms as the rows of a table: key -> name and arm."""
        return {self.key(arm): (self.label(arm), arm) for arm in self.arms}

    def style(self, arm: Arm) -> Style:
        """How it is drawn."""
        return self.of.style(self, arm)

    def gap(self, arm: Arm, reference: Arm, column: str = "prior") -> Estimate | None:
        """`column` of an arm's checkpoints compared minus that of another's, seed by seed."""
        return self.gap_of(self.rows(arm, self.reported), reference, column)

    def gap_of(self, reported: pl.DataFrame, reference: Arm, column: str = "prior") -> Estimate | None:
        """`column` of checkpoints, one per seed, minus that of an arm's, seed by seed."""
        return difference(reported, self.rows(reference, self.reported), column)

    def judge(self, arm: Arm, reference: Arm, measure: Contrast = PRIOR) -> Judged:
        """The arm beside another: which of the two is better by this measure."""
        gap, seeds = self.gap(arm, reference, measure.column), len(self.study.seeds)
        return Judged.of(self.label(arm), gap, seeds, lower_is_better=measure.lower_is_better)


PanelOf = Callable[[Compared], Panel | None]
TableOf = Callable[[Compared], Keyed]


@dataclass(frozen=True)
class ArmStudy:
    """A study that compares arms at equal new-task score; see the module.

    `height`: of a row of its figure, in pixels, where its panels suggest the wrong one.
    """

    name: str
    grids: Callable[[bool], list[Grid]]
    arms: Arms
    against: Sequence[Against]
    panels: Sequence[PanelOf]
    tables: Sequence[TableOf] = ()
    at: At = field(default_factory=At)
    height: Callable[[Compared], int] | None = None

    def section(self, study: Study) -> Section:
        """Its part of the report."""
        compared = Compared.make(study, self.arms, self.at)
        tables = self.tables_of(compared)
        finding = self.finding(compared)
        panels = [panel for make in self.panels if (panel := make(compared))]
        panels += rates_panels(compared)
        figure = figure_of(self.name, panels, self.height and self.height(compared))
        return section_of(study, self.name, finding, figure, tables, compared.at, tuned=True)

    def tables_of(self, compared: Compared) -> list[Keyed]:
        """What each arm keeps, each comparison, and the study's own tables."""
        comparisons = [comparison_table(compared, one) for one in self.against]
        own = [make(compared) for make in self.tables]
        return [kept_table(compared), levels_table(compared), *comparisons, *own, *rates_tables(compared)]

    def finding(self, compared: Compared) -> str:
        """The verdicts of the first comparison."""
        first, at = self.against[0], f"{compared.at:.0%}"
        if not compared.reached:
            return f"Nothing can be compared: no arm reaches a new score of {at} in all seeds, above that of the base."
        measure = first.measure
        judged = judge_all(compared, first)
        told = in_short(judged, measure.form, measure.unit)
        name = measure.name[0].upper() + measure.name[1:]
        cautions = compared.rates.cautions if compared.rates and judged else ""
        return f"{name} at new ≥ {at} against {first.title}: {told}. {cautions}".strip()


@dataclass(frozen=True, kw_only=True)
class PlainStudy(Kind):
    """A study that makes its section itself."""

    grids: Callable[[bool], list[Grid]]


def section_of(
    study: Study,
    name: str,
    finding: str,
    figure: Figure,
    tables: Sequence[Keyed],
    at: float | None = None,
    numbers: Mapping[str, str] = {},
    *,
    tuned: bool = False,
) -> Section:
    """The section of a study, with the text beside its module, and below it what its verdicts rest on.

    `numbers`: those of the text that no cell has. `tuned`: what is compared is what `rlrazor.analysis.matched` reports.
    """
    numbers = {**numbers, **({} if at is None else {"at": f"{at:.0%}"})}
    below = f"{{{{ made-of }}}}. {INTERVALS} {JUDGED}" + (f" {MATCHED}" if tuned else "")
    return told(study, text_of(name), Shown(finding, figure, tables, numbers), below=below)


def figure_of(name: str, panels: Sequence[Panel], height: int | None = None) -> Figure:
    """In rows of three at most, of two where there are four; `height`: of a row, in pixels."""
    columns = 2 if len(panels) == 4 else max(min(len(panels), 3), 1)
    return Figure(name, panels, columns, height=height and height * ceil(len(panels) / columns))


JUDGED = (
    "Better or worse: the interval of the difference excludes 0. Cannot be told: it holds 0, or there is one seed. Not "
    "comparable: not all seeds allow the comparison."
)


def text_of(name: str) -> Path:
    """Where the text of a study is."""
    return Path(__file__).parent / f"{name.replace('-', '_')}.md"


def judge_all(compared: Compared, against: Against) -> list[Judged]:
    """The arms of a comparison, each beside its own reference."""
    return [compared.judge(arm, reference, against.measure) for arm, reference in pairs_of(compared, against)]


def pairs_of(compared: Compared, against: Against) -> list[tuple[Arm, Arm]]:
    """Each arm that is compared, and its reference."""
    pairs = [(arm, against.reference_of(compared.of.by, arm)) for arm in compared.arms]
    return [(arm, reference) for arm, reference in pairs if reference is not None]


def kept_table(compared: Compared) -> Keyed:
    """What each arm keeps where arms are compared."""
    study = compared.study
    columns = kept_columns(lambda arm, column: compared.kept[arm][column], study.kl_unit, len(study.seeds))
    columns += compared.rates.columns if compared.rates else []
    return table_of(f"At new ≥ {compared.at:.0%}", "arm", compared.named, columns)


def levels_table(compared: Compared) -> Keyed:
    """What each arm keeps at each threshold, and how far it gets."""

    def at(level: float) -> Column[Arm]:
        kept = compared.kept_at(level)
        return Column(f"at-{100 * level:g}", f"new ≥ {level:.0%}", lambda arm: kept[arm]["prior"])

    levels = sorted({*compared.study.thresholds, compared.at})
    best = Column[Arm]("best-new", "best new, %", lambda arm: percent(floats(compared.rows(arm), "new").max()))
    columns = [*map(at, levels), best]
    return table_of("Prior kept, %", "arm", compared.named, columns, len(compared.study.seeds))


def rates_panels(compared: Compared) -> list[Panel]:
    """The curve over learning rates, where an arm has several."""
    return compared.rates.panels if compared.rates and compared.rates.several else []


def rates_tables(compared: Compared) -> list[Keyed]:
    """The same in numbers."""
    return compared.rates.tables if compared.rates and compared.rates.several else []


def comparison_table(compared: Compared, against: Against) -> Keyed:
    """Each arm minus its reference, and the verdict."""
    measure, seeds, key = against.measure, len(compared.study.seeds), f"{against.key}." if against.key else ""
    count = f"{key}n" if key else "gap-n"  # of the first comparison, beside how many seeds an arm has
    columns = [
        Column[tuple[Judged, Estimate | None]](
            f"{key}gap", f"{measure.name}, {measure.unit}", lambda row: signed(row[0].gap, measure.form)
        ),
        Column(f"{key}kl-gap", f"forward KL, {compared.study.kl_unit}", lambda row: signed(row[1], nats)),
        Column(count, "seeds", lambda row: of_all(row[0].gap, seeds)),
        Column(f"{key}verdict", "verdict", lambda row: row[0].verdict),
    ]
    rows = {
        compared.key(arm): (compared.label(arm), (compared.judge(arm, other, measure), compared.gap(arm, other, KL)))
        for arm, other in pairs_of(compared, against)
    }
    return table_of(f"Minus {against.title}, at new ≥ {compared.at:.0%}", "arm", rows, columns)
