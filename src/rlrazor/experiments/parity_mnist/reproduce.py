"""The analyses of ParityMNIST: their runs, on the runner, and what is written of them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import polars as pl
from rich.console import Console

from rlrazor import theory
from rlrazor.experiments.parity_mnist import data, studies
from rlrazor.experiments.parity_mnist.config import TEACHER
from rlrazor.experiments.parity_mnist.experiment import ParityMnist
from rlrazor.experiments.parity_mnist.methods import label_of
from rlrazor.runs.experiment import Phase
from rlrazor.runs.runner import Done, Options, Runner, warn_of_another_machine
from rlrazor.runs.store import RunStore, read_table
from rlrazor.runs.teachers import students
from rlrazor.system.progress import doing


def phases(name: str, preset: str, seeds: Sequence[int], images: str, store: RunStore | None) -> Iterator[Phase]:
    """The runs of a study: bases, its arms, and the students of the best of them. Without a store, to count them."""
    arms, table = studies.arms_of(name, preset), f"studies/{name}"
    untaught = [spec for arm in arms if arm.taught_at is None for spec in arm.specs(seeds, images)]
    specs = list(dict.fromkeys(untaught))
    yield Phase(f"{name}: bases", list(dict.fromkeys(spec.root for spec in specs)), table=table)
    yield Phase(name, specs, table=table)
    levels = sorted({arm.taught_at for arm in arms if arm.taught_at is not None})
    if levels:
        yield students(
            specs,
            store,
            TEACHER,
            levels,
            lambda level, teachers: studies.students_of(arms, level, teachers, seeds, images),
            table,
        )


def run_study(name: str, experiment: ParityMnist, seeds: Sequence[int], options: Options, console: Console) -> Done:
    """Train what a study misses; write its table and its description."""
    runner, preset = Runner(experiment, options, console), options.preset
    with runner.store.open_for_writing():
        warn_of_another_machine(runner.store, console)
        images = data.fingerprint(experiment.data_dir)
        specs = runner.finish(phases(name, preset, seeds, images, runner.store))
        tuned = [spec for spec in specs if spec.chain]
        shared = studies.plain_config(seeds)
        settings = {key: value for key, value in asdict(shared).items() if key not in ("methods", "lrs")}
        teachings = [teaching for phase in runner.phases for teaching in phase.teachings]
        description = {
            **runner.describe(shared, specs),
            "name": name,
            "seeds": list(seeds),
            "labels": {spec.method: label_of(spec.method) for spec in tuned},
            "config": {**settings, "arms": studies.describe_arms(studies.arms_of(name, preset))},
            **({"teachers": teachings} if teachings else {}),
        }
        # Without the description, the table does not count: killed here, nothing is mixed up.
        runner.store.remove(f"studies/{name}.json")
        runner.store.write_table(f"studies/{name}", studies.study_table(tuned, runner.store))
        runner.store.write_json(f"studies/{name}", description)
    return runner.done()


def run_theory(seeds: Sequence[int], options: Options, console: Console) -> None:
    """Compute the theory, and connect it to what the sweep and the studies in the folder have measured."""
    folder, preset = options.out, options.preset or "quick"
    measured = [folder / "records.parquet", *(folder / "studies" / f"{name}.parquet" for name in studies.WITH_RL)]
    tables = [read_table(path) for path in measured if path.exists()]
    store = RunStore(folder)
    with store.open_for_writing(), doing(console, "Computing the theory"):
        sweep = pl.concat(tables, how="diagonal_relaxed") if tables else None
        found = theory.theory_study(preset, seeds, sweep=sweep)
        store.write_json(f"studies/{studies.THEORY}", theory.describe(found, preset, seeds, options.command))
