"""`razor pick`: of a run's checkpoints, those worth having, and the one to take."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from rlrazor.cli import exits
from rlrazor.cli.early import require_files, settle_hub
from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import Subparsers, console_for_tables, options_of, print_json
from rlrazor.cli.probe import add_probe, dtype_of, probe_given, probe_without_law
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.system.terminal import PlainColumn, Terminal

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.measuring import Against
    from rlrazor.guard.pick import Pick
    from rlrazor.guard.scored import ScoredCheckpoint
    from rlrazor.report.drawing import Panel


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
    parser.add_argument("--figure", type=Path, metavar="DIR", help="draw the frontiers into DIR/pick.png and .svg")
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON instead of a table")
    parser.set_defaults(run=run, options=options_of(parser))


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
        needs_extra("guard")
    if (figure := arguments.figure) is not None:
        check_outputs(arguments, [(figure / "pick.png", "png"), (figure / "pick.svg", "svg")])
    require_files(law=arguments.law, prompts=arguments.prompts, generic=arguments.generic, log=arguments.log)
    if not arguments.folder.is_dir():
        raise RazorError(f"There is no folder {arguments.folder}.")
    if arguments.base is not None:
        settle_hub(arguments.base, data=False)
    from rlrazor.guard.law_file import LawFile

    law = None if arguments.law is None else LawFile.load(arguments.law)
    found = _pick(arguments, law, measuring=measuring)
    if arguments.json:
        print_json({"folder": str(arguments.folder), **as_json(found), "exit_code": _exit_code(found)})
    else:
        _print(found)
    if arguments.figure is not None:
        _draw(found, arguments.figure)
    return _exit_code(found)


def _pick(arguments: argparse.Namespace, law: "LawFile | None", *, measuring: bool) -> "Pick":
    from rlrazor.guard.metric import NewScore
    from rlrazor.guard.pick import pick
    from rlrazor.guard.pick_sources import metric_of
    from rlrazor.guard.run_folder import run_in
    from rlrazor.guard.verdict import Limits

    budgets = arguments.budget, arguments.kl_budget, arguments.kl_budget_probe
    limits = Limits(*budgets, cautious=arguments.cautious, accept_uncertain=arguments.accept_uncertain)
    score = NewScore(arguments.metric, arguments.lower_is_better)
    if measuring and arguments.log is not None:
        raise RazorError("--log says what was measured in training, --base measures here: give one of them.")
    if measuring and (arguments.folder / "records.parquet").exists():
        raise RazorError(
            f"{arguments.folder} is of a sweep, whose scores were measured: leave --base and --prompts out."
        )
    columns = (PlainColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Terminal(stderr=True), transient=True, disable=not measuring) as progress:
        measure, cautions = None, list[str]()
        if measuring:
            from rlrazor.guard.measuring import measurer, require_loadable
            from rlrazor.lm import compute
            from rlrazor.system.cores import threads_alone

            against = _against(arguments, law)
            run = run_in(arguments.folder, arguments.run_id)
            metric_of(run, score, limits, law)
            require_loadable([one.path for one in run.checkpoints])
            task = progress.add_task("the base on the probes", total=len(run.checkpoints) + 1)

            def told(step: str) -> None:
                progress.update(task, advance=1, description=step)

            compute.prepare_process(threads_alone())
            measure, cautions = measurer(against, law, told)
        elif (given := probe_given(arguments)) or arguments.generic or arguments.dtype:
            option = next(iter(given), "generic" if arguments.generic else "dtype").replace("_", "-")
            raise RazorError(f"--{option} is about measuring here, which takes --base and --prompts.")
        found = pick(
            arguments.folder,
            limits,
            score,
            law=law,
            measure=measure,
            run=arguments.run_id,
            log=arguments.log,
        )
    return replace(found, notes=[*cautions, *found.notes])


def _exit_code(found: "Pick") -> int:
    from rlrazor.guard.verdict import Verdict

    return {Verdict.ABOVE: exits.ABOVE, Verdict.UNCERTAIN: exits.UNCERTAIN}.get(found.advice.verdict, exits.DONE)  # type: ignore[arg-type]


def as_json(found: "Pick") -> dict[str, Any]:
    """All of it. The frontiers are lists of checkpoints, as is one."""

    def candidate(one: "ScoredCheckpoint") -> dict[str, Any]:
        return one.as_json() if not found.limits.most else {**one.as_json(), "verdict": found.verdict_of(one)}

    advice = found.advice
    chosen = advice.recommended
    return {
        "candidates": [candidate(one) for one in found.candidates],
        "frontier": [candidate(one) for one in found.frontier],
        "frontiers": {of: [one.name for one in front] for of, front in found.frontiers.items()},
        "recommended": None if chosen is None else candidate(chosen),
        "why": advice.why,
        "metric": found.metric,
        "lower_is_better": found.lower_is_better,
        "notes": list(found.notes),
        "level": found.level,
        "limits": dict(found.limits.most),
        "verdict": advice.verdict,
        "doubt": advice.doubt,
    }


_SHORT = {"drop": "drop", "kl_forward": "new task", "kl_probe": "generic probe"}  # by scored.AXES


def _against(arguments: argparse.Namespace, law: "LawFile | None") -> "Against":
    """Raises RazorError for what is missing, unreadable, or not the law's."""
    from rlrazor.guard.measured_on import MeasuredOn
    from rlrazor.guard.measuring import Against
    from rlrazor.lm.probes import GenericText, ProbeSettings, read_generic, read_prompts

    if arguments.base is None or arguments.prompts is None:
        raise RazorError("To measure checkpoints, give both --base and --prompts.")
    given, dtype = probe_without_law(arguments, law), dtype_of(arguments.dtype, law)
    prompts = read_prompts(arguments.prompts)
    if law is not None:
        return Against(arguments.base, dtype, MeasuredOn(prompts, law.generic, law.settings))
    generic = GenericText.built_in() if arguments.generic is None else read_generic(arguments.generic)
    return Against(arguments.base, dtype, MeasuredOn(prompts, generic, ProbeSettings(**given, precision=dtype)))


def _print(found: "Pick") -> None:
    console = console_for_tables()
    console.print(_table(found))
    for note in found.notes:
        console.print(note, style="yellow", highlight=False)
    advice = found.advice
    said = advice.why if advice.recommended is None else f"Take {advice.recommended.name}: {advice.why}."
    console.print(said, style="bold", highlight=False)
    if advice.doubt is not None:
        console.print(advice.doubt, style="yellow", highlight=False)


def _table(found: "Pick") -> Table:
    """The checkpoints by what is known of them: their drops, and where these do not judge alone, their KLs."""
    has_drop = any(one.drop is not None for one in found.candidates)
    kls = _kls_shown(found)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint")
    table.add_column(f"{found.metric}{', less is better' if found.lower_is_better else ''}", justify="right")
    if has_drop:
        kind = _kind(found)
        level = "" if found.level is None else f" ({found.level:.0%} interval)"
        table.add_column(f"{kind} drop, points{level}", justify="right")
    for of in kls:
        table.add_column(f"KL, {_SHORT[of]}, nats", justify="right")
    if found.limits.most:
        table.add_column("budget")
    table.add_column("")
    shown = found.candidates if len(found.candidates) <= 30 else _marked(found)
    for one in shown:
        cells = [one.name, f"{one.new:.4g}"]
        if has_drop:
            cells.append(_drop_cell(one))
        cells += [_kl_cell(one, of) for of in kls]
        if found.limits.most:
            cells.append(found.verdict_of(one).removesuffix(" the limit"))
        on = [of for of, front in found.frontiers.items() if one in front]
        several = len(kls) > 1 and len(on) == 1
        mark = f"on the frontier: {_SHORT[on[0]]}" if several else "on the frontier" if on else ""
        style = "bold" if one == found.advice.recommended else "" if on else "dim"
        table.add_row(*cells, "take this" if one == found.advice.recommended else mark, style=style)
    if len(shown) < len(found.candidates):
        table.caption = f"the frontier of {len(found.candidates)} checkpoints"
    return table


def _kind(found: "Pick") -> str:
    """Of the drops."""
    return "measured" if any(one.drop is not None and one.drop.measured for one in found.candidates) else "forecast"


def _kls_shown(found: "Pick") -> list[str]:
    """The KLs that are weighed: all where the drop is not, else those that have a budget."""
    from rlrazor.guard.verdict import DROP

    return [of for of in found.frontiers if of != DROP and (DROP not in found.frontiers or of in found.limits.most)]


def _marked(found: "Pick") -> "list[ScoredCheckpoint]":
    """Those on a frontier, and the recommended one."""
    return [
        one
        for one in found.candidates
        if one == found.advice.recommended or any(one in front for front in found.frontiers.values())
    ]


def _drop_cell(one: "ScoredCheckpoint") -> str:
    if (drop := one.drop) is None:
        return ""
    known = drop.low != drop.high and math.isfinite(drop.high)
    return f"{100 * drop.value:.1f}" + (f" [{100 * drop.low:.1f}, {100 * drop.high:.1f}]" if known else "")


def _kl_cell(one: "ScoredCheckpoint", of: str) -> str:
    if of not in one.kl:
        return ""
    kl = one.kl[of]
    return f"{kl.mean:.3f}" + (f" ± {kl.stderr:.3f}" if math.isfinite(kl.stderr) and kl.stderr else "")


def _draw(found: "Pick", folder: Path) -> None:
    """A panel for each frontier that is weighed."""
    from rlrazor.guard.verdict import DROP
    from rlrazor.report import drawing
    from rlrazor.report.drawing import Figure

    shown = ([DROP] if DROP in found.frontiers else []) + _kls_shown(found)
    if not shown:
        raise RazorError("There is no frontier to draw: nothing is known of these checkpoints that may be relied on.")
    panels = [_panel(found, of) for of in shown]
    drawing.save(Figure("pick", panels, columns=len(panels)), folder)


def _panel(found: "Pick", of: str) -> "Panel":
    import numpy as np

    from rlrazor.guard.law_file import NAMES
    from rlrazor.guard.verdict import DROP
    from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Interval, Layer, Marker, Panel, Points

    scale = 100 if of == DROP else 1
    known = [one for one in found.candidates if one.interval(of) is not None]

    def points(label: str, own: "Sequence[ScoredCheckpoint]", color: str, symbol: str, size: float) -> Points:
        ends = np.array([one.interval(of) for one in own], float).reshape(-1, 3) * scale
        ends = np.where(np.isfinite(ends), ends, ends[:, :1])  # no bar where the error is not known
        x = np.array([one.new for one in own])
        return Points(label, x, ends[:, 0], Marker(color, symbol, size=size), interval=Interval(ends[:, 1], ends[:, 2]))

    front = found.frontiers[of]
    line = sorted(front, key=lambda one: one.new)
    layers: list[Layer] = [
        Curve("frontier", np.array([one.new for one in line]), np.array([scale * one.at(of) for one in line]), INK),
        points("checkpoint", [one for one in known if one not in front], "#999999", "circle", 5.0),
        points("on the frontier", front, PALETTE[0], "circle", 6.0),
        points("recommended", [one for one in known if one == found.advice.recommended], PALETTE[1], "star", 12.0),
    ]
    label = f"{_kind(found)} drop of the prior score, points" if of == DROP else f"{NAMES[of]}, nats"
    return Panel("Which checkpoint to take", Axis(found.metric, percent=False), Axis(label, percent=False), layers)
