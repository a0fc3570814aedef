"""Is the forecast true? Its coverage, width and error on methods and tasks that it was not fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis import forecast
from rlrazor.analysis.forecast import FORWARD, LOSS, PROBE, Trial
from rlrazor.analysis.statistics import Estimate
from rlrazor.errors import RazorError
from rlrazor.report.drawing import INK, PALETTE, Curve, Figure, Layer, Panel, Points, Ticks
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import how_many, in_words, percent, written

LEVEL = 0.9
PREDICTORS: Mapping[str, tuple[str, ...]] = {
    "forward KL, new task": (FORWARD,),
    "reverse KL, new task": ("kl_reverse",),
    "KL on the generic probe": (PROBE,),
    "forward KL and probe": (FORWARD, PROBE),
    "guessing the mean": (),
    "training loss": (LOSS,),
    "weight L2": ("weight_l2",),
}
BASELINES = ("guessing the mean", "training loss", "weight L2")
METHOD, TASK, BEYOND = "method", "task", "beyond SFT"
SPLITS = {
    METHOD: "a method left out",
    TASK: "a task left out",
    BEYOND: "other methods by a law of SFT alone",
}
SFT = "sft"  # what the names of its methods begin with
FAMILIES = {"parity-mnist": "ParityMNIST", "tiny": "tiny language model"}
FAILS = 0.75  # coverage of a left-out method or task below which a 90 % interval has failed on it
HOLDS = 0.85  # mean coverage from which a 90 % interval is said to hold: five points are within what few units can tell


@dataclass(frozen=True)
class Unit:
    """A method or task that was left out: where, and how its forecasts came out."""

    seed: int
    within: str
    trial: Trial


@dataclass(frozen=True)
class Outcome:
    """A predictor put to the test in one family, leaving out methods or tasks."""

    family: str
    left_out: str
    predictor: str
    units: Sequence[Unit]

    def mean(self, name: str) -> Estimate | None:
        """Over units, each counting once, with a t-interval over units."""
        values = [getattr(unit.trial, name) for unit in self.units]
        return Estimate.over(values) if values else None

    @property
    def level(self) -> float:
        """What the intervals promise, the lowest of all units: with few runs it is less than LEVEL."""
        return min(unit.trial.level for unit in self.units)

    @property
    def failed(self) -> list[Unit]:
        """The units on which it failed."""
        return [unit for unit in self.units if unit.trial.coverage < FAILS]


def section(study: Study) -> Section:
    """Every predictor on every left-out method and task."""
    outcomes = examine(study)
    families = [name for name in FAMILIES if name in set(study.table["family"])]
    tasks = {
        name: study.points.filter(pl.col("family") == name)["task"].unique(maintain_order=True) for name in families
    }
    tried = {one.left_out for one in outcomes if one.units}
    counts = "; ".join(
        f"{FAMILIES[name]}: {how_many(study.points.filter(pl.col('family') == name).height, 'checkpoint')}, tasks "
        f"{in_words(list(tasks[name]))}"
        for name in families
    )
    return Section(
        "forecasts",
        "Is the forecast true?",
        "A law is fitted to some runs of a base, and asked about others: runs of a method it has not seen, on the same "
        "new task, or of all methods on a new task it has not seen; or, as most users will calibrate, it is fitted to "
        "SFT alone and asked about the other methods. How often does the 90 % interval hold what was forgotten, how "
        "wide is it, and how wrong is the forecast?",
        finding(outcomes),
        _figure(outcomes, families),
        [
            *(_table(outcomes, family, left_out) for family in families for left_out in SPLITS if left_out in tried),
            _failures(outcomes),
        ],
        f"{counts}; {how_many(len(study.seeds), 'seed')}, each with a base of its own, to which its laws belong. "
        "Forecasts as the monitor makes them: a monotone law and hierarchical jackknife+ intervals over runs; of the "
        "training loss a quadratic, which may fall. Coverage, width and error are means over a unit’s checkpoints, "
        "then over units, ± half the 95 % t-interval over units, which share most of their fits: take it as a guide. "
        "A unit is a method on a task in a seed, or a task in a seed. Error: mean absolute error of the drop, accuracy "
        "points. Where a law rests on fewer than nine runs, no interval of 90 % is finite, and K runs’ is of "
        "K/(K + 1). A forecast has failed on a unit where the interval holds less than three quarters of its "
        "checkpoints. "
        "The generic probe is, on ParityMNIST, the unlabelled test images of the prior task; on the tiny model, "
        "prompts like the prior tasks’, completed by the base: as near to the prior tasks as a probe can be.",
    )


def examine(study: Study) -> list[Outcome]:
    """Each predictor of the table, seed by seed: each method within each task, each task, and all methods but SFT."""
    points = study.points
    bases = study.bases.group_by("family", "seed").agg(pl.col("prior").mean())
    scores = {(family, seed): prior for family, seed, prior in bases.rows()}
    outcomes = []
    for (family,), of_family in points.group_by("family", maintain_order=True):
        for name, columns in PREDICTORS.items():
            if not set(columns) <= set(of_family.columns) or any(
                of_family[column].is_null().all() for column in columns
            ):
                continue
            for left_out in SPLITS:
                units: list[Unit] = []
                groups = [] if left_out == TASK else [TASK]
                sft = [method for method in study.methods if method.startswith(SFT)] if left_out == BEYOND else []
                if left_out == BEYOND and not sft:
                    continue
                for keys, own in of_family.group_by("seed", *groups, maintain_order=True):
                    by, score = (TASK if left_out == TASK else METHOD), scores[family, keys[0]]
                    try:
                        trials = forecast.trial(own, columns, by, score, LEVEL, fitted_to=sft)
                    except RazorError:
                        continue
                    units += [Unit(int(keys[0]), str(keys[1]) if groups else "", trial) for trial in trials]
                outcomes.append(Outcome(str(family), left_out, name, units))
    return outcomes


def _of(outcomes: Sequence[Outcome], family: str, left_out: str) -> list[Outcome]:
    return [one for one in outcomes if (one.family, one.left_out) == (family, left_out) and one.units]


# The finding


def finding(outcomes: Sequence[Outcome]) -> str:
    """Per family and kind of unit: which predictor forecasts best, whether its interval holds, what guessing does."""
    sentences = []
    for family, label in FAMILIES.items():
        for left_out in SPLITS:
            found = _of(outcomes, family, left_out)
            if found:
                sentences.append(_sentence(label, left_out, found))
    return " ".join(sentences) or "There are too few methods and tasks to leave one out."


def _sentence(label: str, left_out: str, found: Sequence[Outcome]) -> str:
    errors = {one.predictor: one.mean("error") for one in found}
    rivals = [one for one in found if one.predictor not in BASELINES]
    lowest = min(_mean(errors[one.predictor]) for one in rivals)
    # Of those that are as good, the simplest, as `forecast.choose` has it.
    best = next(one for one in rivals if _mean(errors[one.predictor]) <= (1 + forecast.TIE) * lowest)
    coverage, width = best.mean("coverage"), best.mean("width")
    said = (
        f"{label}, {SPLITS[left_out]}: {best.predictor} is wrong by {written(errors[best.predictor])} points, its "
        f"{100 * best.level:.0f} % interval holds {written(coverage)} % of checkpoints and is {written(width)} points "
        "wide"
    )
    others = [
        f"{one.predictor} {written(errors[one.predictor])} points ({percent(_mean(one.mean('coverage')))} % held)"
        for one in found
        if one.predictor in ("forward KL, new task", "guessing the mean") and one is not best
    ]
    held = "" if _mean(coverage) >= HOLDS else "; the interval is too narrow there"
    failed = f"; it fails on {len(best.failed)} of {len(best.units)}" if best.failed else ""
    return f"{said}{held}{failed}; {in_words(others)}."


def _mean(estimate: Estimate | None) -> float:
    return estimate.mean if estimate else np.inf


# Tables


def _table(outcomes: Sequence[Outcome], family: str, left_out: str) -> Table:
    found = _of(outcomes, family, left_out)
    low = min((one.level for one in found), default=LEVEL)
    of_fewer = f", intervals of {percent(low)} %, as there are few runs" if low < LEVEL else ""
    rows = [
        [
            one.predictor,
            written(one.mean("coverage")),
            percent(min(unit.trial.coverage for unit in one.units)),
            written(one.mean("width")),
            written(one.mean("error")),
            f"{len(one.failed)} of {len(one.units)}",
        ]
        for one in found
    ]
    headers = ["forecast by", "coverage, %", "lowest, %", "width, points", "error, points", "failed on"]
    return Table(f"{FAMILIES[family]}, {SPLITS[left_out]}{of_fewer}", headers, rows)


def _failures(outcomes: Sequence[Outcome]) -> Table:
    """Where the forecasts by KL fail: unit by unit."""
    rows = [
        [
            one.predictor,
            FAMILIES[one.family],
            " ".join(part for part in (unit.trial.unit, f"on {unit.within}" if unit.within else "") if part)
            + (" (law of SFT)" if one.left_out == BEYOND else ""),
            str(unit.seed),
            percent(unit.trial.coverage),
            percent(unit.trial.error),
        ]
        for one in outcomes
        if one.predictor in ("forward KL, new task", "KL on the generic probe")
        for unit in one.failed
    ]
    headers = ["forecast by", "family", "left out", "seed", "coverage, %", "error, points"]
    return Table("Where it fails", headers, rows or [["never", "", "", "", "", ""]], words=True)


# The figure


def _figure(outcomes: Sequence[Outcome], families: Sequence[str]) -> Figure:
    panels = []
    for family in families:
        names = [name for name in PREDICTORS if any(one.predictor == name for one in _of(outcomes, family, METHOD))]
        for title, column, nominal in (
            ("coverage of the 90 % interval, %", "coverage", 100 * LEVEL),
            ("width of the interval, points", "width", None),
            ("error of the forecast, points", "error", None),
        ):
            panels.append(_panel(outcomes, family, names, title, column, nominal, named=column == "coverage"))
    return Figure("forecasts", panels, columns=3)


def _panel(
    outcomes: Sequence[Outcome],
    family: str,
    names: Sequence[str],
    title: str,
    column: str,
    nominal: float | None,
    *,
    named: bool,
) -> Panel:
    """`named`: with the predictors' names, which the panels of a row share."""
    edges = (-0.6, len(names) - 0.4)
    layers: list[Layer] = []
    places = (
        (0.2, METHOD, PALETTE[0], "circle"),
        (0.0, TASK, PALETTE[1], "square"),
        (-0.2, BEYOND, PALETTE[2], "diamond"),
    )
    for shift, left_out, color, symbol in places:
        found = {one.predictor: one.mean(column) for one in _of(outcomes, family, left_out)}
        shown = [(place, found[name]) for place, name in enumerate(reversed(names)) if found.get(name)]
        x = 100 * np.array([one.mean for _, one in shown if one])
        half = 100 * np.array([one.half if one and one.half is not None else np.nan for _, one in shown], float)
        y = np.array([place for place, _ in shown], float) + shift
        layers.append(
            Points(
                SPLITS[left_out],
                x,
                y,
                color,
                symbol,
                error_low=np.maximum(x - half, 0),
                error_high=x + half if column != "coverage" else np.minimum(x + half, 100),
                error_along="x",
                size=7.0,
            )
        )
    if nominal is not None:
        layers.append(Curve("what the interval promises", np.full(2, nominal), np.array(edges), INK, dashed=True))
    ticks: Ticks = [(float(place), name if named else "") for place, name in enumerate(reversed(names))]
    return Panel(
        FAMILIES[family],
        title,
        "",
        layers,
        x_range=(0, 102) if column == "coverage" else None,
        y_range=edges,
        x_percent=False,
        y_percent=False,
        y_ticks=ticks,
    )
