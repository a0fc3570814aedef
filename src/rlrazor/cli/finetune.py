"""`razor finetune`: one run, measured as it goes, and the fine-tuned model. The one command that torchrun may start."""

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlrazor.cli.early import needs_no_prior
from rlrazor.cli.language import (
    ASKED,
    DRY_RUN,
    LACKS_PRIOR,
    PAPER_DEFAULTS,
    SETTINGS,
    TINY_DEFAULTS,
    add_running,
    add_settings,
    add_source,
    check_early,
    experiment_of,
    load,
    settings_given,
    show_plan,
    task_of,
)
from rlrazor.cli.outputs import check_folder
from rlrazor.cli.printing import (
    Subparsers,
    console_for_tables,
    print_json,
    records_table,
)
from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import SETTINGS_OF
from rlrazor.extras import needs_extra
from rlrazor.system import cores, durations, processes
from rlrazor.system.terminal import Terminal
from rlrazor.system.writing import require_our_folder

if TYPE_CHECKING:
    from rlrazor.experiments.language.config import Config
    from rlrazor.runs.records import RunSpec
    from rlrazor.runs.runner import Runner

# What a single run has of a sweep's settings.
_OWN = (
    *("checkpoints_per_epoch", "max_steps", "warmup_steps", "lora_rank", "max_new_tokens", "dtype", "precision"),
    *("train_prompts", "test_prompts", "kl_samples", "scored", "prior", "prior_limit", "probes", "threads"),
    *ASKED,
    *("rl_prompts", "group_size", "kl_coef", "pretrain_steps"),
)
_DEFAULTS = {"warmup_steps": "0.05", "precision": "auto"}


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a language model on a new task, measuring what it forgets",
        description="Fine-tune by one method, measure new and prior scores and KL to the base at each checkpoint, and "
        "write the model into OUT/models. The same command again resumes an interrupted run (--save-every). Under "
        "torchrun the processes share each step, and the first of them measures.",
    )
    parser.add_argument("base", metavar="BASE", help=SETTINGS["base"])
    parser.add_argument("--task", help=SETTINGS["task"] + " (default: the name of the --prompts file)")
    parser.add_argument(
        "--method", default="dr-grpo", help="the method (default: dr-grpo); docs/guides/finetune.md lists them"
    )
    parser.add_argument("--lr", required=True, help="learning rate")
    parser.add_argument("--seed", default="0", help="default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/finetune"), help="default: runs/finetune")
    offline = parser.add_argument_group(f"used by {next(iter(SETTINGS_OF))}")
    offline.add_argument("--schedule", default="constant", help="constant (the default) or cosine")
    offline.add_argument("--epochs", default="1", help="passes over the prompts (default: 1)")
    offline.add_argument("--batch-size", default="32", help="sequences per step (default: 32)")
    own = {**_DEFAULTS, "threads": "the cores"}
    add_settings(parser, "settings", _OWN, {**PAPER_DEFAULTS, **own}, {**TINY_DEFAULTS, **_DEFAULTS}, LACKS_PRIOR)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    parser.add_argument("--json", action="store_true", help="print the records as JSON instead of a table")
    add_source(parser)
    add_running(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train the one run, and print its checkpoints."""
    needs_extra("guard", "train", *(() if needs_no_prior(arguments.prior) else ("eval",)))
    if not arguments.dry_run:
        check_folder(arguments, arguments.out)
    processes.join()
    from rlrazor.experiments.language.config import settled

    config = _config_of(arguments)
    check_early(arguments, config)
    from rlrazor.runs.experiment import Phase
    from rlrazor.runs.runner import Options, Runner

    config = settled(config)
    experiment = experiment_of(arguments, config, keep_models=True)
    console = Terminal(stderr=True, quiet=processes.rank() > 0)
    if arguments.dry_run:
        show_plan(arguments, experiment, config, arguments.out)
        return 0
    load(experiment, console)
    if config.taught:
        raise RazorError(f"{config.taught[0]} imitates a policy that a sweep has trained: use `razor sweep`.")
    specs = config.specs(experiment.fingerprint, experiment.data[0], config.methods)
    if len(specs) != 1:
        raise RazorError("razor finetune makes one run: give one value to each option, or use `razor sweep`.")
    runner = Runner(experiment, Options(arguments.out), console)
    if not runner.store.is_finished(specs[0]):
        require_our_folder(arguments.out / "models" / specs[0].run_id)
    with runner.store.open_for_writing():
        runner.finish([Phase("base policy", [specs[0].root]), Phase(arguments.method, specs)])
        runner.store.discard_unfinished()
    if processes.rank() == 0:
        _show(arguments, runner, specs[0])
    return 0


def _config_of(arguments: argparse.Namespace) -> "Config":
    """A grid of one run."""
    from rlrazor.experiments.language.config import TINY, resolve

    given = {**_DEFAULTS, **settings_given(arguments, _OWN)}
    if arguments.base != TINY:  # one run, which has the machine to itself
        given.setdefault("threads", str(cores.threads_alone()))
    given |= {"lrs": arguments.lr, "rl_lrs": arguments.lr, "schedules": arguments.schedule, "epochs": arguments.epochs}
    given |= {"methods": arguments.method, "seeds": arguments.seed, "base": arguments.base}
    given |= {"task": task_of(arguments), "iterations": "1", "batch_sizes": arguments.batch_size}
    return resolve("tiny" if arguments.base == TINY else "paper", given)


def _show(arguments: argparse.Namespace, runner: "Runner", spec: "RunSpec") -> None:
    """The base's record and the run's, and where the model is."""
    finished = runner.store.read(spec)
    base = runner.store.read(spec.root).records[0]
    model = arguments.out / "models" / spec.run_id
    if finished.diverged_at is not None:
        runner.console.print(
            f"Diverged at step {finished.diverged_at}, measured up to there; no model written.", style="yellow"
        )
    elif runner.trained:
        runner.console.print(f"Trained in {durations.took(runner.store.seconds(spec))}.", highlight=False)
    if arguments.json:
        records = [asdict(record) for record in finished.records]
        command = shlex.join(["razor", *arguments.argv])
        print_json({"command": command, "model": str(model), "base": asdict(base), "records": records})
        return
    printed = console_for_tables()
    printed.print(records_table(base, finished.records))
    if model.exists():
        printed.print(f"Model: {model}", highlight=False, soft_wrap=True)
