"""`razor pick`: of a run's checkpoints, those worth having, and the one to take."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlrazor.cli import exits
from rlrazor.cli.early import require_files, require_prior, settle_hub
from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import Subparsers, print_json, steps_shown
from rlrazor.cli.probe import add_prior_tasks, add_probe, probe_given, read_probe, suite_of
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.guard.metric import NewScore
from rlrazor.guard.verdict import Limits
from rlrazor.lm.task_names import PRIOR

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.pick import Pick


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "pick",
        help="which checkpoint of a run to take",
        description="The checkpoints on the Pareto frontier of new-task score and forgetting, and the recommended one. "
        "FOLDER is the output folder of any Trainer, with a ForgettingMonitor's razor.jsonl, or with --base and "
        "--prompts to measure its checkpoints here; or the folder of a sweep. Without a law (--law, or the monitor's) "
        "forgetting is KL to the base, and a checkpoint is recommended by a KL budget. Exit code: 0 the recommended "
        "checkpoint is within the budgets, or none was given; 1 no checkpoint is; 2 an error; 3 the recommended one is "
        "by its estimate, but its interval does not tell, or there is no law that may judge the --budget. In a script "
        "use --cautious, which takes only what is within by its whole interval.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--metric", help="the new-task score, as the trainer logs it (default: the first usual one)")
    parser.add_argument(
        "--lower-is-better",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of the metric (default: by its name)",
    )
    _add_budgets(parser)
    parser.add_argument(
        "--run",
        dest="run_id",
        metavar="ID",
        help="of several runs in the folder, this one (default: the last to write)",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="the monitor's log (default: FOLDER/razor.jsonl)")
    parser.add_argument("--law", type=Path, metavar="FILE", help="law.json of the base")
    measured = parser.add_argument_group("measure the checkpoints here (a law's own settings come first)")
    measured.add_argument("--base", help="what they were fine-tuned from")
    measured.add_argument("--prompts", type=Path, metavar="FILE", help="... and the new task's prompts")
    add_probe(measured)
    add_prior_tasks(measured, "prior tasks, whose prompts --generic prior is")
    parser.add_argument("--figure", type=Path, metavar="DIR", help="draw the frontiers into DIR/pick.png and .svg")
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON instead of a table")
    parser.set_defaults(run=run)


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    budgets = parser.add_argument_group("budgets, of which the best score within them is recommended")
    budgets.add_argument("--budget", type=float, help="largest drop of the prior score to accept, such as 0.02")
    budgets.add_argument(
        "--kl-budget", type=float, metavar="NATS", help="largest KL per completion on the new task's prompts"
    )
    budgets.add_argument("--kl-budget-probe", type=float, metavar="NATS", help="largest KL on the generic probe")
    doubt = budgets.add_mutually_exclusive_group()
    doubt.add_argument(
        "--cautious",
        action="store_true",
        help="judge by the upper ends of intervals: what cannot be told is not within",
    )
    doubt.add_argument(
        "--accept-uncertain", action="store_true", help="judge by the estimates alone: exit with 0 where 3 is due"
    )


def run(arguments: argparse.Namespace) -> int:
    """Pick, and print."""
    measuring = arguments.base is not None or arguments.prompts is not None
    if measuring:
        needs_extra("guard", *(("eval",) if arguments.generic == PRIOR else ()))
    if (figure := arguments.figure) is not None:
        check_outputs(arguments, [(figure / "pick.png", "png"), (figure / "pick.svg", "svg")])
    require_files(law=arguments.law, prompts=arguments.prompts, generic=arguments.generic, log=arguments.log)
    if not arguments.folder.is_dir():
        raise RazorError(f"There is no folder {arguments.folder}.")
    require_prior(arguments.prior)
    if arguments.base is not None:
        settle_hub(arguments.base, data=arguments.generic == PRIOR and arguments.data_mirror is None)
    from rlrazor.cli.pick_output import as_json, draw, print_findings
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.pick import pick

    law = None if arguments.law is None else LawFile.load(arguments.law)
    budgets = arguments.budget, arguments.kl_budget, arguments.kl_budget_probe
    limits = Limits(*budgets, cautious=arguments.cautious, accept_uncertain=arguments.accept_uncertain)
    score = NewScore(arguments.metric, arguments.lower_is_better)
    if measuring:
        found = _measured(arguments, limits, score, law)
    else:
        _refuse_probe(arguments)
        found = pick(arguments.folder, limits, score, law=law, run=arguments.run_id, log=arguments.log)
    code = exits.of_verdict(found.advice.verdict)
    if arguments.json:
        print_json({"folder": str(arguments.folder), **as_json(found), "exit_code": code})
    else:
        print_findings(found)
    if figure is not None:
        draw(found, figure)
    return code


def _measured(arguments: argparse.Namespace, limits: Limits, score: NewScore, law: "LawFile | None") -> "Pick":
    """With the checkpoints measured here; what is wrong shows before the base is loaded."""
    from rlrazor.guard.measuring import measurer, require_loadable
    from rlrazor.guard.pick import pick
    from rlrazor.guard.pick_sources import metric_of
    from rlrazor.guard.run_folder import run_in
    from rlrazor.lm import compute
    from rlrazor.system.cores import threads_alone

    if arguments.log is not None:
        raise RazorError("--log says what was measured in training, --base measures here: give one of them.")
    if (arguments.folder / "records.parquet").exists():
        raise RazorError(
            f"{arguments.folder} is of a sweep, whose scores were measured: leave --base and --prompts out."
        )
    if arguments.base is None or arguments.prompts is None:
        raise RazorError("To measure checkpoints, give both --base and --prompts.")
    if arguments.prior is not None and arguments.generic != PRIOR:
        raise RazorError(f"--prior names the tasks whose prompts --generic {PRIOR} is: give both, or neither.")
    dtype, on = read_probe(arguments, law, suite_of(arguments))
    run = run_in(arguments.folder, arguments.run_id)
    metric_of(run, score, limits, law)
    require_loadable([one.path for one in run.checkpoints])
    compute.prepare_process(threads_alone())
    with steps_shown(len(run.checkpoints) + 1) as told:
        measure, cautions = measurer(arguments.base, dtype, on, law, told)
        found = pick(arguments.folder, limits, score, law=law, measure=measure, run=arguments.run_id)
    return replace(found, notes=[*cautions, *found.notes])


def _refuse_probe(arguments: argparse.Namespace) -> None:
    """Raise RazorError where it is said how to measure, and nothing is measured here."""
    of_prior = "prior", "prior_limit", "chat_template", "fewshot", "data_mirror", "allow_code_execution"
    values = {name: getattr(arguments, name) for name in ("generic", "dtype", *of_prior)}
    given = [*probe_given(arguments), *(name for name, value in values.items() if value not in (None, False))]
    if given:
        option = given[0].replace("_", "-")
        raise RazorError(f"--{option} is about measuring here, which takes --base and --prompts.")
