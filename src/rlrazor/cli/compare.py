"""`razor compare`: how far a fine-tuned model is from its base, where, and what that has cost; an exit code for CI."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor import bounds
from rlrazor.cli import exits
from rlrazor.cli.early import needs_no_prior, require_files, require_prior, require_source, settle_hub
from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import Subparsers, console_for_tables, print_json, steps_shown
from rlrazor.cli.probe import add_prior_tasks, add_probe, read_probe, suite_of
from rlrazor.cli.served import HELP, add_served, asking_of, compare_served
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.guard.recovery import Recovery
from rlrazor.guard.verdict import Limits
from rlrazor.system import quiet

if TYPE_CHECKING:
    from rlrazor.guard.comparison import Comparison
    from rlrazor.guard.law_file import LawFile


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="how far a fine-tuned model is from its base, where, and what it forgot",
        description="KL both ways, the prompts and tokens that moved most, weights, and with --law the forecast of "
        "what was forgotten. Exit code: 0 within --fail-above and --fail-above-kl, or without them; 1 above one of "
        "them; 2 an error; 3 where it cannot be told, as the interval of the drop or of KL holds the limit. The "
        "printed verdict then says how many more items or prompts would tell; --accept-uncertain goes by the "
        "estimate alone, --cautious counts it as above.",
    )
    parser.add_argument("base", metavar="BASE", help=f"a hub id, a folder, or a .gguf file; {HELP}")
    parser.add_argument("tuned", metavar="TUNED", help="the same, or the folder of an adapter for BASE")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="the new task's: rows with prompt, or a line each"
    )
    parser.add_argument("--law", type=Path, metavar="FILE", help="law.json of this base, from `razor calibrate`")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="DROP",
        help="largest drop of the prior score, such as 0.02: of the one that --prior measures, else --law's forecast",
    )
    parser.add_argument(
        "--fail-above-kl",
        type=float,
        metavar="NATS",
        help="largest forward KL on the new task's prompts, in nats per completion; needs no law. It grows with "
        "--max-new-tokens. With both, the worse verdict counts",
    )
    unsure = parser.add_mutually_exclusive_group()
    unsure.add_argument("--cautious", action="store_true", help="count what cannot be told as above the limit")
    unsure.add_argument("--accept-uncertain", action="store_true", help="judge by the estimate, whatever its interval")
    parser.add_argument("--level", type=float, help="of the intervals, two-sided (default: the law's, or 0.9)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("comparison.html"), help="the page (default: comparison.html)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    probe = parser.add_argument_group("how it is measured (a law's own settings come first)")
    add_probe(probe)
    probe.add_argument(
        "--first-tokens",
        type=int,
        metavar="K",
        help="how many tokens are the beginning of a completion, whose KL is told apart (default: 5)",
    )
    probe.add_argument("--as-given", action="store_true", help="the order is right, whatever it looks like")
    add_served(parser.add_argument_group("a served model, which tells its likeliest tokens alone"))
    _add_truth(parser.add_argument_group("the truth beside the forecast"))
    parser.set_defaults(run=run)


def _add_truth(group: Any) -> None:
    add_prior_tasks(group, "prior tasks to measure")
    group.add_argument(
        "--noise-floor",
        action="store_true",
        help="measure how far the base's scores are from themselves, in other batches and in another precision, and "
        "with other examples where a task shows some. Kept in the cache, and shown beside every drop from then on",
    )
    group.add_argument(
        "--recover",
        type=int,
        default=0,
        metavar="N",
        help="train a copy of each model N steps on 32 prior items that are not scored, and score it again: what comes "
        "back in the tuned one, and is not just taught, was not lost (default: 0, off; 20 is a good number)",
    )
    group.add_argument(
        "--recover-lr",
        type=float,
        metavar="LR",
        help="learning rate of --recover (default: the largest of 3e-3, 1e-3, ... 3e-6 that does the base no harm on "
        "other prior items)",
    )
    group.add_argument(
        "--recover-rank",
        type=int,
        metavar="R",
        help="train a LoRA of this rank (default: 0, all weights, 16 bytes of memory for each)",
    )
    group.add_argument("--recover-seed", type=int, metavar="S", help="chooses the items and their order (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Compare, write the page, print, and judge."""
    if needs_no_prior(arguments.prior):
        arguments.prior = None
    asking = asking_of(arguments, arguments.base, arguments.tuned)  # which refuses --prior, whatever is missing for it
    needs_extra("guard", *(("eval",) if arguments.prior else ()))
    limits, recovery = _limits(arguments), _recovery(arguments)
    if asking is not None:
        return compare_served(arguments, asking, limits)
    check_outputs(arguments, [(arguments.out, "page")])  # first: it should not cost minutes
    require_files(prompts=arguments.prompts, law=arguments.law, generic=arguments.generic)
    require_prior(arguments.prior)
    require_source(arguments.base, arguments.tuned)
    settle_hub(arguments.base, arguments.tuned, data=arguments.prior is not None and arguments.data_mirror is None)
    from rlrazor.lm import compute
    from rlrazor.system.cores import threads_alone

    compute.prepare_process(threads_alone())
    from rlrazor.cli.compare_output import as_json, print_findings
    from rlrazor.guard.comparison_page import write_page
    from rlrazor.guard.judgement import judgements, worst
    from rlrazor.guard.law_file import LawFile

    with quiet.without_advice():
        law = None if arguments.law is None else LawFile.load(arguments.law)
        found = _compared(arguments, law, limits, recovery)
        judged = judgements(found, limits)
        page = write_page(found, arguments.out, judged)
    deciding = worst(judged)
    code = exits.of_verdict(None if deciding is None else deciding.verdict)
    if arguments.json:
        print_json({**as_json(found, judged), "page": str(arguments.out), "exit_code": code})
    else:
        print_findings(found, judged)
        console_for_tables().print(f"Page: {page}", highlight=False, soft_wrap=True)
    return code


def _compared(
    arguments: argparse.Namespace, law: "LawFile | None", limits: Limits, recovery: Recovery | None
) -> "Comparison":
    """What the options ask for is compared; all that can be wrong with them shows before a model is loaded."""
    from rlrazor.guard.compare import compare, steps
    from rlrazor.guard.comparison import Pair
    from rlrazor.guard.judgement import check_judge
    from rlrazor.lm.probes import default_cache

    suite = suite_of(arguments)
    dtype, on = read_probe(arguments, law, suite, asks_prior=True)
    metrics = {} if suite is None else suite.metrics()  # what is missing shows at once
    if limits.drop is not None:
        check_judge(law, metrics, limits.drop)
    floor = arguments.noise_floor
    pair = Pair(arguments.base, arguments.tuned, dtype, arguments.as_given, default_cache(), floor)
    pair = replace(pair, first_tokens=arguments.first_tokens or pair.first_tokens, recovery=recovery)
    how: dict[str, Any] = {"generic": on.generic, "settings": on.settings, "level": arguments.level}
    with steps_shown(steps(suite, noise_floor=floor, recovery=recovery)) as told:
        found = compare(pair, on.prompts, law=law, suite=suite, told=told, **how)
    return replace(found, setup=replace(found.setup, sources=_sources(arguments)))


def _recovery(arguments: argparse.Namespace) -> Recovery | None:
    """How copies are trained; None for not. Raises RazorError where that makes no sense."""
    given = {
        name: value for name in ("lr", "rank", "seed") if (value := getattr(arguments, f"recover_{name}")) is not None
    }
    if not arguments.recover:
        if given:
            raise RazorError(f"--recover-{next(iter(given))} says how --recover trains: give --recover N as well.")
        return None
    if arguments.prior is None:
        raise RazorError("--recover is of the prior tasks: name them with --prior.")
    return Recovery(arguments.recover, **given)


def _sources(arguments: argparse.Namespace) -> dict[str, str]:
    """The files and the command, for the page."""
    files = {name: getattr(arguments, name) for name in ("prompts", "generic", "law")}
    if arguments.law is not None:
        files["generic"] = arguments.law
    named = {name: str(path) for name, path in files.items() if path is not None}
    return {**named, "command": shlex.join(["razor", *arguments.argv])}


def _limits(arguments: argparse.Namespace) -> Limits:
    if arguments.noise_floor and arguments.prior is None:
        raise RazorError("--noise-floor is that of the prior tasks' scores: name them with --prior.")
    bounds.check("first_tokens", arguments.first_tokens, "--first-tokens")
    drop, kl = arguments.fail_above, arguments.fail_above_kl
    bounds.check("budget", drop, "--fail-above")
    bounds.check("kl_budget", kl, "--fail-above-kl")
    if drop is not None and arguments.law is None and arguments.prior is None:
        raise RazorError(
            "--fail-above judges a drop of the prior score: give --law to forecast it, or --prior to measure it. "
            "--fail-above-kl judges KL without either."
        )
    return Limits(drop, kl, cautious=arguments.cautious, accept_uncertain=arguments.accept_uncertain)
