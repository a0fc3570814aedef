"""`razor finetune`: one run, measured as it goes, and the fine-tuned model. The one command that torchrun may start."""

import argparse
import shlex
from pathlib import Path

from rlrazor import cores, processes
from rlrazor.cli.language import SETTINGS, add_running, add_source, check_early, settings_given, trainer_of
from rlrazor.cli.outputs import check_folder
from rlrazor.cli.printing import Subparsers, console_for_tables, human_seconds, options_of, print_json, records_table
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.terminal import Terminal
from rlrazor.writing import require_our_folder

# What a single run has of a sweep's settings.
_OWN = (
    *(
        "warmup_steps",
        "max_steps",
        "kl_coef",
        "lora_rank",
        "precision",
        "max_new_tokens",
        "train_prompts",
        "test_prompts",
        "kl_samples",
    ),
    *(
        "scored",
        "prior",
        "prior_limit",
        "checkpoints_per_epoch",
        "group_size",
        "rl_prompts",
        "pretrain_steps",
        "threads",
    ),
)


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
    parser.add_argument("--task", required=True, help=SETTINGS["task"])
    parser.add_argument("--method", default="dr-grpo", help="the method (default: dr-grpo); see the README")
    parser.add_argument("--lr", required=True, help="learning rate")
    parser.add_argument("--schedule", default="constant", help="constant (the default) or cosine")
    parser.add_argument("--epochs", default="1", help="passes over the prompts (default: 1)")
    parser.add_argument("--batch-size", help="sequences per step of SFT and SimPO (default: 32)")
    parser.add_argument("--seed", default="0", help="default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/finetune"), help="default: runs/finetune")
    for name in _OWN:
        parser.add_argument(f"--{name.replace('_', '-')}", help=SETTINGS[name])
    parser.add_argument("--json", action="store_true", help="print the records as JSON instead of a table")
    add_source(parser)
    add_running(parser)
    parser.set_defaults(run=run, options=options_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Train the one run, and print its checkpoints."""
    needs_extra("guard", "train", "eval")
    check_folder(arguments, arguments.out)
    processes.join()
    from dataclasses import asdict, replace

    from rlrazor.experiments.language.config import TINY, parse_setting, resolve

    own = settings_given(arguments, _OWN)
    if arguments.base != TINY:  # one run, which has the machine to itself
        own.setdefault("threads", str(cores.threads_alone()))
    given = {"lrs": arguments.lr, "rl_lrs": arguments.lr, "schedules": arguments.schedule, "epochs": arguments.epochs}
    given |= {"methods": arguments.method, "seeds": arguments.seed, "base": arguments.base, "task": arguments.task}
    given |= {"iterations": "1", "batch_sizes": arguments.batch_size or "32", **own}
    config = resolve("tiny" if arguments.base == TINY else "paper", {k: parse_setting(k, v) for k, v in given.items()})
    check_early(arguments, config)
    from rlrazor.experiments.language.reproduce import plan
    from rlrazor.experiments.work import Work

    trainer = replace(trainer_of(arguments, config), keep_models=True, progress=True)
    console = Terminal(stderr=True, quiet=processes.rank() > 0)
    with console.status("Loading the base and the task"):
        found = plan(config, trainer.task)
    if found.students:
        raise RazorError(f"{found.students[0]} imitates a policy that a sweep has trained: use `razor sweep`.")
    if len(found.specs) != 1:
        raise RazorError("razor finetune makes one run: give one value to each option, or use `razor sweep`.")
    work = Work(arguments.out, trainer, found.count_checkpoints, console)
    model = arguments.out / "models" / found.specs[0].run_id
    if not work.store.is_finished(found.specs[0]):
        require_our_folder(model)
    with work.store.open_for_writing():
        work.finish(found.bases, "base policy", weights="final" if config.base == TINY else "none")
        work.finish(found.specs, arguments.method)
    if processes.rank() > 0:
        return 0
    spec = found.specs[0]
    finished = work.store.read(spec)
    base = work.store.read(found.bases[0]).records[0]
    if finished.diverged_at is not None:
        console.print(
            f"Diverged at step {finished.diverged_at}, measured up to there; no model written.", style="yellow"
        )
    elif work.trained:
        console.print(f"Trained in {human_seconds(work.store.seconds(spec))}.", highlight=False)
    if arguments.json:
        records = [asdict(record) for record in finished.records]
        command = shlex.join(["razor", *arguments.argv])
        print_json({"command": command, "model": str(model), "base": asdict(base), "records": records})
        return 0
    printed = console_for_tables()
    printed.print(records_table(base, finished.records))
    if model.exists():
        printed.print(f"Model: {model}", highlight=False, soft_wrap=True)
    return 0
