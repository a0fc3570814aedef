"""`razor compare`: how far a fine-tuned model is from its base, where, and what that has cost; an exit code for CI."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlrazor.cli import exits
from rlrazor.cli.early import require_files, require_prior, require_source, settle_hub
from rlrazor.cli.language import stop_of
from rlrazor.cli.printing import Subparsers, console_for_tables, options_of
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.store import check_writable

if TYPE_CHECKING:
    from rlrazor.guard.compare import Comparison, TaskChange
    from rlrazor.guard.law_file import LawFile
    from rlrazor.lm.prior import Metric

WORST = 3  # prompts in the terminal


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="how far a fine-tuned model is from its base, where, and what it forgot",
        description="KL both ways, the prompts and tokens that moved most, weights, and with --law the forecast of "
        "what was forgotten. Exit code: 0 within --fail-above, 1 above it, 2 an error.",
    )
    parser.add_argument("base", metavar="BASE", help="a hub id, a folder, or a .gguf file")
    parser.add_argument("tuned", metavar="TUNED", help="the same, or the folder of an adapter for BASE")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="the new task's: rows with prompt, or a line each"
    )
    parser.add_argument("--law", type=Path, metavar="FILE", help="law.json of this base, from `razor calibrate`")
    parser.add_argument("--fail-above", metavar="DROP", help="largest drop of the prior score, such as 0.02")
    parser.add_argument("--cautious", action="store_true", help="judge by the upper end of the forecast's interval")
    parser.add_argument("--level", type=float, help="of the interval (default: the law's)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("comparison.html"), help="the page")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    probe = parser.add_argument_group("how it is measured (a law's own settings come first)")
    probe.add_argument("--generic", type=Path, metavar="FILE", help="text that stands for what must not change")
    probe.add_argument("--max-new-tokens", type=int, help="of a completion (default: 128)")
    probe.add_argument("--samples", type=int, help="completions of each prompt (default: 1)")
    probe.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="what ends one, \\n being a line end; may be repeated",
    )
    probe.add_argument("--no-chat", action="store_true", help="do not put prompts into the chat template")
    probe.add_argument("--dtype", help="float32 (default, or the law's) or bfloat16, half the memory")
    probe.add_argument("--as-given", action="store_true", help="the order is right, whatever it looks like")
    truth = parser.add_argument_group("the truth beside the forecast")
    truth.add_argument("--prior", metavar="TASKS", help="prior tasks to measure: lm-eval names, comma-separated")
    truth.add_argument("--prior-limit", type=int, metavar="N", help="items of each at most")
    truth.add_argument("--data-mirror", type=Path, metavar="DIR", help="local JSONL files of the prior tasks")
    truth.add_argument("--allow-code-execution", action="store_true", help="run code that the model writes (HumanEval)")
    parser.set_defaults(run=run, options=options_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Compare, write the page, print, and judge."""
    needs_extra("guard", *(("eval",) if arguments.prior else ()))
    limit = _limit(arguments)
    require_files(prompts=arguments.prompts, law=arguments.law, generic=arguments.generic)
    require_prior(arguments.prior)
    settle_hub(arguments.base, arguments.tuned, data=arguments.prior is not None and arguments.data_mirror is None)
    check_writable(arguments.out)  # first: it should not cost minutes
    from rlrazor.lm import compute

    compute.prepare_process(compute.threads_alone())
    require_source(arguments.base, arguments.tuned)
    from rlrazor.guard.compare import STEPS, Pair, PriorSuite, compare
    from rlrazor.guard.comparison_page import write_page
    from rlrazor.guard.law_file import LawFile
    from rlrazor.lm.probes import ProbeSettings, default_cache, read_generic, read_prompts

    compute.leave_progress_to_us()
    law = None if arguments.law is None else LawFile.load(arguments.law)
    own = {
        "max_new_tokens": arguments.max_new_tokens,
        "samples": arguments.samples,
        "stop": stop_of(arguments) or None,
        "chat": False if arguments.no_chat else None,
    }
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if law is not None and (given or arguments.generic):
        raise RazorError("With --law, the law's own probe and settings are used: leave the others out.")
    prompts = read_prompts(arguments.prompts)
    suite = None
    metrics: Mapping[str, Metric] = {}
    if arguments.prior is not None:
        tasks = tuple(name.strip() for name in arguments.prior.split(",") if name.strip())
        suite = PriorSuite(tasks, arguments.prior_limit, arguments.data_mirror, arguments.allow_code_execution)
        metrics = suite.metrics()  # before models are loaded: what is missing shows at once
    if limit is not None:
        _check_judge(arguments, law, metrics)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=STEPS)
        begun = 0

        def told(step: str) -> None:
            nonlocal begun
            progress.update(task, description=step, completed=begun)
            begun += 1

        found = compare(
            Pair(arguments.base, arguments.tuned, dtype_of(arguments.dtype, law), arguments.as_given, default_cache()),
            prompts,
            law=law,
            generic=None if arguments.generic is None else read_generic(arguments.generic),
            settings=ProbeSettings(**given),
            suite=suite,
            level=arguments.level,
            told=told,
        )
    above = limit is not None and not _judged(found, law, arguments) <= limit
    if arguments.json:
        printed = {**as_json(found), "page": str(arguments.out), "fail_above": limit, "above": above}
        print(json.dumps(printed, indent=2, allow_nan=False))
    else:
        _print(found, limit, above=above)
    page = write_page(found, arguments.out)
    if not arguments.json:
        console_for_tables().print(f"Page: {page}", highlight=False, soft_wrap=True)
    return exits.ABOVE if above else exits.DONE


def dtype_of(given: str | None, law: "LawFile | None") -> str:
    """What models are loaded in: what was asked for, else what the law was calibrated in."""
    return given or (law.settings.precision if law is not None else None) or "float32"


def _limit(arguments: argparse.Namespace) -> float | None:
    if arguments.level is not None and not 0 < arguments.level < 1:
        raise RazorError(f"--level is a fraction of 1, such as 0.9, not {arguments.level}.")
    if arguments.fail_above is None:
        return None
    try:
        limit = float(arguments.fail_above)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1:
        raise RazorError(
            "--fail-above is a fraction of 1, such as 0.02 for two points of the prior score, not "
            f"{arguments.fail_above}."
        )
    if arguments.law is None and arguments.prior is None:
        raise RazorError(
            "--fail-above judges a drop of the prior score: give --law to forecast it, or --prior to measure it."
        )
    return limit


def _check_judge(arguments: argparse.Namespace, law: "LawFile | None", metrics: "Mapping[str, Metric]") -> None:
    """Raise RazorError where there will be no drop to judge."""
    if any(metric.is_fraction for metric in metrics.values()):
        return
    if law is None:
        raise _nothing_to_judge(metrics)
    if not arguments.cautious:
        _require_useful(arguments, law)


def _judged(found: "Comparison", law: "LawFile | None", arguments: argparse.Namespace) -> float:
    """The measured drop where there is one, else the forecast's, with `--cautious` its upper end."""
    if found.truth is not None and found.truth.drop is not None:
        return found.truth.drop
    if found.forecast is None or law is None:
        assert found.truth is not None
        raise _nothing_to_judge(found.truth.tasks)
    if arguments.cautious:
        return found.forecast.high
    _require_useful(arguments, law)
    return found.forecast.drop


def _nothing_to_judge(tasks: "Mapping[str, Metric] | Mapping[str, TaskChange]") -> RazorError:
    said = ", ".join(f"{name} by {task.metric}" for name, task in tasks.items())
    return RazorError(
        f"--fail-above judges the mean drop of scores that are fractions of 1, and there is none: {said}. Name a task "
        "that is scored by a fraction, such as an accuracy, or give --law."
    )


def _require_useful(arguments: argparse.Namespace, law: "LawFile") -> None:
    if not law.useful:
        raise RazorError(
            f"The law in {arguments.law} is not to be relied on, so --fail-above cannot go by its forecast. "
            f"{law.cautions(arguments.level)[0]} Or measure the drop with --prior, or judge by the interval with "
            "--cautious."
        )


def as_json(found: "Comparison") -> dict[str, Any]:
    """All of it but the tokens; a standard error that does not exist is null."""
    numbers = asdict(found)
    if found.truth is not None:
        numbers["truth"] |= {"base": found.truth.base, "tuned": found.truth.tuned}
        for name, task in found.truth.tasks.items():
            numbers["truth"]["tasks"][name]["drop"] = task.drop
    for name in ("kl", "per_token"):
        estimates = getattr(found, name).items()
        numbers[name] = {
            key: {"mean": one.mean, "stderr": one.stderr if one.stderr == one.stderr else None}
            for key, one in estimates
        }
    numbers["prompts"] = [{"prompt": prompt.prompt, "kl_forward": prompt.total} for prompt in found.prompts]
    for change in (numbers["weights"], *numbers["layers"]):
        change["relative"] = change["l2"] / change["norm"] if change["norm"] else 0.0
    return numbers


def _print(found: "Comparison", limit: float | None, *, above: bool) -> None:
    from rlrazor.guard.base_side import shortened
    from rlrazor.guard.comparison_page import LABELS, shown_estimate, shown_scores, verdict

    table = Table(title=f"{found.tuned} against {found.base}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("distance, nats")
    table.add_column("per completion", justify="right")
    table.add_column("per token", justify="right")
    for name, label in LABELS.items():
        table.add_row(label, shown_estimate(found.kl[name]), shown_estimate(found.per_token[name]))
    console = console_for_tables()
    console.print(table)
    weights = f"Weights: L2 of the change {found.weights.l2:.4g} ({100 * found.weights.relative:.3g} %), "
    weights += f"{100 * found.weights.unchanged:.1f} % exactly as before."
    if found.cknna is not None:
        weights += f" CKNNA on the generic probe {found.cknna:.3f}."
    console.print(weights, highlight=False)
    if found.truth is not None:
        scores = Table(box=box.SIMPLE_HEAD)
        for header in ("prior task", "metric", "base", "tuned", "worse by"):
            scores.add_column(header, justify="left" if header in ("prior task", "metric") else "right")
        for name, change in found.truth.tasks.items():
            scores.add_row(name, *shown_scores(change))
        console.print(scores)
    console.print(Text(f"The first prompt, as measured in {found.precision}: {shortened(found.first_prompt)!r}"))
    console.print("Moved most, nats of forward KL:", highlight=False)
    for prompt in found.prompts[:WORST]:
        first = " ".join(prompt.prompt.split())
        console.print(Text(f"  {prompt.total:8.3f}  {first[:90]}{'…' if len(first) > 90 else ''}"))
    for note in found.notes:
        console.print(note, style="yellow", highlight=False)
    console.print(verdict(found), style="bold", highlight=False)
    if limit is not None:
        console.print(f"{'Above' if above else 'Within'} the limit of {100 * limit:.1f} points.", highlight=False)
        if found.truth is not None and found.truth.stderr is not None and found.truth.stderr > limit:
            error = f"{100 * found.truth.stderr:.1f} points"
            console.print(f"The measured drop's standard error, {error}, is more than that.", style="yellow")
