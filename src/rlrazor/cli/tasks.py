"""`razor tasks`: the new tasks that a language model can be fine-tuned on."""

import argparse
from dataclasses import asdict

from rich.table import Table

from rlrazor.cli.printing import Subparsers, console_for_tables, print_json


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "tasks",
        help="the new tasks for language models: prompts, verifier, demonstrations",
        description="List the new tasks: their prompts, what verifies a completion, where demonstrations come from.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the registry."""
    from rlrazor.experiments.language.tasks import TASKS

    if arguments.json:
        print_json(
            [
                {"name": task.name, "title": task.title, "summary": task.summary}
                | {**asdict(task.form), "annotators": list(task.annotators)}
                for task in TASKS.values()
            ]
        )
        return 0
    table = Table("Task", "Data", "Prompts; right when; demonstrations", "Tokens")
    for task in TASKS.values():
        table.add_row(task.name, task.title, task.summary, str(task.form.max_new_tokens))
    console = console_for_tables()
    console.print(table)
    console.print("Your own: a file of prompts and a Python function verify(prompt, completion, **columns).")
    return 0
