"""What a sweep says: read and analysed once, then put into tables for the page, the terminal and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich import box
from rich.table import Table as RichTable

from rlrazor.analysis import frontier, law
from rlrazor.analysis.law import LawSummary, LeftOut, PredictorSummary, Quadratic, Saturating
from rlrazor.analysis.statistics import Estimate
from rlrazor.errors import RazorError
from rlrazor.report.text import NEVER, number, percent, with_seeds, written
from rlrazor.runs.records import BASE, JSON
from rlrazor.runs.store import COLUMNS
from rlrazor.runs.store import read_table as read_table
from rlrazor.system.documents import checked, parse_json, read_text

if TYPE_CHECKING:
    from rlrazor.system.schema import Schema

AGAIN = "run the same command again"
THRESHOLDS = (0.95, 0.96, 0.97)  # unless the folder's config names others

# Unless the config says otherwise; the first is what the paper calls RL, the second SFT.
FAMILIES: Mapping[str, Sequence[str]] = {
    "RL": ("grpo", "dr-grpo", "reinforce", "grpo+kl", "dr-grpo+kl", "kl-dpg"),
    "SFT": ("sft", "sft-1", "sft-2", "sft-one", "sft-two", "sft-uniform", "simpo"),
}
MATCH = 0.002  # a student within 0.2 points of its teacher's new accuracy, 20 of 10,000 test items, has matched it

LABELS = {  # other drift measures are called by their column
    "kl_forward": "forward KL",
    "kl_reverse": "reverse KL",
    "kl_correct": "KL on the base’s correct completions",
    "kl_optimal": "KL from the KL-minimal solution",
    "kl_probe": "KL on a generic probe",
}

# Nats of forward KL. Forgetting ends when nothing is left to forget, forward KL never does (a label that the policy
# gives up costs more the more surely it is given up), so how well a law fits depends on how far the sweep went.
RANGES = (1.0, 2.0, 4.0, 8.0)

# What the page fits its laws to, with intervals. A sweep may hold dozens more measures: see `sections.predictors`.
MAIN_MEASURES = ("kl_forward", "kl_reverse", "total_variation")

CALIBRATION = "calibrate"  # the preset of the runs of a law

_TEACHER_KEYS = ("seed", "method", "run_id", "step", "student")
_SENSITIVITY_COLUMNS = ("setting", "value", *COLUMNS)


@dataclass(frozen=True)
class Range:
    """The laws fitted to the checkpoints within `limit` nats of forward KL; None: to all."""

    limit: float | None
    checkpoints: int
    laws: Sequence[PredictorSummary]


@dataclass(frozen=True)
class Variant:
    """A small sweep with one setting changed. `kept` is method -> prior at the lowest threshold, best method first."""

    setting: str
    value: int
    configured: bool
    base_new: float
    base_prior: float
    quadratic_r2: float | None
    saturating_r2: float | None
    kept: Mapping[str, float]
    never: Sequence[str]


@dataclass(frozen=True)
class Score:
    """What a checkpoint is compared by."""

    new: float
    prior: float
    kl_forward: float


@dataclass(frozen=True)
class Imitation:
    """A teacher and the best of its students: highest prior at no less new, to within MATCH. None if none got there."""

    seed: int
    teacher_method: str
    student_method: str
    teacher: Score
    student: Score | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """The sweep in a folder, read and analysed.

    `points` are the distinct checkpoints, `bases` the untuned policies, a row per seed, and `table` all rows.
    `areas` is method -> hypervolume of its frontier per seed, see `frontier_area`. `imitation_gap` is the students'
    prior accuracy minus their teachers'.
    """

    folder: Path
    config: JSON
    table: pl.DataFrame
    points: pl.DataFrame
    bases: pl.DataFrame
    laws: Sequence[PredictorSummary]
    ranges: Sequence[Range]
    retention: pl.DataFrame
    areas: Mapping[str, Estimate]
    sensitivity: Sequence[Variant]
    distillation: Sequence[Imitation]

    @property
    def is_calibration(self) -> bool:
        """Whether the runs were made for a law, which says itself what it was chosen by."""
        return self.config.get("preset") == CALIBRATION

    @property
    def is_sequence(self) -> bool:
        """Whether the runs are stages, one after another, of which the best one by new score says little."""
        return "stage" in self.table.columns

    @property
    def methods(self) -> list[str]:
        """The fine-tuning methods, in the order of the table."""
        return self.points["method"].unique(maintain_order=True).to_list()

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(self.points["seed"].unique().to_list())

    @property
    def thresholds(self) -> Sequence[float]:
        """The new-task accuracies at which methods are compared, ascending."""
        return thresholds_of(self.config)

    @property
    def prior_tasks(self) -> list[str]:
        """The tasks whose mean is the prior accuracy, where the config names several and the table has them."""
        named = self.config.get("prior_tasks", [])
        return [name for name in named if f"prior_{name}" in self.table.columns] if len(named) > 1 else []

    @property
    def base_new(self) -> Estimate:
        """The untuned policy's accuracy on the new task."""
        return Estimate.over(self.bases["new"].to_list())

    @property
    def base_prior(self) -> Estimate:
        """The untuned policy's accuracy on the prior tasks."""
        return Estimate.over(self.bases["prior"].to_list())

    @property
    def imitation_gap(self) -> Estimate | None:
        """Student's minus teacher's prior accuracy: per seed the mean over its pairs, over seeds; None for no pair."""
        by_seed: dict[int, list[float]] = {}
        for pair in self.distillation:
            if pair.student:
                by_seed.setdefault(pair.seed, []).append(pair.student.prior - pair.teacher.prior)
        return Estimate.over([float(np.mean(gaps)) for gaps in by_seed.values()]) if by_seed else None

    def label(self, method: str) -> str:
        """The method's name for people."""
        return str(self.config["labels"].get(method, method))


def load_sweep(folder: Path) -> Sweep:
    """Read an output folder's sweep and analyse it (20 s for 12,000 checkpoints, nearly all of it the bootstrap).

    Raises RazorError when a file is missing, damaged or incomplete, or when no method has been fine-tuned.
    """
    config, table, points, bases = read_sweep(folder)
    distillation = _read_distillation(folder, table)  # before the laws, which take long
    measures = [name for name in config["drift"] if name in MAIN_MEASURES]
    return Sweep(
        folder,
        config,
        table,
        points,
        bases,
        laws=(laws := law.summarise(table, measures)),
        ranges=[*ranges_of(points, measures), Range(None, len(points), laws)],
        retention=frontier.retention(table, thresholds_of(config)),
        areas=_areas(points, bases),
        sensitivity=_read_sensitivity(folder, config),
        distillation=distillation,
    )


def read_sweep(folder: Path) -> tuple[JSON, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """An output folder's config.json, its table, the distinct checkpoints and the bases; raises as `load_sweep`."""
    config = _read_config(folder)
    table = read_table(folder / "records.parquet", COLUMNS)
    points, bases = law.distinct(table), table.filter(pl.col("method") == BASE)
    if points.is_empty():
        raise RazorError(f"{folder / 'records.parquet'} holds base policies only: fine-tune at least one method first.")
    unbased = sorted(set(points["seed"]) - set(bases["seed"]))
    if unbased:
        raise RazorError(
            f"{folder / 'records.parquet'} has no base policy for seed {unbased[0]}: run the same command again."
        )
    return config, table, points, bases


def thresholds_of(config: Mapping[str, Any]) -> Sequence[float]:
    """The new-task accuracies, ascending, at which methods are compared: the config's, or THRESHOLDS."""
    return tuple(sorted(config.get("thresholds", THRESHOLDS)))


def families_of(config: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """Which methods count as RL and which as SFT: the config's `families`, or FAMILIES."""
    families: Mapping[str, Sequence[str]] = config.get("families", FAMILIES)
    return families


def kl_unit_of(config: Mapping[str, Any]) -> str:
    """What KL is counted in: "nats", or as the config says, such as "nats per completion"."""
    return str(config.get("kl_unit", "nats"))


def frontier_area(points: pl.DataFrame, base: Mapping[str, Any]) -> float:
    """The hypervolume of a frontier, as a share of the ideal's.

    The reference is (the base's new accuracy, 0): what was there before does not count. The ideal, 1, is to reach 100 %
    on the new task at the base's prior accuracy.
    """
    area = frontier.hypervolume(points["new"].to_numpy(), points["prior"].to_numpy(), (base["new"], 0.0))
    ideal = (1 - base["new"]) * base["prior"]
    return area / ideal if ideal > 0 else 0.0


# Reading


def _read_config(folder: Path) -> JSON:
    from rlrazor.report.description import SweepDescription

    return described(folder / "config.json", SweepDescription)


def described(path: Path, schema: "type[Schema]") -> JSON:
    """What a JSON file of an output folder holds. Raises RazorError when it is missing, or not of this schema."""
    found: JSON = read_any(path)
    checked(schema, found, path, mend=AGAIN)
    return found


def read_any(path: Path) -> Any:
    """What a JSON file of an output folder holds, whatever that is. Raises RazorError where it is none."""
    missing = f"There is no {path}: give the output folder of a finished `razor reproduce`."
    return parse_json(read_text(path, mend=AGAIN, missing=missing), path, mend=AGAIN)


def _read_sensitivity(folder: Path, config: Mapping[str, Any]) -> list[Variant]:
    path = folder / "sensitivity.parquet"
    if not path.exists():
        return []
    table = read_table(path, _SENSITIVITY_COLUMNS).sort("setting", "value", maintain_order=True)
    return [
        _variant(setting, value, config["config"].get(setting) == value, rows, thresholds_of(config)[0])
        for (setting, value), rows in table.group_by(["setting", "value"], maintain_order=True)
    ]


def _variant(setting: str, value: int, configured: bool, rows: pl.DataFrame, threshold: float) -> Variant:
    fits = law.summarise(rows, ("kl_forward",), samples=0)[0]
    base = rows.filter(pl.col("method") == BASE)
    kept = frontier.retention(rows, [threshold]).sort("mean", descending=True, nulls_last=True)
    reached = kept.drop_nulls("mean")
    return Variant(
        setting,
        value,
        configured,
        Estimate.over(base["new"].to_list()).mean,
        Estimate.over(base["prior"].to_list()).mean,
        fits.quadratic.r2 if fits.quadratic else None,
        fits.saturating.r2 if fits.saturating else None,
        dict(zip(reached["method"], reached["mean"], strict=True)),
        kept.filter(pl.col("mean").is_null())["method"].to_list(),
    )


def _read_distillation(folder: Path, table: pl.DataFrame) -> list[Imitation]:
    path = folder / "teachers.json"
    if not path.exists():
        return []
    from rlrazor.report.description import Teachings

    named = read_any(path)
    if not isinstance(named, list):
        raise RazorError(f"{path} is not a list of teachers: {AGAIN}.")
    teachers = checked(Teachings, {"teachers": named}, path, mend=AGAIN).teachers
    pairs = [{key: getattr(teacher, key) for key in _TEACHER_KEYS} for teacher in teachers]
    distinct = [pair for index, pair in enumerate(pairs) if pair not in pairs[:index]]  # one may teach at two levels
    return [_imitation(path, table, **pair) for pair in distinct]


def _imitation(
    path: Path, table: pl.DataFrame, *, seed: int, method: str, run_id: str, step: int, student: str
) -> Imitation:
    teachers = table.filter(pl.col("run_id") == run_id, pl.col("step") == step)
    if teachers.is_empty():
        raise RazorError(f"{path} names a teacher that records.parquet does not hold: run the same command again.")
    teacher = _score(teachers)
    own = table.filter(pl.col("method") == student, pl.col("seed") == seed)
    if "teacher" in table.columns:  # else there is one for each seed
        own = own.filter(pl.col("teacher") == f"{run_id}/{step}")
    students = own.filter(pl.col("new") >= teacher.new - MATCH).sort("prior", descending=True, maintain_order=True)
    return Imitation(seed, method, student, teacher, None if students.is_empty() else _score(students))


def _score(rows: pl.DataFrame) -> Score:
    return Score(**rows.select("new", "prior", "kl_forward").row(0, named=True))


def _areas(points: pl.DataFrame, bases: pl.DataFrame) -> dict[str, Estimate]:
    """Method -> estimate of its frontier's area, each seed against its own base."""
    base_of = {row["seed"]: row for row in bases.select("seed", "new", "prior").to_dicts()}
    by_method: dict[str, list[float]] = {}
    for (method, seed), rows in points.group_by(["method", "seed"], maintain_order=True):
        by_method.setdefault(str(method), []).append(frontier_area(rows, base_of[seed]))
    return {method: Estimate.over(areas) for method, areas in by_method.items()}


def ranges_of(points: pl.DataFrame, predictors: Sequence[str]) -> list[Range]:
    """The ranges that hold some, but not all, of the checkpoints."""
    ranges = []
    for limit in RANGES:
        near = points.filter(pl.col("kl_forward") <= limit)
        if law.MIN_POINTS <= len(near) < len(points):
            ranges.append(Range(limit, len(near), law.summarise(near, predictors, samples=0)))
    return ranges


# Tables


@dataclass(frozen=True)
class Table:
    """A table to show: cells are text, the first column names the row. `words`: the cells are not numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


def retention_table(sweep: Sweep) -> Table:
    """The prior accuracy that each method keeps, best at the first threshold on top, below the base."""
    base_new, base_prior = sweep.base_new, written(sweep.base_prior)
    # In brackets where the base itself does not reach the threshold: it is there to compare with.
    compared = [base_prior if base_new.mean >= at else f"({base_prior})" for at in sweep.thresholds]
    rows = [["base (not fine-tuned)", *compared, written(base_new), NEVER]]
    for method in ranking(sweep.retention):
        cells = sweep.retention.filter(pl.col("method") == method).to_dicts()
        rows.append(
            [sweep.label(method), *map(_kept, cells), percent(cells[0]["best_new"]), written(sweep.areas[method])]
        )
    thresholds = [f"new ≥ {at:.0%}" for at in sweep.thresholds]
    return Table("Best prior accuracy, %", ["method", *thresholds, "best new, %", "frontier area, %"], rows)


def ranking(retention: pl.DataFrame) -> list[str]:
    """The methods of a retention table by what they keep at the lowest threshold; last those that never get there."""
    lowest = retention.filter(pl.col("threshold") == retention["threshold"].min())
    return lowest.sort(["mean", "best_new"], descending=True, nulls_last=True, maintain_order=True)["method"].to_list()


def law_table(sweep: Sweep) -> Table:
    """How well each drift measure explains forgetting."""
    rows = [
        [
            predictor_label(law.predictor),
            *fit_cells(law.quadratic),
            fit_cells(law.saturating)[0],
            number(law.spearman),
            " / ".join(_error(fit.left_out if fit else None) for fit in (law.quadratic, law.saturating)),
            _error(law.baseline),
            f"{law.checkpoints:,}",
        ]
        for law in sweep.laws
    ]
    headers = ["predictor", "quadratic R²\n[95 %]", "R² per seed", "monotone R²\n[95 %]", "Spearman"]
    headers += ["left-out error", "baseline", "points"]
    return Table("What explains forgetting?", headers, rows)


def range_table(sweep: Sweep) -> Table:
    """How the fits depend on how far the sweep went."""
    rows = []
    for within in sweep.ranges:
        pairs = [(fits.quadratic, fits.saturating) for fits in within.laws]
        cells = [" / ".join(number(fit.r2 if fit else None) for fit in pair) for pair in pairs]
        name = "all" if within.limit is None else f"≤ {within.limit:g}"
        rows.append([name, f"{within.checkpoints:,}", *cells])
    measured = [predictor_label(fit.predictor) for fit in sweep.laws]
    unit = kl_unit_of(sweep.config)
    return Table("R² by range, quadratic / monotone", [f"forward KL, {unit}", "points", *measured], rows)


def formula_table(sweep: Sweep) -> Table:
    """The fitted laws, as formulas."""
    rows = [
        [predictor_label(summary.predictor), name, _formula(fit.law)]
        for summary in sweep.laws
        for name, fit in (("quadratic", summary.quadratic), ("monotone", summary.saturating))
        if fit
    ]
    return Table("The laws", ["x", "law", "forgetting, a fraction of 1"], rows, words=True)


def sensitivity_table(sweep: Sweep) -> Table:
    """How the law and the order of the methods react to settings."""
    rows = []
    for variant in sweep.sensitivity:
        order = " > ".join(f"{sweep.label(method)} {percent(prior)}" for method, prior in variant.kept.items())
        never = ", ".join(sweep.label(method) for method in variant.never)
        rows.append(
            [
                f"{variant.setting} = {variant.value}" + (" (as run)" if variant.configured else ""),
                percent(variant.base_new),
                percent(variant.base_prior),
                number(variant.quadratic_r2),
                number(variant.saturating_r2),
                order + (f"; never: {never}" if never else ""),
            ]
        )
    headers = ["setting", "base new, %", "base prior, %", "quadratic R²", "monotone R²"]
    headers.append(f"kept at {sweep.thresholds[0]:.0%}")
    return Table("Sensitivity", headers, rows)


def distillation_table(sweep: Sweep) -> Table:
    """Each teacher beside the best of its students."""
    rows = []
    for pair in sweep.distillation:
        student = [NEVER] * 3 if pair.student is None else _score_cells(pair.student)
        gap = NEVER if pair.student is None else f"{100 * (pair.student.prior - pair.teacher.prior):+.1f}"
        names = f"{sweep.label(pair.teacher_method)} → {sweep.label(pair.student_method)}"
        rows.append([names, str(pair.seed), *_score_cells(pair.teacher), *student, gap])
    scores = ["new, %", "prior, %", f"KL, {kl_unit_of(sweep.config)}"]
    headers = ["teacher → student", "seed", *(f"teacher {score}" for score in scores)]
    headers += [*(f"student {score}" for score in scores), "prior difference"]
    return Table("Teachers and students", headers, rows)


def settings_table(sweep: Sweep) -> Table:
    """How the sweep was run."""
    return run_table(sweep.config, sweep.table, sweep.points)


def run_table(description: Mapping[str, Any], table: pl.DataFrame, points: pl.DataFrame) -> Table:
    """How a sweep or a study was run: `description` is its JSON, `points` the distinct checkpoints of `table`."""
    runs = table.filter(pl.col("method") != BASE)["run_id"].n_unique()
    counts = f"{runs:,} in {points['trajectory'].n_unique():,} trajectories, {len(points):,} distinct checkpoints"
    rows = [
        ["command", description["command"]],
        ["preset", description["preset"]],
        ["runs", counts],
        *([name, _setting(value)] for name, value in description["config"].items()),
        ["data fingerprint", description["data"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in description["versions"].items())],
        ["machine", description["machine"]],
        ["training time", f"{description['core_seconds'] / 60:.0f} min, summed over the processes"],
        ["diverged, measured up to there", "; ".join(description["diverged"]) or "none"],
    ]
    return Table("How it was run", ["setting", "value"], [[name, str(value)] for name, value in rows], words=True)


def sweep_summary(sweep: Sweep) -> JSON:
    """The numbers of the sweep, for JSON; accuracies and forgetting as fractions of 1."""
    gap = sweep.imitation_gap
    return {
        "experiment": sweep.config.get("experiment"),
        "preset": sweep.config["preset"],
        "seeds": sweep.seeds,
        "runs": sweep.table.filter(pl.col("method") != BASE)["run_id"].n_unique(),
        "checkpoints": len(sweep.points),
        "base": {"new": asdict(sweep.base_new), "prior": asdict(sweep.base_prior)},
        "laws": [asdict(law) for law in sweep.laws],
        "ranges": [
            {"limit": within.limit, "checkpoints": within.checkpoints, "r2": _r2_by_law(within)}
            for within in sweep.ranges
        ],
        "retention": sweep.retention.to_dicts(),
        "frontier_area": {method: asdict(area) for method, area in sweep.areas.items()},
        "sensitivity": [asdict(variant) for variant in sweep.sensitivity],
        "distillation": [asdict(pair) for pair in sweep.distillation],
        "distillation_gap": asdict(gap) if gap else None,
    }


def _r2_by_law(within: Range) -> JSON:
    return {
        fits.predictor: {
            "quadratic": fits.quadratic.r2 if fits.quadratic else None,
            "saturating": fits.saturating.r2 if fits.saturating else None,
        }
        for fits in within.laws
    }


def predictor_label(name: str) -> str:
    """A drift measure's name for people."""
    stem = name.removesuffix("_per_token")
    return LABELS.get(stem, stem.replace("_", " ")) + (" per token" if stem != name else "")


def _kept(cell: Mapping[str, Any]) -> str:
    """The cell of a method and threshold in the retention table."""
    return with_seeds(Estimate.of_interval(cell["mean"], cell["high"], cell["n_seeds"]), cell["seeds_total"])


def fit_cells(fit: LawSummary | None, digits: int = 3) -> tuple[str, str]:
    """R2 with its interval, and R2 over seeds to so many digits."""
    if fit is None:
        return NEVER, NEVER
    interval = "" if fit.r2_interval is None else " [{}, {}]".format(*map(number, fit.r2_interval))
    seeds = NEVER if fit.r2_seed_mean is None else f"{fit.r2_seed_mean:.{digits}f} ± {fit.r2_seed_sd:.{digits}f}"
    return number(fit.r2) + interval, seeds


def _error(left_out: LeftOut | None) -> str:
    return percent(left_out.mean if left_out else None)


def _formula(fitted: Quadratic | Saturating) -> str:
    if isinstance(fitted, Saturating):
        return f"{fitted.a:.3g} · (1 − exp(−{fitted.b:.3g} · x^{fitted.c:.3g}))"
    terms = ((fitted.slope, "x"), (fitted.curvature, "x²"))
    tail = "".join(f" {'+' if factor >= 0 else '−'} {abs(factor):.3g} · {power}" for factor, power in terms)
    return f"{fitted.intercept:.3g}".replace("-", "−") + tail


def _score_cells(score: Score) -> list[str]:
    return [percent(score.new), percent(score.prior), f"{score.kl_forward:.3f}"]


def _setting(value: Any) -> str:
    if isinstance(value, dict):  # an arm of a study
        return ", ".join(f"{name} {_setting(of)}" for name, of in value.items())
    if isinstance(value, list):
        return ("; " if value and isinstance(value[0], dict) else ", ").join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_rich(table: Table) -> RichTable:
    """The table as the terminal shows it."""
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column, header in enumerate(table.headers):
        # A narrow terminal folds cells rather than cutting them off.
        shown.add_column(header, justify="right" if column and not table.words else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown
