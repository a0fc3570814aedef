"""Tables of studies whose effects are known."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.report import keyed
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.runs.records import RunSpec
from rlrazor.studies import load
from rlrazor.studies.engine import ArmStudy, Compared

BASE_NEW, BASE_PRIOR = 0.91, 0.78
NEWS = (0.94, 0.95, 0.954, 0.96, 0.963, 0.97, 0.973)  # of a run's checkpoints
T_THREE_SEEDS = 4.302653  # of the t-distribution with two degrees of freedom, from a printed table
LABELS = {"grpo": "GRPO", "reinforce": "1-0 REINFORCE", "sft-1": "SFT-1", "sft-2": "SFT-2", "simpo": "SimPO"}
LABELS |= {"grpo+kl": "GRPO + KL", "sft-2+kl": "SFT-2 + KL"}

MEASURED: Mapping[str, Mapping[str, float]] = {  # by studies of other columns than scores and KL
    "precision": {"weight_sparsity": 0.3, "weight_rank": 0.9},
    "dynamics": dict.fromkeys(
        ("cos_prior_gradient", "cos_new_gradient", "kl_change", "kl_of_step", "update_norm"), 0.1
    ),
}


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


def planted(
    name: str,
    prior: Callable[[RunSpec], float],
    seeds: int = 3,
    news: Callable[[RunSpec], Sequence[float]] = lambda spec: NEWS,
    drift: Callable[[RunSpec], float] = lambda spec: 1.0,
    columns: Mapping[str, float] | None = None,
) -> Study:
    """The table that the runs of a study's paper preset would leave: spec -> prior accuracy and KL at 95 % new."""
    specs = [spec for grid in load(name).grids(False) for spec in grid.specs(range(seeds), "data")]
    rows: list[dict[str, Any]] = []
    for spec in dict.fromkeys(specs):
        params = {key: value for key, value in spec.settings.items() if not isinstance(value, dict | list)}
        lr = params.pop("lr")
        of_run = run(spec.method, spec.seed, lr=lr, prior=prior(spec), kl=drift(spec), news=news(spec), params=params)
        rows += [{**row, **MEASURED.get(name, {}), **(columns or {})} for row in of_run]
    return study_of(name, rows)


def numbers_of(study: Study) -> dict[str, str]:
    """The cells of the study's tables by their names."""
    definition = load(study.name)
    assert isinstance(definition, ArmStudy)
    return keyed.numbers_of(definition.tables_of(Compared.make(study, definition.arms, definition.at)))


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
