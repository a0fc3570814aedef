"""`razor continual tasks.yaml`: a user's own tasks, one after another, within a budget of KL."""

import argparse
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from rlrazor.cli import early, exits, language, running
from rlrazor.cli.outputs import check_folder, check_run_folder
from rlrazor.cli.printing import Subparsers, console_for_tables, print_json
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.lm.task_names import WORDS
from rlrazor.runs.records import Record
from rlrazor.system.terminal import Terminal

if TYPE_CHECKING:
    from rlrazor.experiments.language.own_sequence import OwnSequence, Stage
    from rlrazor.experiments.language.sequence_file import SequenceFile
    from rlrazor.experiments.language.sequences import ModelSequences

OVER_THE_FILE = ("base", "method", "lr", "target", "seed")


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "continual",
        help="fine-tune a model on tasks of your own, one after another, within a budget of KL",
        description="Train the tasks of FILE one after another by one method, measure after each what is left of the "
        "earlier ones and of the prior tasks, and write the report and every stage's model. The same command again "
        "goes on from where it was. docs/guides/continual.md has the keys of FILE.",
        epilog="Exit code: 0 all stages are trained, within the budget if there is one; 1 it stopped before a stage "
        "that the budget cannot hold, or the stages cost more than it; 2 an error.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the tasks and settings, in YAML")
    settings = parser.add_argument_group("settings (override the file)")
    settings.add_argument("--base", metavar="MODEL", help=f"{language.SETTINGS['base']} (default: the file's)")
    settings.add_argument("--method", help="the method (default: the file's, or dr-grpo)")
    settings.add_argument("--lr", help="learning rate (default: the file's)")
    settings.add_argument("--target", help="new-task score at which a stage ends (default: the file's, or 1: none)")
    settings.add_argument("--seed", help="the seed (default: the file's, or 0)")
    settings.add_argument(
        "--kl-budget",
        type=float,
        metavar="NATS",
        help="stop before a stage with which all would cost more, each its forward KL from the one before, on its own "
        "prompts (default: the file's, or none)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/continual"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help=language.DRY_RUN)
    parser.add_argument("--json", action="store_true", help="print the stages as JSON instead of a table")
    language.add_prior(parser.add_argument_group("data"))
    language.add_running(parser)
    running.add_cluster(parser)
    parser.set_defaults(run=run, jobs=None)


def run(arguments: argparse.Namespace) -> int:
    """Train the stages that the budget holds, and say what they cost."""
    needs_extra("guard", "train", "eval")
    from rlrazor.experiments.language import sequence_file
    from rlrazor.experiments.language.config import settled

    file = sequence_file.read(arguments.file)
    settings = {**file.settings, **running.given(arguments, OVER_THE_FILE)}
    config = sequence_file.config_of(file.names, settings)
    budget = file.kl_budget if arguments.kl_budget is None else arguments.kl_budget
    asked = _check_early(arguments, file, config)
    if not arguments.dry_run:
        _check_folder(arguments, asked, config.base)
    from rlrazor.experiments.language.own_sequence import OwnSequence
    from rlrazor.experiments.language.setup import probed

    config, (prior, how) = settled(config), language.how_of(arguments)
    first, *further = (probed(language.source_of(one, one.task), config, prior) for one in asked)
    experiment = OwnSequence(config.base, first, prior, how, tuple(further), kl_budget=budget)
    if arguments.dry_run:
        note = language.ENDS_EARLY if config.target < 1 else ""
        language.show_plan(arguments, experiment, config, arguments.out, note=note)
        return exits.DONE
    return _train(arguments, experiment, config)


def _check_early(
    arguments: argparse.Namespace, file: "SequenceFile", config: "ModelSequences"
) -> list[argparse.Namespace]:
    """The tasks as `razor finetune` would have them as options; raises RazorError before torch is imported."""
    from rlrazor.experiments.language.old import check_old
    from rlrazor.experiments.language.tasks import Task, find_task

    folder, asked, tasks = arguments.file.parent, list[Namespace](), list[Task]()
    generic = file.generic if file.generic in (None, *WORDS) else folder / file.generic
    old = None if file.old_examples is None else folder / file.old_examples
    with _told_of(f"{arguments.file}"):
        early.require_files(generic=generic, old_examples=old)
        language.check_generic(generic, config)
        check_old(old, config.methods, config.base, alone=False)
    for task in file.tasks:
        own = task.options(folder) | {"task": task.name, "generic": generic, "old_examples": old}
        one = Namespace(**own, data_mirror=None)
        with _told_of(f"{arguments.file}, {one.task}"):
            language.check_source(one)
            if one.prompts is None:
                built_in = find_task(one.task)
                tasks += [built_in] if one.data is None else []
        asked.append(one)
    language.require_forgetting(config, "continual")
    early.require_files(data_mirror=arguments.data_mirror)
    language.settle(arguments, config, tasks)
    return asked


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Say of what is wrong where it is, and call the options what the keys of the file are called."""
    try:
        yield
    except RazorError as error:
        keys = re.sub(r"(?<!\S)--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
        raise RazorError(f"{where}: {keys}".replace(" no_chat ", " chat ")) from error


def _check_folder(arguments: argparse.Namespace, asked: Sequence[argparse.Namespace], base: str) -> None:
    """Raise RazorError where the folder of the runs may not be written, or is one that is read."""
    check_run_folder(Namespace(base=base, config=arguments.file, data_mirror=arguments.data_mirror), arguments.out)
    for one in asked:
        check_folder(one, arguments.out)


def _train(arguments: argparse.Namespace, experiment: "OwnSequence", config: "ModelSequences") -> int:
    """Train what is missing, write the report, print the stages."""
    from rlrazor.runs import runner
    from rlrazor.runs.store import RunStore

    console, out = Terminal(stderr=True), arguments.out
    language.load(experiment, console)
    with running.writing(out):
        done = runner.run(experiment, config, running.options_of_run(arguments, out, ""), console)
        store = RunStore(out)
        stages = experiment.stages(config, store)
        base = store.read(stages[0].spec.root).records[0]
        page = running.write_and_load(out, console)[1] if stages[0].end else None  # there is nothing to show of a base
    running.say_done(done, console)
    over = experiment.is_over_budget(stages)
    models = {stage.number: str(experiment.model_of(stage, store)) for stage in stages if stage.has_model}
    if arguments.json:
        told: dict[str, Any] = {"command": shlex.join(["razor", *arguments.argv]), "report": page and str(page)}
        told |= {"kl_budget": experiment.kl_budget, "spent": sum(stage.spent for stage in stages), "over_budget": over}
        of_stages = [{**stage.as_json(), "model": models.get(stage.number)} for stage in stages]
        print_json({**told, "base": asdict(base), "stages": of_stages})
    else:
        printed = console_for_tables()
        printed.print(_table(base, stages, config))
        for number, model in models.items():
            printed.print(f"Model after stage {number}: {model}", highlight=False, soft_wrap=True)
        if page is not None:
            printed.print(f"Report: {page}", highlight=False, soft_wrap=True)
    for sentence in _sentences(stages, config, experiment.kl_budget if over else None):
        console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
    if (diverged := stages[-1]).diverged_at is not None:
        raise RazorError(
            f"Stage {diverged.number}, {diverged.task}, diverged at step {diverged.diverged_at}: nothing goes on from "
            "there. Lower the learning rate."
        )
    return exits.ABOVE if over else exits.DONE


def _sentences(stages: "Sequence[Stage]", config: "ModelSequences", exceeded: float | None) -> Iterator[str]:
    """Stages that missed their target; and that, or before which stage, the budget was exceeded."""
    for stage in stages:
        if config.target < 1 and stage.end is not None and stage.end.new < config.target:
            yield (
                f"Stage {stage.number}, {stage.task}, ended at a score of {stage.end.new:.3f}, short of its target of "
                f"{config.target:g}."
            )
    if exceeded is None:
        return
    total, last = sum(stage.spent for stage in stages), stages[-1]
    spent = _nats(total)
    if last.end is not None:
        yield f"The stages have cost {spent} nats, which is more than the budget of {exceeded:g}."
    else:
        beyond = "more than the budget holds, " if total > exceeded else ""
        yield (
            f"Stopped before stage {last.number}, {last.task}: {spent} nats are spent, {beyond}and it is forecast to "
            f"cost {_of_forecast(last)}, at least {_nats(last.forecast.least)}; the budget is {exceeded:g}. With a "
            "larger --kl-budget the same command goes on from here."
        )


def _of_forecast(stage: "Stage") -> str:
    found = stage.forecast
    interval = f" ({_nats(found.low)} to {_nats(found.high)})" if found.high > found.low else ""
    return f"{_nats(found.kl)}{interval}"


def _nats(kl: float) -> str:
    return f"{kl:.3g}" if kl < 1000 else f"{kl:,.0f}"


def _table(base: Record, stages: "Sequence[Stage]", config: "ModelSequences") -> Table:
    """A row for the base and for each stage: every task's score, the prior score, what was forecast and what spent."""
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Scores in %, KL in nats. Forecast: before the stage, with the range that its score's error gives. "
        "Spent: KL of the stages so far, each from the one before.",
        caption_justify="left",
    )
    table.add_column("after")
    for header in (*(f"{task}, %" for task in config.tasks), "prior, %", "forecast KL", "KL", "spent"):
        table.add_column(header, justify="right", overflow="fold")
    spent = 0.0
    for stage in (None, *stages):
        end = base if stage is None else stage.end
        spent += 0.0 if stage is None else stage.spent
        scores = [f"{100 * end.metrics[f'score_{task}']:.1f}" for task in config.tasks] if end else []
        scores = [*scores, f"{100 * end.prior_mean:.1f}"] if end else ["not trained", *[""] * len(config.tasks)]
        costs = ["", "", ""] if stage is None else [_of_forecast(stage)]
        if stage is not None:
            costs += [f"{stage.spent:.3f}", f"{spent:.3f}"] if stage.end else ["", ""]
        table.add_row("base" if stage is None else f"{stage.number}, {stage.task}", *scores, *costs)
    return table
