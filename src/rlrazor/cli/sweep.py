"""`razor sweep`: fine-tune a language model by several methods over a grid, and report what each forgot."""

import argparse
from pathlib import Path

from rlrazor.cli.language import PAPER_DEFAULTS, add_sweep, run_sweep
from rlrazor.cli.printing import Subparsers


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "sweep",
        help="fine-tune a language model by several methods over a grid",
        description="Fine-tune, measure scores on the new and the prior tasks and KL to the base, fit the law, write "
        "the report. The grid starts from the paper's. Run the same command again to continue after an interruption.",
    )
    add_sweep(parser, "runs/sweep", PAPER_DEFAULTS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep that the options describe."""
    return run_sweep(arguments, "paper", lambda preset: Path("runs/sweep"))
