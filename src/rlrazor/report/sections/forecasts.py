"""Is the forecast true? Its coverage, width and error on methods and tasks that it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.forecast import FORWARD, LOSS, PROBE, TIE
from rlrazor.analysis.outcomes import (
    BASELINES,
    BEYOND,
    GUESS,
    HOLDS,
    LEVEL,
    METHOD,
    PREDICTORS,
    SPLITS,
    TASK,
    Outcome,
    Unit,
    examine,
)
from rlrazor.analysis.statistics import mean_or
from rlrazor.report.drawing import PALETTE, Axis, Figure, Interval, Layer, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, in_short, table_of
from rlrazor.report.layers import across, spots
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, how_many, percent, signed

TEXT = Path(__file__).with_suffix(".md")

NAMES = {
    FORWARD: "forward KL, new task",
    "kl_reverse": "reverse KL, new task",
    PROBE: "KL on the generic probe",
    "both": "forward KL and probe",
    GUESS: "guessing the mean",
    LOSS: "training loss",
    "weight_l2": "weight L2",
}
LEFT_OUT = {
    METHOD: "a method left out",
    TASK: "a task left out",
    BEYOND: "other methods by a law of SFT alone",
}
MODELS = {"parity-mnist": "ParityMNIST", "tiny": "tiny language model"}


@dataclass(frozen=True)
class TestedFamily:
    """The predictors that were tested on one family, leaving out the same."""

    family: str
    left_out: str
    outcomes: Sequence[Outcome]

    @property
    def title(self) -> str:
        """What was left out, and of what the intervals are where runs are few."""
        low = min(one.level for one in self.outcomes)
        of_fewer = f", intervals of {percent(low)} %, as there are few runs" if low < LEVEL else ""
        return f"{MODELS[self.family]}, {LEFT_OUT[self.left_out]}{of_fewer}"

    @property
    def key(self) -> str:
        """In the names of numbers."""
        return f"{self.family}.{self.left_out}"

    @property
    def best(self) -> Outcome | None:
        """Of the KLs that err least, the simplest, as `forecast.choose` has it."""
        errors = {one.predictor: one for one in self.outcomes if one.predictor not in BASELINES}
        lowest = min((_error(one) for one in errors.values()), default=0.0)
        return next((one for one in errors.values() if _error(one) <= (1 + TIE) * lowest), None)


def section(study: Study) -> Section:
    """Every predictor on every left-out method and task."""
    groups = groups_of(examine(study.points, study.bases))
    tables = [best_table(groups), *(table(group) for group in groups), failures(groups)]
    counts = []
    for name in _families(study):
        own = study.points.filter(pl.col("family") == name)
        tasks = ", ".join(own["task"].unique(maintain_order=True))
        counts.append(f"{MODELS[name]}: {how_many(len(own), 'checkpoint')}, tasks {tasks}")
    numbers = {"of-families": "; ".join(counts), "level": f"{LEVEL:.0%}", "holds": f"{HOLDS:.0%}"}
    panels = [panel for name in _families(study) for panel in _panels(groups, name)]
    return told(study, TEXT, Shown(finding(groups), Figure("forecasts", panels, columns=3), tables, numbers))


def groups_of(outcomes: Sequence[Outcome]) -> list[TestedFamily]:
    """The outcomes side by side, of those that were tested at all."""
    groups = []
    for family in MODELS:
        for left_out in SPLITS:
            own = [one for one in outcomes if (one.family, one.left_out) == (family, left_out) and one.units]
            groups += [TestedFamily(family, left_out, own)] if own else []
    return groups


def finding(groups: Sequence[TestedFamily]) -> str:
    """Of each group whether the best forecast beats guessing, and whether its interval holds what it should."""
    best = [(group, one) for group in groups if (one := group.best)]
    if not best:
        return "There are too few methods and tasks to leave one out."
    names = [f"{MODELS[group.family]} / {LEFT_OUT[group.left_out]} / {NAMES[one.predictor]}" for group, one in best]
    gains = zip(names, best, strict=True)
    judged = [Judged(name, one.gain, one.verdict) for name, (_, one) in gains]
    narrow = [name for name, (_, one) in zip(names, best, strict=True) if not one.holds]
    held = f"Intervals too narrow: {'; '.join(narrow)}." if narrow else "Its intervals hold in each case."
    return f"Gain of the best forecast over guessing: {in_short(judged)}. {held}"


Failed = tuple[Outcome, Unit]

COLUMNS = [  # how a predictor did
    Column[Outcome]("coverage", "coverage, %", lambda one: one.mean("coverage")),
    Column("interval", "interval", lambda one: "holds" if one.holds else "too narrow"),
    Column("lowest", "lowest, %", lambda one: percent(one.lowest)),
    Column("width", "width, points", lambda one: one.mean("width")),
    Column("error", "error, points", lambda one: one.mean("error")),
    Column("gain", "gain over guessing", lambda one: one.gain, signed),
    Column("verdict", "against guessing", lambda one: one.verdict if one.guess else NEVER),
    Column("failed", "failed on", lambda one: f"{len(one.failed)} of {len(one.units)}"),
]


def best_table(groups: Sequence[TestedFamily]) -> Keyed:
    """The best forecast of each group."""
    predictor = Column[Outcome]("predictor", "the best forecast by", lambda one: NAMES[one.predictor])
    names = {f"{group.key}.best": f"{MODELS[group.family]}, {LEFT_OUT[group.left_out]}" for group in groups}
    best = {key: (name, group.best) for (key, name), group in zip(names.items(), groups, strict=True)}
    found = {key: (name, one) for key, (name, one) in best.items() if one}
    made = table_of("The best of the KLs", "left out", found, [predictor, *COLUMNS])
    rows = {key: made.rows.get(key, (name, dict.fromkeys(made.columns, NEVER))) for key, name in names.items()}
    return replace(made, rows=rows)


def table(group: TestedFamily) -> Keyed:
    """Every predictor of a group."""
    rows = {f"{group.key}.{one.predictor}": (NAMES[one.predictor], one) for one in group.outcomes}
    return table_of(group.title, "forecast by", rows, COLUMNS)


def failures(groups: Sequence[TestedFamily]) -> Keyed:
    """Where the forecasts by KL fail: unit by unit."""

    def where(of: Failed) -> str:
        one, unit = of
        told = " on ".join(filter(None, (unit.trial.unit, unit.within)))
        return told + (" (law of SFT)" if one.left_out == BEYOND else "")

    columns = [
        Column[Failed]("family", "family", lambda of: MODELS[of[0].family]),
        Column("unit", "left out", where),
        Column("seed", "seed", lambda of: str(of[1].seed)),
        Column("coverage", "coverage, %", lambda of: percent(of[1].trial.coverage)),
        Column("error", "error, points", lambda of: percent(of[1].trial.error)),
    ]
    outcomes = [(group.key, one) for group in groups for one in group.outcomes if one.predictor in (FORWARD, PROBE)]
    failed = [(key, one, unit) for key, one in outcomes for unit in one.failed]
    rows = {
        f"{key}.{one.predictor}.failed-{place}": (NAMES[one.predictor], (one, unit))
        for place, (key, one, unit) in enumerate(failed)
    }
    made = table_of("Where it fails", "forecast by", rows, columns)
    return made if rows else replace(made, rows={"none": ("never", dict.fromkeys(made.columns, ""))})


def _families(study: Study) -> list[str]:
    return [name for name in MODELS if name in set(study.table["family"])]


def _error(one: Outcome) -> float:
    return mean_or(one.mean("error"), np.inf)


# The figure


def _panels(groups: Sequence[TestedFamily], family: str) -> list[Panel]:
    """Coverage, width and error of a family's forecasts; the names of the predictors stand beside the first."""
    own = [group for group in groups if group.family == family]
    tested = {one.predictor for group in own if group.left_out == METHOD for one in group.outcomes}
    names = [name for name in reversed(list(PREDICTORS)) if name in tested]
    titles = {
        "coverage": "coverage of the 90 % interval, %",
        "width": "width of the interval, points",
        "error": "error of the forecast, points",
    }
    panels = []
    for column, title in titles.items():
        is_coverage = column == "coverage"
        axis = Axis.of([NAMES[name] if is_coverage else "" for name in names], margin=0.6)
        layers: list[Layer] = [_dots(own, left_out, column, names) for left_out in SPLITS]
        layers += [across("what the interval promises", 100 * LEVEL, axis.ends)] if is_coverage else []
        x_axis = Axis(title, (0, 102) if is_coverage else None, percent=False)
        panels.append(Panel(MODELS[family], x_axis, axis, layers))
    return panels


def _dots(groups: Sequence[TestedFamily], left_out: str, column: str, names: Sequence[str]) -> Layer:
    """A dot for each predictor, where so much is left out."""
    shift, style = {
        METHOD: (0.2, (PALETTE[0], "circle")),
        TASK: (0.0, (PALETTE[1], "square")),
        BEYOND: (-0.2, (PALETTE[2], "diamond")),
    }[left_out]
    found = {one.predictor: one for group in groups if group.left_out == left_out for one in group.outcomes}
    shown = [(place + shift, found[name].mean(column)) for place, name in enumerate(names) if name in found]
    dots = spots(LEFT_OUT[left_out], [one for _, one in shown], [place for place, _ in shown], style, along="x")
    most = 100.0 if column == "coverage" else np.inf
    interval = dots.interval
    return replace(dots, interval=interval and Interval(interval.low.clip(0), interval.high.clip(None, most), "x"))
