"""`razor watch`: the checkpoints of a training run measured as they are saved, from another process."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlrazor.cli import exits
from rlrazor.cli.early import require_files, require_prior, require_source, settle_hub
from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import Subparsers
from rlrazor.cli.probe import add_prior_tasks, add_probe, read_probe, suite_of
from rlrazor.cli.served import HELP, add_served, asking_of, local_sources
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.lm.task_names import PRIOR
from rlrazor.system import quiet
from rlrazor.system.progress import doing
from rlrazor.system.terminal import Terminal, say

if TYPE_CHECKING:
    from rlrazor.guard.served import Asking

INTERVAL = 10.0  # seconds between looks


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "watch",
        help="measure a run's checkpoints as they are saved, beside any trainer",
        description="Each checkpoint of RUN_FOLDER, in order of step, against its base: KL and, with --law, the "
        "forecast of what was forgotten, as a ForgettingMonitor logs it. For any trainer that saves safetensors in the "
        "hub's layout. Ends with Ctrl-C, after --idle minutes, or when the last step of a Trainer is measured. Exit "
        "code: 0 the last checkpoint in the log is within --budget, or there is none; 1 it is above; 2 an error; 3 it "
        "cannot be told.",
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="where the trainer saves its checkpoints")
    parser.add_argument(
        "--base", required=True, metavar="MODEL", help=f"what is trained: a hub id, a folder, a .gguf; {HELP}"
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="the new task's: rows with prompt, or a line each"
    )
    parser.add_argument("--law", type=Path, metavar="FILE", help="law.json of this base, from `razor calibrate`")
    parser.add_argument("--budget", type=float, help="largest drop of the prior score to accept, such as 0.02")
    parser.add_argument("--cautious", action="store_true", help="judge by the upper end of the forecast's interval")
    parser.add_argument(
        "--on-budget",
        metavar="COMMAND",
        help="run once, without a shell, when a checkpoint is over the budget, such as 'kill -TERM 4711' (default: "
        "nothing)",
    )
    when = parser.add_argument_group("when")
    when.add_argument("--once", action="store_true", help="measure what is there, and end")
    when.add_argument(
        "--interval", type=float, default=INTERVAL, metavar="SECONDS", help=f"between looks (default: {INTERVAL:g})"
    )
    when.add_argument("--idle", type=float, metavar="MINUTES", help="end when nothing new was saved (default: never)")
    when.add_argument("--every", type=int, metavar="N", help="steps that are multiples of N only (default: all)")
    parser.add_argument(
        "--log", dest="watch_log", type=Path, metavar="FILE", help="to add to (default: RUN_FOLDER/razor.jsonl)"
    )
    parser.add_argument("--json", action="store_true", help="print each reading as a line of JSON, as it is in the log")
    probe = parser.add_argument_group("how it is measured (a law's own settings come first)")
    add_probe(probe)
    add_prior_tasks(probe, "prior tasks, whose prompts --generic prior is")
    add_served(parser.add_argument_group("a served base, which tells its likeliest tokens alone"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Watch, print each reading, and judge the last."""
    asking = asking_of(arguments, arguments.base)  # which refuses --generic prior, whatever is missing for it
    needs_extra("guard", *(("eval",) if arguments.generic == PRIOR else ()))
    if not arguments.folder.is_dir():
        raise RazorError(
            f"There is no folder {arguments.folder}: name where the trainer saves its checkpoints, or make it before "
            "training does (mkdir -p)."
        )
    if arguments.once and arguments.idle is not None:
        raise RazorError("--once ends when what is there is measured: leave --idle out.")
    require_files(prompts=arguments.prompts, law=arguments.law, generic=arguments.generic)
    require_prior(arguments.prior)
    sources = local_sources(asking, arguments.base)
    require_source(*sources)
    settle_hub(*sources, data=arguments.generic == PRIOR and arguments.data_mirror is None)
    from rlrazor.guard.outputs import LOG
    from rlrazor.lm import compute
    from rlrazor.system.cores import threads_alone

    log = arguments.watch_log or arguments.folder / LOG
    check_outputs(arguments, [(log, "log")])
    compute.prepare_process(threads_alone())
    with quiet.without_advice():
        return _watch(arguments, log, asking)


def _watch(arguments: argparse.Namespace, log: Path, asking: "Asking | None") -> int:
    from rlrazor.guard.budget import Budget
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.served import AddressedBase
    from rlrazor.guard.watch import Until, Watch, WatchRequest
    from rlrazor.guard.watch_command import OnBudgetCommand
    from rlrazor.lm import compute

    law = None if arguments.law is None else LawFile.load(arguments.law)
    rule = Budget(law, arguments.budget, "warn", arguments.cautious)
    command = None if arguments.on_budget is None else OnBudgetCommand(arguments.on_budget)
    if arguments.budget is not None and law is None:
        raise RazorError("--budget is of the drop that a law forecasts: give --law, which `razor calibrate` makes.")
    if command is not None and not rule.is_watched:
        objection = None if law is None else law.objection(limit=arguments.budget)
        raise RazorError(f"--on-budget would never be run: {objection or 'give --law and --budget.'}")
    dtype, on = read_probe(arguments, law, suite_of(arguments))
    on = replace(on, settings=replace(on.settings, precision=on.settings.precision or dtype))
    base = arguments.base if asking is None else AddressedBase(arguments.base, asking)
    request = WatchRequest(arguments.folder, log, base, dtype, on, rule, arguments.every or 1, command)
    minutes = arguments.idle
    until = Until(arguments.interval, arguments.once, None if minutes is None else 60 * minutes)
    watch = Watch(request, say)
    with ExitStack() as watching:
        with doing(Terminal(stderr=True), f"[razor] reading the base; all is measured on {compute.device()}"):
            watching.enter_context(watch.begun())
        side = watch.read.side
        first = f"the first prompt, as measured in {on.settings.precision}: {shown_prompt(watch.first_prompt)}"
        said = [*rule.cautions(), first]
        for sentence in (*said, *on.cautions(side.whole), *side.cautions):
            say(f"[razor] {sentence}")
        for reading, row, done in watch.readings(until):
            print(json.dumps(row, allow_nan=False) if arguments.json else reading.line(done), flush=True)
            if arguments.json and row.get("on_budget"):
                say(f"[razor] step {reading.step}: {done}.")
        watch.log.finish()
    return exits.of_verdict(watch.verdict)


def shown_prompt(text: str) -> str:
    """Its beginning and its end, in quotes."""
    from rlrazor.guard.base_side import shortened

    return repr(shortened(text))
