"""What a sweep says: its folder read, and analysed once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from rlrazor.analysis import frontier, law
from rlrazor.analysis.law import PredictorSummary
from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import Estimate, over
from rlrazor.errors import RazorError
from rlrazor.report.measures import MAIN_MEASURES
from rlrazor.report.study import Study
from rlrazor.report.tables import MATCH, Range, ranges_of
from rlrazor.runs.records import BASE, JSON
from rlrazor.runs.store import RunStore
from rlrazor.runs.tables import COLUMNS, read_table
from rlrazor.system.documents import checked, parse_json, read_text

if TYPE_CHECKING:
    from rlrazor.system.schema import Schema

AGAIN = "run the same command again"

CALIBRATION = "calibrate"  # the preset of the runs of a law

_SCORES = ("new", "prior", "kl_forward")
_SENSITIVITY_COLUMNS = ("setting", "value", *COLUMNS)


@dataclass(frozen=True, eq=False)
class Sweep:
    """The sweep in a folder, read as `study` and analysed.

    `areas` is method -> hypervolume of its frontier per seed, see `frontier_area`. `sensitivity` is a small sweep for
    each value of a setting. `distillation` has pairs of a teacher and the one of its students that is reported at its
    new, to within MATCH, None if none got there; `imitation_gap` is the students' prior minus their teachers'.
    """

    folder: Path
    study: Study
    laws: Sequence[PredictorSummary]
    ranges: Sequence[Range]
    retention: pl.DataFrame
    areas: Mapping[str, Estimate]
    sensitivity: Sequence[JSON]
    distillation: Sequence[JSON]

    @property
    def config(self) -> JSON:
        """What config.json says."""
        return self.study.description

    @property
    def points(self) -> pl.DataFrame:
        """The distinct checkpoints."""
        return self.study.points

    @property
    def law(self) -> PredictorSummary:
        """The laws in forward KL."""
        return next(fits for fits in self.laws if fits.predictor == "kl_forward")

    @property
    def is_calibration(self) -> bool:
        """Whether the runs were made for a law, which says itself what it was chosen by."""
        return self.config.get("preset") == CALIBRATION

    @property
    def is_sequence(self) -> bool:
        """Whether the runs are stages, one after another, of which the best one by new score says little."""
        return "stage" in self.study.table.columns

    @property
    def prior_tasks(self) -> list[str]:
        """The tasks whose mean is the prior accuracy, where the config names several and the table has them."""
        named = self.config.get("prior_tasks", [])
        return [name for name in named if f"prior_{name}" in self.study.table.columns] if len(named) > 1 else []

    def base(self, column: str) -> Estimate:
        """The untuned policy's score: `new` or `prior`."""
        return Estimate.over(self.study.bases[column].to_list())

    @property
    def imitation_gap(self) -> Estimate | None:
        """Student's minus teacher's prior accuracy: per seed the mean over its pairs, over seeds; None for no pair."""
        by_seed: dict[int, list[float]] = {}
        for pair in self.distillation:
            if pair["student"]:
                by_seed.setdefault(pair["seed"], []).append(pair["student"]["prior"] - pair["teacher"]["prior"])
        return over(float(np.mean(gaps)) for gaps in by_seed.values())

    @property
    def ranking(self) -> list[str]:
        """The methods by what they keep at the lowest threshold; last those that never get there."""
        lowest = self.retention.filter(pl.col("threshold") == self.retention["threshold"].min())
        order = lowest.sort(["mean", "best_new"], descending=True, nulls_last=True, maintain_order=True)
        return order["method"].to_list()


def load_sweep(folder: Path) -> Sweep:
    """Read an output folder's sweep and analyse it (20 s for 12,000 checkpoints, nearly all of it the bootstrap).

    Raises RazorError when a file is missing, damaged or incomplete, or when no method has been fine-tuned.
    """
    study = read_sweep(folder)
    distillation = _read_distillation(folder, study.table)  # before the laws, which take long
    measures = [name for name in study.description["drift"] if name in MAIN_MEASURES]
    laws = law.summarise(study.table, measures)
    return Sweep(
        folder,
        study,
        laws,
        ranges=[*ranges_of(study.points, measures), Range(None, len(study.points), laws)],
        retention=frontier.retention(study.table, study.thresholds),
        areas=_areas(study),
        sensitivity=_read_sensitivity(folder, study),
        distillation=distillation,
    )


def read_sweep(folder: Path, name: str = "sweep") -> Study:
    """An output folder's config.json and table, as a study of this name; raises as `load_sweep`."""
    from rlrazor.report.description import SweepDescription

    config = described(folder / "config.json", SweepDescription)
    path = folder / "records.parquet"
    study = study_in(name, config, path, "fine-tune at least one method first", of_sweep=True)
    return replace(study, store=RunStore(folder))


def study_in(name: str, description: JSON, path: Path, mend: str = AGAIN, *, of_sweep: bool = False) -> Study:
    """A table of records with its description; raises RazorError for one without methods, or without a seed's base.

    A further column that no checkpoint has a value in counts as missing.
    """
    table = read_table(path)
    nulls = [column for column in table.columns if table[column].null_count() == len(table)]
    table = table.drop(set(nulls) - set(COLUMNS))
    points, bases = law.distinct(table), table.filter(pl.col("method") == BASE)
    if points.is_empty():
        raise RazorError(f"{path} holds base policies only: {mend}.")
    unbased = sorted(set(points["seed"]) - set(bases["seed"]))
    if unbased:
        raise RazorError(f"{path} has no base policy for seed {unbased[0]}: {AGAIN}.")
    return Study(name, description, table, points, bases, of_sweep)


def frontier_area(points: pl.DataFrame, base: Mapping[str, Any]) -> float:
    """The hypervolume of a frontier, as a share of the ideal's.

    The reference is (the base's new accuracy, 0): what was there before does not count. The ideal, 1, is to reach 100 %
    on the new task at the base's prior accuracy.
    """
    area = frontier.hypervolume(points["new"].to_numpy(), points["prior"].to_numpy(), (base["new"], 0.0))
    ideal = (1 - base["new"]) * base["prior"]
    return area / ideal if ideal > 0 else 0.0


def described(path: Path, schema: "type[Schema]") -> JSON:
    """What a JSON file of an output folder holds. Raises RazorError when it is missing, or not of this schema."""
    found: JSON = read_any(path)
    checked(schema, found, path, mend=AGAIN)
    return found


def read_any(path: Path) -> Any:
    """What a JSON file of an output folder holds, whatever that is. Raises RazorError where it is none."""
    missing = f"There is no {path}: give the output folder of a finished `razor reproduce`."
    return parse_json(read_text(path, mend=AGAIN, missing=missing), path, mend=AGAIN)


def _read_sensitivity(folder: Path, study: Study) -> list[JSON]:
    path = folder / "sensitivity.parquet"
    if not path.exists():
        return []
    table = read_table(path, _SENSITIVITY_COLUMNS).sort("setting", "value", maintain_order=True)
    return [
        {
            "setting": setting,
            "value": value,
            "configured": study.description["config"].get(setting) == value,
            **_variant(rows, study.thresholds[0]),
        }
        for (setting, value), rows in table.group_by(["setting", "value"], maintain_order=True)
    ]


def _variant(rows: pl.DataFrame, threshold: float) -> JSON:
    """A small sweep in numbers; `kept`: method -> prior at the threshold, best first, and who `never` gets there."""
    fits = law.summarise(rows, ("kl_forward",), samples=0)[0]
    base = rows.filter(pl.col("method") == BASE)
    kept = frontier.retention(rows, [threshold]).sort("mean", descending=True, nulls_last=True)
    return {
        "base_new": Estimate.over(base["new"].to_list()).mean,
        "base_prior": Estimate.over(base["prior"].to_list()).mean,
        "quadratic_r2": law.r2_of(fits.quadratic),
        "saturating_r2": law.r2_of(fits.saturating),
        "kept": dict(kept.drop_nulls("mean").select("method", "mean").iter_rows()),
        "never": kept.filter(pl.col("mean").is_null())["method"].to_list(),
    }


def _read_distillation(folder: Path, table: pl.DataFrame) -> list[JSON]:
    path = folder / "teachers.json"
    if not path.exists():
        return []
    from rlrazor.report.description import Teachings

    named = read_any(path)
    if not isinstance(named, list):
        raise RazorError(f"{path} is not a list of teachers: {AGAIN}.")
    teachings = checked(Teachings, {"teachers": named}, path, mend=AGAIN).teachers
    # Each pair once: one may teach at two levels.
    pairs = dict.fromkeys((one.seed, one.method, one.student, one.run_id, one.step) for one in teachings)
    if not pairs:
        return []
    students: dict[tuple[int, str], list[pl.DataFrame]] = {}
    found = []
    for seed, method, student, run_id, step in pairs:
        scores = _scores(path, table, run_id, step)
        own = table.filter(pl.col("method") == student, pl.col("seed") == seed)
        if "teacher" in table.columns:  # else there is one for each seed
            own = own.filter(pl.col("teacher") == f"{run_id}/{step}")
        level = len(students.setdefault((seed, student), []))
        students[seed, student].append(own.with_columns(level=level, goal=scores["new"] - MATCH))
        found.append({"seed": seed, "teacher_method": method, "student_method": student, "teacher": scores})
        found[-1]["student"] = level
    reported = matched(
        pl.concat([one for own in students.values() for one in own]), ["method", "level"], pl.col("goal")
    )
    for pair in found:
        own = reported.filter(method=pair["student_method"], level=pair["student"], seed=pair["seed"])
        pair["student"] = None if own.is_empty() else own.select(_SCORES).row(0, named=True)
    return found


def _scores(path: Path, table: pl.DataFrame, run_id: str, step: int) -> JSON:
    taught_by = table.filter(pl.col("run_id") == run_id, pl.col("step") == step)
    if taught_by.is_empty():
        raise RazorError(f"{path} names a teacher that records.parquet does not hold: {AGAIN}.")
    return taught_by.select(_SCORES).row(0, named=True)


def _areas(study: Study) -> dict[str, Estimate]:
    """Method -> estimate of its frontier's area, each seed against its own base."""
    base_of = {row["seed"]: row for row in study.bases.select("seed", "new", "prior").to_dicts()}
    by_method: dict[str, list[float]] = {}
    for (method, seed), rows in study.points.group_by(["method", "seed"], maintain_order=True):
        by_method.setdefault(str(method), []).append(frontier_area(rows, base_of[seed]))
    return {method: Estimate.over(areas) for method, areas in by_method.items()}


def sweep_summary(sweep: Sweep) -> JSON:
    """The numbers of the sweep, for JSON; accuracies and forgetting as fractions of 1."""
    gap = sweep.imitation_gap
    return {
        "experiment": sweep.config.get("experiment"),
        "preset": sweep.config["preset"],
        "seeds": sweep.study.seeds,
        "runs": sweep.study.table.filter(pl.col("method") != BASE)["run_id"].n_unique(),
        "checkpoints": len(sweep.points),
        "base": {name: asdict(sweep.base(name)) for name in ("new", "prior")},
        "laws": [law.as_json() for law in sweep.laws],
        "ranges": [
            {"limit": within.limit, "checkpoints": within.checkpoints, "r2": _r2_by_law(within)}
            for within in sweep.ranges
        ],
        "retention": sweep.retention.to_dicts(),
        "frontier_area": {method: asdict(area) for method, area in sweep.areas.items()},
        "sensitivity": list(sweep.sensitivity),
        "distillation": list(sweep.distillation),
        "distillation_gap": asdict(gap) if gap else None,
    }


def _r2_by_law(within: Range) -> JSON:
    return {
        fits.predictor: {
            "quadratic": law.r2_of(fits.quadratic),
            "saturating": law.r2_of(fits.saturating),
        }
        for fits in within.laws
    }
