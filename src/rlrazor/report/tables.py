"""Tables as they are shown, and the cells that several of them have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from rich import box
from rich.table import Table as RichTable

from rlrazor.analysis import law
from rlrazor.analysis.law import LawSummary, PredictorSummary
from rlrazor.report.text import NEVER, number
from rlrazor.runs.records import BASE

THRESHOLDS = (0.95, 0.96, 0.97)  # unless the folder's config names others

# Unless the config says otherwise; the first is what the paper calls RL, the second SFT.
FAMILIES: Mapping[str, Sequence[str]] = {
    "RL": ("grpo", "dr-grpo", "reinforce", "grpo+kl", "dr-grpo+kl", "kl-dpg"),
    "SFT": ("sft", "sft-1", "sft-2", "sft-one", "sft-two", "sft-uniform", "simpo"),
}
MATCH = 0.002  # a student within 0.2 points of its teacher's new accuracy, 20 of 10,000 test items, has matched it


# Nats of forward KL. Forgetting ends when nothing is left to forget, forward KL never does (a label that the policy
# gives up costs more the more surely it is given up), so how well a law fits depends on how far the sweep went.
RANGES = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Table:
    """A table to show: cells are text, the first column names the row. `words`: the cells are not numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Range:
    """The laws fitted to the checkpoints within `limit` nats of forward KL; None: to all."""

    limit: float | None
    checkpoints: int
    laws: Sequence[PredictorSummary]


def fit_cells(fit: LawSummary | None, digits: int = 3) -> tuple[str, str]:
    """R2 with its interval, and R2 over seeds to so many digits."""
    if fit is None:
        return NEVER, NEVER
    interval = "" if fit.r2_interval is None else " [{}, {}]".format(*map(number, fit.r2_interval))
    seeds = NEVER if fit.r2_seed_mean is None else f"{fit.r2_seed_mean:.{digits}f} ± {fit.r2_seed_sd:.{digits}f}"
    return number(fit.r2) + interval, seeds


def ranges_of(points: pl.DataFrame, predictors: Sequence[str]) -> list[Range]:
    """The ranges that hold some, but not all, of the checkpoints."""
    ranges = []
    for limit in RANGES:
        near = points.filter(pl.col("kl_forward") <= limit)
        if law.MIN_POINTS <= len(near) < len(points):
            ranges.append(Range(limit, len(near), law.summarise(near, predictors, samples=0)))
    return ranges


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
