"""Is the forecast true? Sweeps of three new tasks on the same bases, on ParityMNIST and on the tiny language model.

Within a task, a law can be asked about a method that it was not fitted to; across tasks, about a task. Either way the
base and its prior score are the same, as a law's have to be. What the runs show is worked out by
`report.sections.forecasts`, which reads their table.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.experiments.language import config as language
from rlrazor.experiments.language import train as language_training
from rlrazor.experiments.language.methods import label_of as language_label_of
from rlrazor.experiments.language.reproduce import estimate as language_estimate
from rlrazor.experiments.language.reproduce import plan
from rlrazor.experiments.language.train import TaskSource
from rlrazor.experiments.parity_mnist import config as parity
from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist import reproduce as parity_reproduce
from rlrazor.experiments.parity_mnist import train as parity_training
from rlrazor.experiments.parity_mnist.evaluate import ON_PRIOR
from rlrazor.experiments.parity_mnist.methods import PARITY, RULES
from rlrazor.experiments.parity_mnist.methods import label_of as parity_label_of
from rlrazor.report import load, write_report
from rlrazor.runs.records import BASE, RunSpec, to_table
from rlrazor.runs.runner import MACHINE, Reproduction, Work, versions_of, warn_of_another_machine
from rlrazor.runs.sweep import Train
from rlrazor.studies import kinds
from rlrazor.system.progress import doing

STUDY = "forecasts"
DIGITS, LETTERS = "parity-mnist", "tiny"  # the two families of tasks
TASKS: Mapping[str, Sequence[str]] = {
    DIGITS: tuple(RULES),
    LETTERS: ("letters", "letters-descending", "letters-appearance"),
}
# All that need no teacher. `kl-dpg` and `+kl` stand for methods that stay near the base, `sft-1` for those that do not.
DIGIT_METHODS = ("sft-1", "sft-2", "oracle", "simpo", "reinforce", "grpo", "dr-grpo", "kl-dpg", "grpo+kl")
LETTER_METHODS = ("sft-one", "sft-uniform", "oracle", "simpo", "reinforce", "grpo", "dr-grpo+kl", "kl-dpg")
QUICK_LETTER_METHODS = ("sft-one", "oracle", "reinforce", "grpo")


@dataclass(frozen=True)
class Grid:
    """What a preset runs, of each family and task: every method at every learning rate, in every seed."""

    digits: parity.Config
    letters: language.Config

    def of_seeds(self, seeds: Sequence[int]) -> "Grid":
        """The same with these seeds."""
        return Grid(replace(self.digits, seeds=tuple(seeds)), replace(self.letters, seeds=tuple(seeds)))


_DIGITS = replace(parity.PRESETS["paper"], methods=DIGIT_METHODS, schedules=("constant",), epochs=(1,))
PRESETS: Mapping[str, Grid] = {
    "quick": Grid(
        replace(_DIGITS, lrs=parity.PRESETS["quick"].lrs[1::2]),
        replace(language.PRESETS["tiny"], methods=QUICK_LETTER_METHODS, lrs=(1e-4, 4e-4), rl_lrs=(1e-4, 4e-4)),
    ),
    "full": Grid(
        replace(_DIGITS, lrs=parity.PAPER_LRS[1::2], seeds=(0, 1)),
        replace(language.PRESETS["tiny"], methods=LETTER_METHODS, seeds=(0, 1)),
    ),
}


@dataclass(frozen=True)
class Options:
    """How to run. `families`: which of `TASKS`."""

    out: Path
    families: tuple[str, ...] = tuple(TASKS)
    jobs: int = 1
    data_dir: Path | None = None
    preset: str = "quick"
    command: str = ""


@dataclass(frozen=True)
class Family:
    """The runs of one family: (task, bases, fine-tuning runs) for each task, what trains them, how they are counted."""

    name: str
    tasks: Sequence[tuple[str, Sequence[RunSpec], Sequence[RunSpec]]]
    trainers: Mapping[str, Train]
    prompts: int = 0

    def count_checkpoints(self, spec: RunSpec) -> int:
        """Records that a run will have."""
        if spec.method == BASE:
            return 1
        if self.name == DIGITS:
            return int(spec.params["checkpoints_per_epoch"])
        return len(language.due_steps(spec, self.prompts))


def grid_of(preset: str, seeds: Sequence[int] | None) -> Grid:
    """The preset's grid, with these seeds if there are any; raises RazorError for an unknown preset."""
    if preset not in PRESETS:
        raise RazorError(f"Unknown preset {preset!r}. Presets: {', '.join(PRESETS)}.")
    return PRESETS[preset] if seeds is None else PRESETS[preset].of_seeds(seeds)


def digits_family(grid: Grid, data_dir: Path | None, fingerprint: str) -> Family:
    """The runs on ParityMNIST; `fingerprint` is the images'."""
    config = grid.digits
    tasks = []
    for rule in TASKS[DIGITS]:
        variant = {} if rule == PARITY else {"rule": rule}
        specs = config.specs(fingerprint, config.methods, variant=variant)
        tasks.append((rule, config.base_specs(fingerprint, variant), specs))
    trainer = parity_training.Trainer(data_dir)
    return Family(DIGITS, tasks, dict.fromkeys(TASKS[DIGITS], trainer))


def letters_family(grid: Grid) -> Family:
    """The runs of the tiny language model."""
    tasks, trainers, prompts = [], {}, 0
    for name in TASKS[LETTERS]:
        config = replace(grid.letters, task=name)
        found = plan(config, TaskSource(name))
        tasks.append((name, found.bases, found.specs))
        trainers[name] = language_training.Trainer(language.TINY, TaskSource(name))
        prompts = found.prompts
    return Family(LETTERS, tasks, trainers, prompts)


def reproduce(grid: Grid, options: Options, console: Console) -> Reproduction:
    """Train what is missing in `options.out`, write the study's table and the report.

    Raises RazorError when the data cannot be had, the folder cannot be written, or a worker dies; finished runs stay.
    """
    start = time.perf_counter()
    families = []
    if DIGITS in options.families:
        for name in data.DATASETS:
            data.fetch(name, options.data_dir, console=console)
        families.append(digits_family(grid, options.data_dir, data.fingerprint(options.data_dir)))
    if LETTERS in options.families:
        families.append(letters_family(grid))
    tables, accounts, works = [], {}, []
    for family in families:
        first = next(iter(family.trainers.values()))
        work = Work(options.out, first, family.count_checkpoints, console, jobs=options.jobs)
        works.append(work)
        with work.store.open_for_writing():
            warn_of_another_machine(work.store, console)
            runs: list[RunSpec] = []
            for task, bases, specs in family.tasks:
                trainer = family.trainers[task]
                work.finish(bases, f"{task}: bases", weights="final", trainer=_with_weights(trainer))
                work.finish(specs, task, trainer=trainer)
                tables.append(_task_table(family.name, task, bases, specs, work))
                runs += [*bases, *specs]
            accounts[family.name] = work.account_for(runs)
    store = works[0].store
    with store.open_for_writing():
        store.remove(f"studies/{STUDY}.json")  # without it, the table does not count: killed here, nothing is mixed up
        store.write_table(f"studies/{STUDY}", pl.concat(tables, how="diagonal_relaxed"))
        store.write_json(f"studies/{STUDY}", _describe(grid, options, families, accounts))
        with doing(console, "Testing forecasts and drawing the report"):
            results = load(options.out, kinds())
            report = write_report(results)
    return Reproduction(
        results,
        report,
        sum(len(work.trained) for work in works),
        sum(work.kept for work in works),
        [name for work in works for name in work.diverged],
        time.perf_counter() - start,
    )


def _with_weights(trainer: Train) -> Train:
    """A language trainer hands out weights only when told to; a base's have to be kept."""
    return trainer.with_weights("final") if isinstance(trainer, language_training.Trainer) else trainer


def _task_table(family: str, task: str, bases: Sequence[RunSpec], specs: Sequence[RunSpec], work: Work) -> pl.DataFrame:
    """The task's runs, base by base; the KL that stands for the generic probe under one name in both families."""
    by_base = {base.seed: [base, *(spec for spec in specs if spec.seed == base.seed)] for base in bases}
    table = pl.concat(
        [to_table((spec, work.store.read(spec).records) for spec in runs) for runs in by_base.values()],
        how="diagonal_relaxed",
    )
    if family == DIGITS:
        table = table.with_columns(pl.col(FORWARD + ON_PRIOR).alias(PROBE))
    return table.with_columns(family=pl.lit(family), task=pl.lit(task))


def _describe(
    grid: Grid, options: Options, families: Sequence[Family], accounts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is stored beside the table."""
    names = [family.name for family in families]
    configs = {DIGITS: asdict(grid.digits), LETTERS: asdict(grid.letters)}
    labels = {name: parity_label_of(name) for name in grid.digits.methods if DIGITS in names}
    labels |= {name: language_label_of(name) for name in grid.letters.methods if LETTERS in names}
    return {
        "name": STUDY,
        "preset": options.preset,
        "command": options.command,
        "seeds": list(grid.digits.seeds),
        "labels": labels,
        "config": {name: configs[name] for name in names},
        "data": {task: bases[0].params["data"] for family in families for task, bases, _ in family.tasks},
        "versions": versions_of("transformers", "trl", "peft"),
        "machine": MACHINE,
        "core_seconds": sum(account["core_seconds"] for account in accounts.values()),
        "diverged": [name for account in accounts.values() for name in account["diverged"]],
    }


@dataclass(frozen=True)
class Estimate:
    """What the command would take; runs in the folder are not looked for. See the families' own estimates."""

    runs: int
    checkpoints: int
    seconds: float
    error: float
    memory_bytes: int
    disk_bytes: int
    timed: str


def estimate(grid: Grid, options: Options, console: Console) -> Estimate:
    """Count the runs and their checkpoints, and time a little of one task of each family."""
    families = []
    own: list[Any] = []
    if DIGITS in options.families:
        families.append(digits_family(grid, options.data_dir, ""))
        own.append(parity_reproduce.estimate(grid.digits, parity_reproduce.Options(options.out, options.jobs)))
    if LETTERS in options.families:
        families.append(letters_family(grid))
        trainer = language_training.Trainer(language.TINY, TaskSource(TASKS[LETTERS][0]), save_every=0)
        own.append(language_estimate(grid.letters, trainer, console, jobs=options.jobs))
    runs = [(family, spec) for family in families for _, bases, specs in family.tasks for spec in (*bases, *specs)]
    tasks = [len(TASKS[name]) for name in TASKS if name in options.families]
    return Estimate(
        len(runs),
        sum(family.count_checkpoints(spec) for family, spec in runs),
        sum(count * (one.seconds or 0.0) for count, one in zip(tasks, own, strict=True)),
        max(one.error or 0.0 for one in own),
        max(one.memory_bytes or 0 for one in own),
        sum(count * (one.disk_bytes or 0) for count, one in zip(tasks, own, strict=True)),
        "; ".join(one.timed for one in own),
    )
