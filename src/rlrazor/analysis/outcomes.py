"""How forecasts come out on methods and tasks that they were not fitted to, predictor by predictor, seed by seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from rlrazor.analysis import forecast
from rlrazor.analysis.forecast import FORWARD, LOSS, PROBE, LawTest
from rlrazor.analysis.statistics import Estimate, Standing, over, verdict
from rlrazor.errors import RazorError

LEVEL = 0.9  # of the intervals
GUESS = "guess"
PREDICTORS: Mapping[str, tuple[str, ...]] = {
    FORWARD: (FORWARD,),
    "kl_reverse": ("kl_reverse",),
    PROBE: (PROBE,),
    "both": (FORWARD, PROBE),
    GUESS: (),
    LOSS: (LOSS,),
    "weight_l2": ("weight_l2",),
}
BASELINES = (GUESS, LOSS, "weight_l2")
METHOD, TASK, BEYOND = "method", "task", "beyond"
SPLITS = (METHOD, TASK, BEYOND)
"""What is left out: a method within a task, a task, or all methods but SFT's."""
SFT = "sft"  # what the names of its methods begin with
FAILS = 0.75  # coverage of a left-out method or task below which a 90 % interval has failed on it
HOLDS = 0.85  # mean coverage from which a 90 % interval is said to hold: five points are within what few units can tell


@dataclass(frozen=True)
class Unit:
    """A method or task that was left out: where, and how its forecasts came out."""

    seed: int
    within: str
    trial: LawTest


@dataclass(frozen=True)
class Outcome:
    """A predictor put to the test in one family of experiments, leaving out methods or tasks, against a `guess`."""

    family: str
    left_out: str
    predictor: str
    units: Sequence[Unit]
    guess: "Outcome | None" = None

    def mean(self, name: str) -> Estimate | None:
        """Of the trials' coverage, width or error; over units, each counting once, with a t-interval over units."""
        return over(getattr(unit.trial, name) for unit in self.units)

    @property
    def lowest(self) -> float:
        """The lowest coverage of a unit."""
        return min(unit.trial.coverage for unit in self.units)

    @property
    def level(self) -> float:
        """What the intervals promise, the lowest of all units: with few runs it is less than LEVEL."""
        return min(unit.trial.level for unit in self.units)

    @property
    def holds(self) -> bool:
        """Whether the intervals hold about as many checkpoints as they should."""
        coverage = self.mean("coverage")
        return coverage is not None and coverage.mean >= HOLDS

    @property
    def failed(self) -> list[Unit]:
        """The units on which it failed."""
        return [unit for unit in self.units if unit.trial.coverage < FAILS]

    @property
    def errors(self) -> Mapping[tuple[int, str, str], float]:
        """By seed, place and name of the unit."""
        return {(unit.seed, unit.within, unit.trial.unit): unit.trial.error for unit in self.units}

    @property
    def gain(self) -> Estimate | None:
        """How much smaller its error is than that of guessing, unit by unit; None where they share none."""
        guessed = self.guess.errors if self.guess else {}
        return over(guessed[key] - error for key, error in self.errors.items() if key in guessed)

    @property
    def verdict(self) -> Standing:
        """Whether it is better than guessing, over all units."""
        return verdict(self.gain, len(self.units))


def examine(points: pl.DataFrame, bases: pl.DataFrame) -> list[Outcome]:
    """Each predictor of the table, seed by seed: each method within each task, each task, and all methods but SFT.

    `points` has `family` and `task`, `bases` a row for each family and seed.
    """
    scores = {
        (family, seed): prior
        for family, seed, prior in bases.group_by("family", "seed").agg(pl.col("prior").mean()).rows()
    }
    sft = [method for method in points["method"].unique(maintain_order=True) if method.startswith(SFT)]
    outcomes: list[Outcome] = []
    for (family,), own in points.group_by("family", maintain_order=True):
        of_seeds = {seed: prior for (name, seed), prior in scores.items() if name == family}
        there = [name for name, columns in PREDICTORS.items() if _measured(own, columns)]
        for split in SPLITS if sft else (METHOD, TASK):
            units = {name: list(_units(own, PREDICTORS[name], split, of_seeds, sft)) for name in there}
            guess = Outcome(str(family), split, GUESS, units[GUESS])
            told = {name: Outcome(str(family), split, name, units[name], guess) for name in there}
            outcomes += (told | {GUESS: guess}).values()
    return outcomes


def _measured(points: pl.DataFrame, columns: Sequence[str]) -> bool:
    return set(columns) <= set(points.columns) and not any(points[column].is_null().all() for column in columns)


def _units(
    points: pl.DataFrame, columns: tuple[str, ...], split: str, scores: Mapping[int, float], sft: Sequence[str]
) -> Iterator[Unit]:
    """The trials of a predictor in each seed, and in each task unless that is what is left out."""
    groups, by = ([], TASK) if split == TASK else ([TASK], METHOD)
    for (seed, *within), own in points.group_by("seed", *groups, maintain_order=True):
        fitted_to = sft if split == BEYOND else ()
        try:
            trials = forecast.trial(own, columns, by, scores[int(seed)], LEVEL, fitted_to=fitted_to)
        except RazorError:
            continue
        yield from (Unit(int(seed), str(within[0]) if within else "", trial) for trial in trials)
