"""Is the forecast true? Sweeps of three new tasks on the same bases, on ParityMNIST and on the tiny language model.

Within a task, a law can be asked about a method that it was not fitted to; across tasks, about a task. Either way the
base and its prior score are the same, as a law's have to be. What the runs show is worked out by
`report.sections.forecasts`, which reads their table.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.experiments.language import config as language
from rlrazor.experiments.language.experiment import Language
from rlrazor.experiments.language.methods import label_of as language_label_of
from rlrazor.experiments.language.setup import Running, TaskSource
from rlrazor.experiments.parity_mnist import config as parity
from rlrazor.experiments.parity_mnist import data
from rlrazor.experiments.parity_mnist.evaluate import ON_PRIOR
from rlrazor.experiments.parity_mnist.experiment import ParityMnist
from rlrazor.experiments.parity_mnist.methods import PARITY, RULES
from rlrazor.experiments.parity_mnist.methods import label_of as parity_label_of
from rlrazor.runs import dry_run
from rlrazor.runs.dry_run import DryRun, Timed
from rlrazor.runs.experiment import Phase
from rlrazor.runs.runner import SEVERAL, Done, Options, Runner, table_of, versions_of, warn_of_another_machine
from rlrazor.runs.settings import check_preset
from rlrazor.runs.store import RunStore
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
class FamilyConfigs:
    """What a preset runs, of each family and task: every method at every learning rate, in every seed."""

    digits: parity.Config
    letters: language.Config


_DIGITS = replace(parity.PRESETS["paper"], methods=DIGIT_METHODS, schedules=("constant",), epochs=(1,))
PRESETS: Mapping[str, FamilyConfigs] = {
    "quick": FamilyConfigs(
        replace(_DIGITS, lrs=parity.PRESETS["quick"].lrs[1::2]),
        replace(language.PRESETS["tiny"], methods=QUICK_LETTER_METHODS, lrs=(1e-4, 4e-4), rl_lrs=(1e-4, 4e-4)),
    ),
    "full": FamilyConfigs(
        replace(_DIGITS, lrs=parity.PAPER_LRS[1::2], seeds=(0, 1)),
        replace(language.PRESETS["tiny"], methods=LETTER_METHODS, seeds=(0, 1)),
    ),
}


@dataclass(frozen=True)
class Family:
    """Tasks that share a config, and so bases; each with the experiment that trains it."""

    name: str
    config: Any
    tasks: Mapping[str, Timed]

    def config_of(self, task: str) -> Any:
        """The family's; a language model's names its task."""
        return replace(self.config, task=task) if self.name == LETTERS else self.config

    def phases(self, task: str, store: RunStore | None) -> Iterator[Phase]:
        """A base per seed and the sweep, as the experiment has them or, of digits, by the task's rule.

        They go into one table with the task's name.
        """
        experiment, config = self.tasks[task], self.config_of(task)
        if isinstance(experiment, ParityMnist):
            images = "" if store is None else data.fingerprint(experiment.data_dir)
            variant = {} if task == PARITY else {"rule": task}
            bases, sweep = config.base_specs(images, variant), config.specs(images, config.methods, variant=variant)
            own: Iterable[Phase] = [Phase("base policies", bases), Phase("sweep", sweep)]
        else:
            own = experiment.phases(config, store)
        for phase in own:
            yield replace(phase, title=f"{task}: {phase.title}", columns={"family": self.name, "task": task})


def grid_of(preset: str, seeds: Sequence[int] | None, threads: int | None = None) -> FamilyConfigs:
    """The preset's grid, with these seeds and threads if there are any; raises RazorError for an unknown preset."""
    check_preset(preset, PRESETS)
    own: dict[str, Any] = {} if seeds is None else {"seeds": tuple(seeds)}
    grid = PRESETS[preset]
    of_letters = own if threads is None else {**own, "threads": threads}
    return FamilyConfigs(replace(grid.digits, **own), replace(grid.letters, **of_letters))


def families_of(grid: FamilyConfigs, names: str, data_dir: Path | None) -> list[Family]:
    """The families of these names, comma-separated. Raises RazorError for an unknown one."""
    chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in TASKS]
    if unknown:
        raise RazorError(f"Unknown family {unknown[0]!r:.60}. Families: {', '.join(TASKS)}.")
    digits = Family(DIGITS, grid.digits, {task: ParityMnist(data_dir) for task in TASKS[DIGITS]})
    letters = {task: Language(language.TINY, TaskSource(task)) for task in TASKS[LETTERS]}
    return [family for family in (digits, Family(LETTERS, grid.letters, letters)) if family.name in chosen]


def run(families: Sequence[Family], options: Options, console: Console) -> Done:
    """Train what is missing in `options.out`, write the study's table.

    Raises RazorError when the data cannot be had, the folder cannot be written, or a worker dies; finished runs stay.
    """
    done, tables, accounts = Done(), [], []
    store = RunStore(options.out)
    with store.open_for_writing():
        warn_of_another_machine(store, options, console)
        for family in families:
            for task, experiment in family.tasks.items():
                runner = Runner(experiment, options, console)
                specs = runner.finish(family.phases(task, runner.store))
                table = table_of(runner.phases, runner.store, family.config.methods)
                if family.name == DIGITS:  # the KL that stands for the generic probe has one name in both families
                    table = table.with_columns(pl.col(FORWARD + ON_PRIOR).alias(PROBE))
                tables.append(table)
                accounts.append({"task": task, "data": specs[0].params["data"], **runner.account_for(specs)})
                done += runner.done()
        store.remove(f"studies/{STUDY}.json")  # without it, the table does not count: killed here, nothing is mixed up
        store.write_table(f"studies/{STUDY}", pl.concat(tables, how="diagonal_relaxed"))
        store.write_json(f"studies/{STUDY}", _describe(families, options, accounts))
    return done


def _describe(families: Sequence[Family], options: Options, accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is stored beside the table."""
    label_of = {DIGITS: parity_label_of, LETTERS: language_label_of}
    return {
        "name": STUDY,
        "preset": options.preset,
        "command": options.command,
        "seeds": list(families[0].config.seeds),
        "labels": {name: label_of[family.name](name) for family in families for name in family.config.methods},
        "config": {family.name: asdict(family.config) for family in families},
        "data": {account["task"]: account["data"] for account in accounts},
        "versions": versions_of("transformers", "trl", "peft"),
        "machine": SEVERAL.join(dict.fromkeys(one for of in accounts for one in of["machine"].split(SEVERAL))),
        "core_seconds": sum(account["core_seconds"] for account in accounts),
        "diverged": [name for account in accounts for name in account["diverged"]],
    }


def estimate(families: Sequence[Family], options: Options, console: Console) -> DryRun:
    """Count the runs and their checkpoints, and time a little of one task of each family."""
    found = []
    for family in families:
        task, experiment = next(iter(family.tasks.items()))
        if isinstance(experiment, Language):
            experiment = replace(experiment, running=Running(save_every=0))
        phases = list(family.phases(task, None))
        with doing(console, f"Timing a little of {family.name}"):
            own = dry_run.estimate(experiment, family.config_of(task), phases, jobs=options.jobs)
        found += [own] * len(family.tasks)
    return reduce(operator.add, found)
