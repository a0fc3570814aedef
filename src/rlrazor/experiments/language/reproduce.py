"""A sweep over one language model: base policies, fine-tuning, the table, the report. Running it again continues it."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.experiments.language import config as configs
from rlrazor.experiments.language import cost
from rlrazor.experiments.language.config import EXPERIMENT, RECIPE, TINY, Config
from rlrazor.experiments.language.evaluate import DRIFT, LM_EVAL_INPUTS, TINY_INPUTS
from rlrazor.experiments.language.methods import FROM_TEACHER, TEACHER, find_method, label_of
from rlrazor.experiments.language.train import TaskSource, Trainer
from rlrazor.report import load, write_report
from rlrazor.runs.records import BASE, RunSpec, to_table
from rlrazor.runs.runner import (
    MACHINE,
    Reproduction,
    Work,
    choose_teachers,
    spec_of,
    teaching,
    versions_of,
    warn_of_another_machine,
)
from rlrazor.runs.store import WeightsMode
from rlrazor.runs.sweep import trajectories
from rlrazor.studies import kinds
from rlrazor.system.progress import doing

RUN_BYTES, RECORD_BYTES = 4 * 4096, 8000  # small files' share of the disk; a record, in its run and in the table
# One for each quadrant of the paper's Fig. 4, where a sweep has them: on-policy or not, with negatives or not.
QUADRANTS = ("grpo", "dr-grpo", "reinforce", "sft", "sft-one", "simpo")


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the result of a run."""

    out: Path
    jobs: int = 1
    weights: WeightsMode = "none"
    preset: str = ""
    command: str = ""


@dataclass(frozen=True)
class Plan:
    """The runs of a config: bases, fine-tuning runs but for students', and the number of prompts trained on."""

    bases: Sequence[RunSpec]
    specs: Sequence[RunSpec]
    students: Sequence[str]
    base: str
    data: str
    prompts: int

    def count_checkpoints(self, spec: RunSpec) -> int:
        """Records that a run will have."""
        return 1 if spec.method == BASE else len(configs.due_steps(spec, self.prompts))

    def count_steps(self, spec: RunSpec) -> int:
        """Updates that a run will take."""
        return 0 if spec.method == BASE else configs.count_steps(spec, self.prompts)


def plan(config: Config, source: TaskSource) -> Plan:
    """Resolve what the runs depend on; raises RazorError for a task or a base that cannot be loaded."""
    splits = source.load()
    data, base = source.fingerprint(splits), base_fingerprint(config.base)
    students = [name for name in config.methods if find_method(name)[0].demonstrations == FROM_TEACHER]
    specs = config.specs(base, data, [name for name in config.methods if name not in students])
    prompts = min(len(splits.train), config.train_prompts or len(splits.train))
    return Plan(config.base_specs(base, data), specs, students, base, data, prompts)


def base_fingerprint(source: str) -> str:
    """What stands for the base in a run's id: a hash of its content; `tiny` is decided by the recipe and the seed."""
    if source == TINY:
        return f"{TINY} {RECIPE}"
    from rlrazor.lm.models import load as load_model

    return load_model(source).fingerprint[:16]


def reproduce(config: Config, trainer: Trainer, options: Options, console: Console) -> Reproduction:
    """Train what is missing in `options.out`, write its tables and its report.

    Raises RazorError when the base or the task cannot be loaded, the folder cannot be written, or a worker dies;
    finished runs stay.
    """
    start = time.perf_counter()
    with doing(console, "Loading the base and the task"):
        found = plan(config, trainer.task)
    trainer = trainer.with_weights(options.weights)
    work = Work(options.out, trainer, found.count_checkpoints, console, jobs=options.jobs, weights=options.weights)
    with work.store.open_for_writing():
        warn_of_another_machine(work.store, console)
        # What is pre-trained here has to be kept; what was loaded is where it came from.
        work.finish(found.bases, "base policies", weights="final" if config.base == TINY else "none")
        specs = list(found.specs)
        work.finish(specs, "sweep")
        teachings: list[dict[str, Any]] = []
        if found.students:
            teachers = choose_teachers(specs, work.store, TEACHER, max(config.thresholds))
            taught_by = [spec_of(teacher, EXPERIMENT) for teacher in teachers.values()]
            work.finish(taught_by, "teachers' weights", weights="all", trainer=trainer.with_weights("all"))
            students = config.specs(found.base, found.data, found.students, teachers)
            work.finish(students, "students")
            specs = sorted(specs + students, key=lambda spec: (spec.seed, config.methods.index(spec.method)))
            teachings = [
                teaching(teacher, EXPERIMENT, name) for teacher in teachers.values() for name in found.students
            ]
        work.discard_unfinished()
        store = work.store
        store.remove("teachers.json")  # an earlier command's, which may not fit this one
        runs = [*found.bases, *specs]
        store.write_table("records", to_table((spec, store.read(spec).records) for spec in runs))
        if teachings:
            store.write_json("teachers", teachings)
        description = describe(config, trainer, options, found)
        store.write_json("config", {**description, **work.account_for(runs)})
        with doing(console, "Fitting the laws and drawing the report"):
            results = load(options.out, kinds())
            report = write_report(results)
    return Reproduction(results, report, len(work.trained), work.kept, work.diverged, time.perf_counter() - start)


def describe(config: Config, trainer: Trainer, options: Options, found: Plan) -> dict[str, Any]:
    """What is stored beside the results: the resolved config, the command, the versions, names for the report."""
    task = trainer.task.task()
    return {
        "experiment": EXPERIMENT,
        "title": f"{task.title}{'' if task.title == task.name else f' ({task.name})'}, {name_of(config.base)}",
        "task": task.name,
        "new_task": task.name,
        "prior_task": "prior tasks",
        "preset": options.preset,
        "command": options.command,
        "config": asdict(config),
        "labels": {name: label_of(name) for name in config.methods},
        **({"quadrants": four} if len(four := quadrants(config.methods)) == 4 else {}),
        "thresholds": list(config.thresholds),
        "scored": config.scored,
        "kl_unit": "nats per completion",
        "base": found.base,
        "data": found.data,
        "versions": versions_of("transformers", "trl", "peft", "lm-eval"),
        "machine": MACHINE,
        "drift": list(DRIFT),
        **(TINY_INPUTS if config.base == TINY else LM_EVAL_INPUTS),
    }


def name_of(base: str) -> str:
    """A base as a title names it: a hub's id, a file or a folder by its name, without the hashes of caches and runs."""
    if base == TINY or not Path(base).exists():
        return base
    for part in reversed(Path(base).resolve().parts):
        if (found := re.fullmatch(r"models--(.+)", part)) is not None:
            return found[1].replace("--", "/")
        if part not in ("snapshots", "models") and not re.fullmatch(r"(.*-)?[0-9a-f]{12,}", part):
            return part.removesuffix(".gguf")
    return base


def quadrants(methods: Sequence[str]) -> Mapping[str, tuple[bool, bool]]:
    """Method -> (on-policy, with negative examples), one method for each of the four, as far as there are any."""
    chosen: dict[tuple[bool, bool], str] = {}
    for name in QUADRANTS:
        method = find_method(name)[0]
        if name in methods:
            chosen.setdefault((method.on_policy, method.negatives), name)
    return {name: quadrant for quadrant, name in chosen.items()}


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take; runs in the folder are not looked for.

    `seconds`: of all of it on this machine, give or take `error`, a share. `memory_bytes`: of each process.
    `disk_bytes`: what stays. `passing_bytes`: what is there while it trains, for an interrupted run to go on from.
    None where nothing could be timed, and then `missing` says why; `timed` says what was.
    """

    runs: int
    steps: int
    checkpoints: int
    seconds: float | None = None
    error: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    passing_bytes: int | None = None
    timed: str = ""
    missing: str = ""


def estimate(
    config: Config,
    trainer: Trainer,
    console: Console,
    *,
    jobs: int = 1,
    weights: WeightsMode = "none",
    keep_models: bool = False,
) -> Estimate:
    """Count the runs, their updates and checkpoints, and time a few, where the base is at hand: see `cost`.

    Students count as runs of the offline grid.
    """
    splits = trainer.task.load()
    prompts = min(len(splits.train), config.train_prompts or len(splits.train))
    teachers: dict[int, Any] = {seed: {} for seed in config.seeds}
    specs = [*config.base_specs("", ""), *config.specs("", "", config.methods, teachers)]
    counted = Plan([], specs, [], "", "", prompts)
    longest = [one.longest for one in trajectories(specs)]  # the others are their beginnings, and cost nothing
    runs = [(spec, counted.count_steps(spec), counted.count_checkpoints(spec)) for spec in longest]
    counts = Estimate(len(specs), sum(steps for _, steps, _ in runs), sum(map(counted.count_checkpoints, specs)))
    if not cost.is_at_hand(config.base):
        return replace(counts, missing=f"the base {config.base} is not on this machine, and was not downloaded")
    try:
        with doing(console, "Timing a few updates and one measurement"):
            found = cost.time_trial(config, trainer, splits)
    except RazorError as error:
        return replace(counts, missing=f"a trial on little of it failed. {error}")
    bases = len(config.seeds) if config.base == TINY else 0
    models = bases + {"none": 0, "final": counts.runs - len(config.seeds), "all": counts.checkpoints}[weights]
    return replace(
        counts,
        seconds=cost.seconds_of(found, runs, len(config.seeds), jobs, config.threads),
        error=found.spread,
        memory_bytes=found.bytes,
        disk_bytes=counts.runs * RUN_BYTES + counts.checkpoints * RECORD_BYTES + 4 * found.parameters * models
        + (4 * found.trained if keep_models else 0),
        passing_bytes=0 if trainer.save_every == 0 else 2 * 4 * cost.STATE * found.trained * jobs,
        timed=found.timed,
    )  # fmt: skip
