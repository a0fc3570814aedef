"""Where studies meet the runner: which runs a study asks for, and the table that they leave."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from rlrazor.experiments.parity_mnist.train import EXPERIMENT, base_spec
from rlrazor.runs.records import RunSpec, to_table
from rlrazor.runs.runner import with_teachers
from rlrazor.runs.store import RunStore
from rlrazor.studies import load
from rlrazor.studies.grids import Grid


def grids_of(name: str, preset: str) -> list[Grid]:
    """The grids of a study. A preset other than `paper` gets the quick ones."""
    return load(name).grids(preset != "paper")


def base_of(spec: RunSpec) -> RunSpec:
    """The base run that a fine-tuning run starts from."""
    return base_spec(spec.params, spec.seed)


def students_of(
    grids: Sequence[Grid], level: float, teachers: Mapping[int, Any], seeds: Sequence[int], data: str
) -> list[RunSpec]:
    """The runs of the grids that are taught at this level, by these teachers (seed -> teacher)."""
    return [spec for grid in grids if grid.taught_at == level for spec in grid.specs(seeds, data, teachers)]


def study_table(specs: Sequence[RunSpec], store: RunStore) -> pl.DataFrame:
    """The records of these runs and of their bases, base by base: forgetting is counted from a run's own base.

    `teacher` names whom a run imitates, as `runner.with_teachers` does.
    """
    by_base: dict[RunSpec, list[RunSpec]] = {}
    for spec in dict.fromkeys(specs):
        by_base.setdefault(base_of(spec), []).append(spec)
    tables = [to_table((spec, store.read(spec).records) for spec in [base, *tuned]) for base, tuned in by_base.items()]
    return with_teachers(pl.concat(tables, how="diagonal_relaxed"), specs, EXPERIMENT)
