"""Where studies meet the runner: which runs a study asks for, and what is written of them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import polars as pl
from rich.console import Console

from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.config import TEACHER
from rlrazor.experiments.parity_mnist.experiment import ParityMnist
from rlrazor.experiments.parity_mnist.methods import label_of
from rlrazor.runs.experiment import Phase
from rlrazor.runs.records import RunSpec, to_table
from rlrazor.runs.runner import Done, Options, Runner
from rlrazor.runs.store import RunStore
from rlrazor.runs.tables import read_table
from rlrazor.runs.teachers import students
from rlrazor.studies import THEORY, WITH_RL, load
from rlrazor.studies.grids import Grid, plain_config
from rlrazor.system.progress import doing


def grids_of(name: str, preset: str) -> list[Grid]:
    """The grids of a study. A preset other than `paper` gets the quick ones."""
    return load(name).grids(preset != "paper")


def phases(name: str, preset: str, seeds: Sequence[int], images: str, store: RunStore | None) -> Iterator[Phase]:
    """The runs of a study: bases, its grids, and the students of the best of them. Without a store, to count them."""
    grids, table = grids_of(name, preset), f"studies/{name}"
    untaught = [spec for grid in grids if grid.taught_at is None for spec in grid.specs(seeds, images)]
    specs = list(dict.fromkeys(untaught))
    yield Phase(f"{name}: bases", list(dict.fromkeys(spec.root for spec in specs)), table=table)
    yield Phase(name, specs, table=table)
    levels = sorted({grid.taught_at for grid in grids if grid.taught_at is not None})
    if levels:
        yield students(
            specs,
            store,
            TEACHER,
            levels,
            lambda level, teachers: [
                spec for grid in grids if grid.taught_at == level for spec in grid.specs(seeds, images, teachers)
            ],
            table,
        )


def run_study(name: str, experiment: ParityMnist, seeds: Sequence[int], options: Options, console: Console) -> Done:
    """Train what a study misses; write its table and its description."""
    runner, preset = Runner(experiment, options, console), options.preset
    with runner.store.open_for_writing():
        images = data.fingerprint(experiment.data_dir)
        specs = runner.finish(phases(name, preset, seeds, images, runner.store))
        tuned = [spec for spec in specs if spec.chain]
        shared = plain_config(seeds)
        settings = {key: value for key, value in asdict(shared).items() if key not in ("methods", "lrs")}
        teachings = [teaching for phase in runner.phases for teaching in phase.teachings]
        description = {
            **runner.describe(shared, specs),
            "name": name,
            "seeds": list(seeds),
            "labels": {spec.method: label_of(spec.method) for spec in tuned},
            "config": {**settings, "arms": [grid.describe() for grid in grids_of(name, preset)]},
            **({"teachers": teachings} if teachings else {}),
        }
        # Without the description, the table does not count: killed here, nothing is mixed up.
        runner.store.remove(f"studies/{name}.json")
        runner.store.write_table(f"studies/{name}", study_table(tuned, runner.store))
        runner.store.write_json(f"studies/{name}", description)
    return runner.done()


def study_table(specs: Sequence[RunSpec], store: RunStore) -> pl.DataFrame:
    """The records of these runs and of their bases, base by base."""
    by_base: dict[RunSpec, list[RunSpec]] = {}
    for spec in dict.fromkeys(specs):
        by_base.setdefault(spec.root, []).append(spec)
    tables = [to_table((spec, store.read(spec).records) for spec in [base, *tuned]) for base, tuned in by_base.items()]
    return pl.concat(tables, how="diagonal_relaxed")


def run_theory(seeds: Sequence[int], options: Options, console: Console) -> None:
    """Compute the theory, and connect it to what the sweep and the studies in the folder have measured."""
    from rlrazor.studies import theory

    folder, preset = options.out, options.preset or "quick"
    measured = [folder / "records.parquet", *(folder / "studies" / f"{name}.parquet" for name in WITH_RL)]
    tables = [read_table(path) for path in measured if path.exists()]
    store = RunStore(folder)
    with store.open_for_writing(), doing(console, "Computing the theory"):
        sweep = pl.concat(tables, how="diagonal_relaxed") if tables else None
        found = theory.theory_study(preset, seeds, sweep=sweep)
        store.write_json(f"studies/{THEORY}", theory.describe(found, preset, seeds, options.command))
