"""`razor evaluate`: what a model scores on a new task and on prior tasks, and how far it is from its base."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rlrazor.cli import early, running
from rlrazor.cli.language import (
    ASKED,
    LACKS_PRIOR,
    PAPER_DEFAULTS,
    SETTINGS,
    add_settings,
    add_source,
    check_early,
    source_of,
    task_of,
)
from rlrazor.cli.printing import Subparsers, console_for_tables, print_json, records_table
from rlrazor.extras import needs_extra
from rlrazor.system import cores
from rlrazor.system.progress import doing
from rlrazor.system.terminal import Terminal

_OWN = ("max_new_tokens", "test_prompts", "kl_samples", "scored", "prior", "prior_limit", *ASKED)


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate",
        help="score a language model on a new task and on prior tasks, and measure KL to its base",
        description="Without --base, the scores alone. With it, KL to the base on the task's held-out prompts too.",
    )
    parser.add_argument("model", metavar="MODEL", help="a hub id, a folder, or a .gguf file")
    parser.add_argument("--task", help=SETTINGS["task"] + " (default: the name of the --prompts file)")
    parser.add_argument("--base", help="what MODEL was fine-tuned from (default: none, and no KL)")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="an adapter to put on MODEL; the base is then MODEL"
    )
    add_settings(parser, "how it is measured", _OWN, PAPER_DEFAULTS, PAPER_DEFAULTS, LACKS_PRIOR)
    parser.add_argument("--json", action="store_true", help="print the record as JSON instead of a table")
    add_source(parser, trains=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    needs_extra("guard", *(() if early.needs_no_prior(arguments.prior) else ("eval",)))
    from rlrazor.experiments.language.config import resolve

    given = running.given(arguments, _OWN)
    given |= {"base": arguments.base or arguments.model, "task": task_of(arguments), "threads": cores.threads_alone()}
    config = resolve("paper", given)
    early.require_files(adapter=arguments.adapter)
    check_early(arguments, config, arguments.model)
    from rlrazor.experiments.language.evaluate import compare
    from rlrazor.experiments.language.setup import PriorSource, Setup, probed

    prior = PriorSource(arguments.data_mirror, arguments.allow_code_execution)
    setup = Setup(config.base, probed(source_of(arguments, config.task), config, prior), prior)
    with doing(Terminal(stderr=True), "Measuring"):
        base_source = None if arguments.base is None and arguments.adapter is None else config.base
        base, tuned = compare(setup, config, arguments.model, base_source, arguments.adapter)
    if arguments.json:
        print_json({"base": base and asdict(base), "model": asdict(tuned)})
        return 0
    console_for_tables().print(records_table(base or tuned, [tuned] if base else []))
    return 0
