"""The whole experiment: data, base policies, the sweep, its table, the report. Running it again continues it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console

from rlrazor import objectives, studies
from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.config import Config, sensitivity_variants
from rlrazor.experiments.parity_mnist.evaluate import DRIFT
from rlrazor.experiments.parity_mnist.methods import TEACHER, find_method, label_of
from rlrazor.experiments.parity_mnist.policy import NEW_TASK, PIXELS, DigitPolicy, as_inputs, log_probs
from rlrazor.experiments.parity_mnist.train import EXPERIMENT, Trainer, generator, prepare_process, sample
from rlrazor.report import load, write_report
from rlrazor.report.tables import read_table
from rlrazor.runs import sweep
from rlrazor.runs.records import BASE, RunSpec, to_table
from rlrazor.runs.runner import (
    MACHINE,
    Reproduction,
    Work,
    choose_teachers,
    peak_memory,
    spec_of,
    teaching,
    versions_of,
    warn_of_another_machine,
    with_teachers,
)
from rlrazor.runs.store import RunStore, WeightsMode
from rlrazor.studies import run as of_studies
from rlrazor.studies import theory
from rlrazor.studies.grids import TAUGHT_AT, plain_config, unknown_teachers
from rlrazor.system import cores
from rlrazor.system.progress import doing

TRAIN_IMAGES, TEST_IMAGES = 60_000, 20_000
WEIGHTS_BYTES = 4 * sum(weight.numel() for weight in DigitPolicy().parameters())
BLOCK_BYTES, RECORD_BYTES = 4096, 2000  # a small file's share of the disk; a line of records.jsonl, twice, and its row
IMAGES_BYTES = 2 * (TRAIN_IMAGES + TEST_IMAGES // 2) * PIXELS + 4 * TEST_IMAGES * (
    PIXELS + 1
)  # data, and an evaluation
LEAST_ERROR = 0.2  # of the seconds, as a share: a machine's speed differs by as much from one minute to the next
MEASURES_COST = 1.5  # an evaluation with every measure of drift against scores alone (benchmarks/parity_mnist.py)


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the result of a run. `preset` picks the arms of studies."""

    out: Path
    jobs: int = 1
    data_dir: Path | None = None
    weights: WeightsMode = "none"
    sensitivity: bool = False
    preset: str = ""
    command: str = ""
    keep_sweep: bool = False  # analyses of a sweep take the one that is in the folder, if there is one


def reproduce(config: Config, options: Options, console: Console, analyses: Sequence[str] = ()) -> Reproduction:
    """Train what is missing in `options.out`, write its tables and its report.

    Without `analyses` that is the sweep of `config`; with some, what they need (`studies.ANALYSES`), the sweep only if
    one of them reads it. Of `config`, a study takes the seeds. What earlier commands left in the folder stays in the
    report. Raises RazorError when the data cannot be had, the folder cannot be written, or a worker dies; finished runs
    stay.
    """
    start = time.perf_counter()
    trainer = Trainer(options.data_dir)
    work = Work(options.out, trainer, _count_checkpoints, console, jobs=options.jobs, weights=options.weights)
    fingerprint = ""
    if analyses != (studies.THEORY,):  # which needs no image
        for name in data.DATASETS:
            data.fetch(name, options.data_dir, console=console)
        fingerprint = data.fingerprint(options.data_dir)
    with work.store.open_for_writing():
        warn_of_another_machine(work.store, console)
        if studies.needs_sweep(analyses) and not _has_sweep_to_keep(options):
            _run_sweep(config, options, fingerprint, work)
        for name in analyses:
            if name in studies.STUDIES:
                _run_study(name, config.seeds, options, fingerprint, work)
        if studies.THEORY in analyses:
            _run_theory(config.seeds, options, work)
        with doing(console, "Fitting the laws and drawing the report"):
            results = load(options.out, studies.kinds())
            report = write_report(results)

    seconds = time.perf_counter() - start
    return Reproduction(results, report, len(work.trained), work.kept, work.diverged, seconds)


def _has_sweep_to_keep(options: Options) -> bool:
    return options.keep_sweep and all((options.out / name).exists() for name in ("config.json", "records.parquet"))


def _run_sweep(config: Config, options: Options, fingerprint: str, work: Work) -> None:
    store = work.store
    bases = config.base_specs(fingerprint)
    work.finish(bases, "base policies", weights="final")

    taught = [name for name in config.methods if find_method(name)[0].from_teacher]
    specs = config.specs(fingerprint, [name for name in config.methods if name not in taught])
    teachings: list[dict[str, Any]] = []
    work.finish(specs, "sweep")
    if taught:
        students, teachings = _finish_students(
            TAUGHT_AT, specs, lambda _, teachers: config.specs(fingerprint, taught, teachers), work
        )
        specs = sorted(specs + students, key=lambda spec: (spec.seed, config.methods.index(spec.method)))
    variants = sensitivity_variants(config) if options.sensitivity else []
    work.finish([spec for _, _, variant in variants for spec in variant.base_specs(fingerprint)], "bases", "final")
    work.finish([s for _, _, variant in variants for s in variant.specs(fingerprint, variant.methods)], "sensitivity")

    # The findings, written together at the end: until then the folder describes the command before.
    store.remove("sensitivity.parquet", "teachers.json")  # an earlier command's, which may not fit this one
    table = to_table((spec, store.read(spec).records) for spec in bases + specs)
    store.write_table("records", with_teachers(table, specs, EXPERIMENT))
    if teachings:
        store.write_json("teachers", teachings)
    if variants:
        store.write_table("sensitivity", _sensitivity_table(variants, fingerprint, store))
    store.write_json("config", {**describe(config, options, fingerprint), **work.account_for(bases + specs)})


def _run_study(name: str, seeds: Sequence[int], options: Options, fingerprint: str, work: Work) -> None:
    arms = of_studies.grids_of(name, options.preset)
    untaught = [arm for arm in arms if arm.taught_at is None]
    specs = list(dict.fromkeys(spec for arm in untaught for spec in arm.specs(seeds, fingerprint)))
    bases = list(dict.fromkeys(map(of_studies.base_of, specs)))
    work.finish(bases, f"{name}: bases", weights="final")
    work.finish(specs, name)
    students, teachings = _finish_students(
        sorted({arm.taught_at for arm in arms if arm.taught_at is not None}),
        specs,
        lambda level, teachers: of_studies.students_of(arms, level, teachers, seeds, fingerprint),
        work,
    )
    specs += students
    shared = plain_config(seeds)
    settings = {name: value for name, value in asdict(shared).items() if name not in ("methods", "lrs")}
    description = {
        **describe(shared, options, fingerprint),
        "name": name,
        "seeds": list(seeds),
        "labels": {spec.method: label_of(spec.method) for spec in specs},
        "config": {**settings, "arms": [arm.describe() for arm in arms]},
        **({"teachers": teachings} if teachings else {}),
        **work.account_for(bases + specs),
    }
    work.store.remove(f"studies/{name}.json")  # without it, the table does not count: killed here, nothing is mixed up
    work.store.write_table(f"studies/{name}", of_studies.study_table(specs, work.store))
    work.store.write_json(f"studies/{name}", description)


def _finish_students(
    levels: Sequence[float],
    specs: Sequence[RunSpec],
    students_of: Callable[[float, Mapping[int, Any]], list[RunSpec]],
    work: Work,
) -> tuple[list[RunSpec], list[dict[str, Any]]]:
    """Choose teachers among `specs`, one per level and seed, and finish the runs of `students_of(level, teachers)`.

    Returns those runs, and for each level, seed and method of the students who its teacher is. A student judged at
    another accuracy than its teacher's says nothing of imitation, so that each level has teachers of its own.
    """
    teachers = {level: choose_teachers(specs, work.store, TEACHER, level) for level in levels}
    taught_by = [spec_of(teacher, EXPERIMENT) for of_level in teachers.values() for teacher in of_level.values()]
    work.finish(list(dict.fromkeys(taught_by)), "teachers' weights", weights="all")
    by_level = {level: students_of(level, teachers[level]) for level in levels}
    students = list(dict.fromkeys(spec for own in by_level.values() for spec in own))  # two levels may have one teacher
    work.finish(students, "students")
    teachings = [
        {"level": level, **teaching(teacher, EXPERIMENT, name)}
        for level in levels
        for teacher in teachers[level].values()
        for name in dict.fromkeys(spec.method for spec in by_level[level])
    ]
    return students, teachings


def _run_theory(seeds: Sequence[int], options: Options, work: Work) -> None:
    """Compute the theory, and connect it to what the sweep and the studies in the folder have measured."""
    folder = work.store.folder
    measured = [folder / "records.parquet", *(folder / "studies" / f"{name}.parquet" for name in studies.WITH_RL)]
    tables = [read_table(path) for path in measured if path.exists()]
    with doing(work.console, "Computing the theory"):
        found = theory.theory_study(
            options.preset or "quick", seeds, sweep=pl.concat(tables, how="diagonal_relaxed") if tables else None
        )
    description = theory.describe(found, options.preset or "quick", seeds, options.command)
    work.store.write_json(f"studies/{studies.THEORY}", description)


def describe(config: Config, options: Options, fingerprint: str) -> dict[str, Any]:
    """What is stored beside the results: the resolved config, the command, the versions, names for the report."""
    return {
        "experiment": EXPERIMENT,
        "title": "ParityMNIST",
        "new_task": "ParityMNIST",
        "prior_task": "FashionMNIST",
        "preset": options.preset,
        "command": options.command,
        "config": asdict(config),
        "labels": {name: label_of(name) for name in config.methods},
        "data": fingerprint,
        "versions": versions_of(),
        "machine": MACHINE,
        "drift": list(DRIFT),
    }


def _sensitivity_table(variants: Sequence[tuple[str, int, Config]], fingerprint: str, store: RunStore) -> pl.DataFrame:
    tables = []
    for setting, value, variant in variants:
        specs = variant.base_specs(fingerprint) + variant.specs(fingerprint, variant.methods)
        table = to_table((spec, store.read(spec).records) for spec in specs)
        tables.append(table.with_columns(setting=pl.lit(setting), value=pl.lit(value)))
    return pl.concat(tables, how="vertical_relaxed")


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take. Seconds are wall time on this machine's cores as busy as they are now, give or take
    `error`, a share; `memory_bytes` are of each process, `disk_bytes` those of all that is kept.
    """

    runs: int
    trained: int
    checkpoints: int
    seconds: float
    error: float
    memory_bytes: int
    disk_bytes: int
    timed: str


def estimate(config: Config, options: Options, analyses: Sequence[str] = (), repeats: int = 20) -> Estimate:
    """Count the runs and time their two costs, a training step and an evaluation, on random images (under 3 s).

    Runs that are prefixes of others are counted but not trained; runs already in the folder are not looked for.
    Students are counted as if each level had a teacher of its own; two may have the same.
    """
    specs: list[RunSpec] = []
    if studies.needs_sweep(analyses):
        grids = [config, *(variant for _, _, variant in sensitivity_variants(config) if options.sensitivity)]
        for grid, level in product(grids, TAUGHT_AT):
            specs += grid.base_specs("") + grid.specs("", grid.methods, unknown_teachers(level, grid.seeds))
    for name in set(analyses) & set(studies.STUDIES):
        own = [spec for arm in of_studies.grids_of(name, options.preset) for spec in arm.specs(config.seeds, "")]
        specs += [*map(of_studies.base_of, own), *own]
    specs = list(dict.fromkeys(specs))
    work = sweep.trajectories(specs)
    timings = [_time_step(config, repeats) for _ in range(3)]
    step_seconds, evaluation_seconds = statistics.median(timings), _time_evaluation()
    steps = sum(_count_steps(t.longest) for t in work if t.longest.method != BASE)
    checkpoints = sum(_count_checkpoints(trajectory.longest) for trajectory in work)
    # A traced step looks at a twentieth of the images, and takes two gradients on them besides.
    traced = sum(_count_steps(t.longest) for t in work if t.longest.params.get("traced"))
    evaluations = checkpoints - traced + 0.3 * traced
    bases = sum(spec.method == BASE for spec in specs)
    kept = {"none": 0, "final": len(specs), "all": checkpoints}[options.weights] + bases
    seconds = (steps * step_seconds + evaluations * evaluation_seconds) / min(options.jobs, cores.available())
    return Estimate(
        runs=len(specs),
        trained=len(work),
        checkpoints=checkpoints,
        seconds=seconds,
        error=max(LEAST_ERROR, (max(timings) - min(timings)) / 2 / step_seconds),
        memory_bytes=peak_memory() + IMAGES_BYTES,
        disk_bytes=len(specs) * 4 * BLOCK_BYTES + checkpoints * RECORD_BYTES + kept * WEIGHTS_BYTES,
        timed=f"{3 * repeats} updates of {config.batch_size} images, and {TEST_IMAGES // 10:,} images evaluated",
    )


def _time_step(config: Config, repeats: int) -> float:
    """Seconds of one training step of GRPO, the dearest of the usual methods."""
    prepare_process()
    policy, rng = DigitPolicy(), generator(0, "estimate")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    inputs = as_inputs(torch.randint(256, (config.batch_size, 28, 28), generator=rng, dtype=torch.uint8), NEW_TASK)
    start = 0.0
    for repeat in range(repeats + 3):
        if repeat == 3:  # after warming up
            start = time.perf_counter()
        logp_BV = policy(inputs).log_softmax(dim=-1)
        actions_BG = sample(logp_BV.detach().exp(), config.group_size, rng)
        loss = objectives.grpo(logp_BV.gather(1, actions_BG), (actions_BG % 2).float(), actions_BG)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / repeats


def _time_evaluation() -> float:
    """Seconds of an evaluation with all its measures, whose time is nearly that of running 20,000 images."""
    prepare_process()
    policy, inputs = DigitPolicy(), torch.rand(TEST_IMAGES // 10, PIXELS + 1)
    log_probs(policy, inputs)
    start = time.perf_counter()
    log_probs(policy, inputs)
    return (time.perf_counter() - start) * 10 * MEASURES_COST


def _count_steps(spec: RunSpec) -> int:
    return int(-(-TRAIN_IMAGES // spec.params["batch_size"]) * spec.params["epochs"])


def _count_checkpoints(spec: RunSpec) -> int:
    if spec.method == BASE:
        return 1
    if spec.params.get("traced"):
        return _count_steps(spec)
    return int(spec.params["epochs"] * spec.params["checkpoints_per_epoch"])
