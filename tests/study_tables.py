"""Tables of studies whose effects are known."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.report.sections import Section, Study
from rlrazor.report.tables import Table

BASE_NEW, BASE_PRIOR = 0.91, 0.78
NEWS = (0.94, 0.95, 0.954, 0.96, 0.963, 0.97, 0.973)  # of a run's checkpoints
T_THREE_SEEDS = 4.302653  # of the t-distribution with two degrees of freedom, from a printed table
LABELS = {"grpo": "GRPO", "reinforce": "1-0 REINFORCE", "sft-1": "SFT-1", "sft-2": "SFT-2", "simpo": "SimPO"}
LABELS |= {"grpo+kl": "GRPO + KL", "sft-2+kl": "SFT-2 + KL"}


def run(
    method: str,
    seed: int,
    *,
    lr: float = 1e-4,
    news: Sequence[float] = NEWS,
    prior: float = 0.6,
    kl: float = 1.0,
    params: Mapping[str, Any] | None = None,
    **columns: float,
) -> list[dict[str, Any]]:
    """A run's checkpoints. Prior accuracy falls by a tenth of what new accuracy gains beyond 95 %; KL grows by half."""
    name = f"{method} {lr} {params} {seed}"
    rows = []
    for index, new in enumerate(news):
        kept, drifted = prior - 0.1 * (new - 0.95), kl + 0.5 * (new - 0.95)
        rows.append(
            {
                "run_id": name,
                "trajectory": name,
                "method": method,
                "lr": lr,
                "schedule": "constant",
                "epochs": 1,
                **(params or {}),
                "seed": seed,
                "step": index + 1,
                "epoch": (index + 1) / len(news),
                "new": new,
                "prior": kept,
                "forgetting": BASE_PRIOR - kept,
                "kl_forward": drifted,
                **columns,
            }
        )
    return rows


def study_of(name: str, rows: Sequence[Mapping[str, Any]], base_new: float = BASE_NEW) -> Study:
    """The study with a base for each seed."""
    tuned = pl.DataFrame(rows, infer_schema_length=None)
    zero = {"forgetting": 0.0, "kl_forward": 0.0, "step": 0, "epoch": 0.0}
    bases = [
        {"run_id": f"base {seed}", "trajectory": f"base {seed}", "method": "base", "seed": seed, **zero}
        | {"new": base_new, "prior": BASE_PRIOR}
        for seed in sorted(set(tuned["seed"]))
    ]
    table = pl.concat([pl.DataFrame(bases), tuned], how="diagonal_relaxed")
    description = {"labels": LABELS, "seeds": sorted(set(tuned["seed"]))}
    return Study(name, description, table, law.distinct(table), table.filter(pl.col("method") == "base"))


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean of three seeds and half its 95 % t-interval."""
    assert len(values) == 3
    return float(np.mean(values)), T_THREE_SEEDS * float(np.std(values, ddof=1)) / 3**0.5


def plus_minus(values: Sequence[float], form: Callable[[float], str] = lambda value: f"{100 * value:.1f}") -> str:
    """The same as a section writes it, in per cent unless `form` says otherwise."""
    return " ± ".join(form(value) for value in mean_and_half(values))


def cells(table: Table) -> dict[str, list[str]]:
    """A table's rows by their names."""
    return {row[0]: list(row[1:]) for row in table.rows}


def check(section: Section, name: str) -> None:
    """What every section has to be: a sentence, tables whose rows fit their headers, a figure with something to see."""
    assert section.name == name
    assert section.finding.endswith(".")
    assert "nan" not in section.finding.lower()
    assert "None" not in section.finding
    for table in section.tables:
        assert all(len(row) == len(table.headers) for row in table.rows)
        assert not any("nan" in cell for row in table.rows for cell in row)
    assert any(layer.x.size for panel in section.figure.panels for layer in panel.layers)
