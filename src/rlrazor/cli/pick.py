"""`razor pick`: of a run's checkpoints, those worth having, and the one to take."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlrazor.cli.compare import dtype_of
from rlrazor.cli.early import require_files, settle_hub
from rlrazor.cli.printing import Subparsers, console_for_tables, options_of
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.pick import Drop, Pick


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "pick",
        help="which checkpoint of a run to take",
        description="The checkpoints on the Pareto frontier of new-task score and forgetting, and the recommended one. "
        "FOLDER is the output folder of any Trainer, with a ForgettingMonitor's razor.jsonl, or with --base, --prompts "
        "and --law to measure its checkpoints here; or the folder of a sweep.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--metric", help="the new-task score, as the trainer logs it (default: the first usual one)")
    parser.add_argument(
        "--lower-is-better",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of the metric (default: by its name)",
    )
    parser.add_argument("--budget", type=float, help="largest drop of the prior score to accept, such as 0.02")
    parser.add_argument("--cautious", action="store_true", help="judge by the upper end of the forecast's interval")
    parser.add_argument(
        "--run",
        dest="run_id",
        metavar="ID",
        help="of several runs in the folder, this one (default: the last to write)",
    )
    parser.add_argument("--law", type=Path, metavar="FILE", help="law.json of the base")
    parser.add_argument("--base", help="measure the checkpoints here: what they were fine-tuned from")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="... and the new task's prompts")
    parser.add_argument("--dtype", help="... in float32 or bfloat16 (default: the law's)")
    parser.add_argument("--figure", type=Path, metavar="DIR", help="draw the frontier into DIR/pick.png and .svg")
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON instead of a table")
    parser.set_defaults(run=run, options=options_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Pick, and print."""
    measuring = arguments.base is not None or arguments.prompts is not None
    if measuring:
        needs_extra("guard")
    require_files(law=arguments.law, prompts=arguments.prompts)
    if not arguments.folder.is_dir():
        raise RazorError(f"There is no folder {arguments.folder}.")
    if arguments.base is not None:
        settle_hub(arguments.base, data=False)
    from rlrazor.guard.law_file import LawFile
    from rlrazor.guard.pick import pick
    from rlrazor.guard.run_folder import run_in

    law = None if arguments.law is None else LawFile.load(arguments.law)
    if measuring and (arguments.base is None or arguments.prompts is None or law is None):
        raise RazorError("To measure checkpoints, give all of --base, --prompts and --law.")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not measuring) as progress:
        measure, cautions = None, list[str]()
        if measuring:
            assert law is not None
            total = len(run_in(arguments.folder, arguments.run_id).checkpoints) + 1
            task = progress.add_task("the base on the probes", total=total)

            def told(step: str) -> None:
                progress.update(task, advance=1, description=step)

            dtype = dtype_of(arguments.dtype, law)
            measure, cautions = _measuring(arguments.base, arguments.prompts, dtype, law, told)
        found = pick(
            arguments.folder,
            metric=arguments.metric,
            lower_is_better=arguments.lower_is_better,
            budget=arguments.budget,
            cautious=arguments.cautious,
            law=law,
            measure=measure,
            run=arguments.run_id,
        )
    found = replace(found, notes=[*cautions, *found.notes])
    if arguments.json:
        print(json.dumps({"folder": str(arguments.folder), **asdict(found)}, indent=2))
    else:
        console = console_for_tables()
        console.print(_table(found))
        for note in found.notes:
            console.print(note, style="yellow", highlight=False)
        console.print(f"Take {found.recommended.name}: {found.why}.", style="bold", highlight=False)
    if arguments.figure is not None:
        _draw(found, arguments.figure)
    return 0


_NO_TOKENIZER = "Checkpoints that have no tokenizer are measured with the base's."


def _measuring(
    base: str, prompts: Path, dtype: str, law: "LawFile", told: Callable[[str], None]
) -> "tuple[Callable[[Path, int], Drop], list[str]]":
    """Measures a checkpoint, full or an adapter, against the base, whose side is computed once; and cautions.

    Those gain what is found while measuring.
    """
    from rlrazor.forecast import FORWARD
    from rlrazor.guard.base_side import BaseSide, cautions_of, kls_of
    from rlrazor.guard.compare import NO_MEMORY
    from rlrazor.guard.pick import Drop
    from rlrazor.lm import compute
    from rlrazor.lm.models import Vocabulary, base_digest, is_adapter, load, tokenizer_of
    from rlrazor.lm.probes import default_cache, read_prompts
    from rlrazor.lm.sampling import NotFiniteError

    compute.prepare_process(compute.threads_alone())
    compute.leave_progress_to_us()
    asked = read_prompts(prompts)
    try:
        with compute.memory_errors(NO_MEMORY):
            own = load(base, dtype=dtype)
            digest = base_digest(own.model, law.settings.precision)
            law.check(own.model, own.tokenizer, digest)
            side = BaseSide.of(
                own.model, own.tokenizer, asked, law.generic, law.settings, cache_dir=default_cache(), digest=digest
            )
    except NotFiniteError as error:
        raise RazorError(f"The outputs of {base} are NaN or infinite: {dtype} is too coarse for them.") from error
    vocabulary, tokenizer = Vocabulary.of(own), own.tokenizer
    notes = cautions_of(side.whole, asked, law.generic, law.settings)
    del own
    told("checkpoints")

    def measure(path: Path, step: int) -> Drop:
        try:
            with compute.memory_errors(NO_MEMORY):
                adapter = path if is_adapter(path) else None
                tuned = load(base if adapter else path, adapter=adapter, dtype=dtype, tokenizer=tokenizer)
                if tuned.tokenizer is tokenizer and adapter is None and _NO_TOKENIZER not in notes:
                    notes.append(_NO_TOKENIZER)
                tokenizer_of(tuned, path, vocabulary)
                kls = kls_of(side.measure(tuned.model))
        except NotFiniteError as error:
            raise RazorError("its outputs are NaN or infinite: training has diverged there.") from error
        finally:
            told(path.name)
        return Drop.by(law, step, law.forecast(kls, prompts=asked, measured=side.whole[FORWARD]))

    return measure, notes


def _table(found: "Pick") -> Table:
    measured = found.candidates[0].measured
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint")
    table.add_column(f"{found.metric}{', less is better' if found.lower_is_better else ''}", justify="right")
    level = "" if found.level is None else f" ({found.level:.0%} interval)"
    table.add_column("measured drop, points" if measured else f"forecast drop, points{level}", justify="right")
    table.add_column("")
    shown = found.candidates if len(found.candidates) <= 30 else found.frontier
    for one in shown:
        interval = "" if measured else f" [{100 * one.low:.1f}, {100 * one.high:.1f}]"
        mark = "take this" if one == found.recommended else "on the frontier" if one in found.frontier else ""
        style = "bold" if one == found.recommended else "" if one in found.frontier else "dim"
        table.add_row(one.name, f"{one.new:.4g}", f"{100 * one.drop:.1f}{interval}", mark, style=style)
    if len(shown) < len(found.candidates):
        table.caption = f"the frontier of {len(found.candidates)} checkpoints"
    return table


def _draw(found: "Pick", folder: Path) -> None:
    import numpy as np

    from rlrazor.report import drawing
    from rlrazor.report.drawing import INK, PALETTE, Curve, Figure, Layer, Panel, Points

    def points(label: str, some: "list[int]", color: str, symbol: str, size: float) -> Points:
        own = [found.candidates[index] for index in some]
        low, drop, high = (np.array([100 * getattr(one, name) for one in own]) for name in ("low", "drop", "high"))
        x = np.array([one.new for one in own])
        return Points(label, x, drop, color, symbol, size=size, error_low=low, error_high=high)

    front = [index for index, one in enumerate(found.candidates) if one in found.frontier]
    rest = [index for index in range(len(found.candidates)) if index not in front]
    chosen = [found.candidates.index(found.recommended)]
    line = sorted(found.frontier, key=lambda one: one.new)
    layers: list[Layer] = [
        Curve("frontier", np.array([one.new for one in line]), np.array([100 * one.drop for one in line]), INK),
        points("checkpoint", rest, "#999999", "circle", 5.0),
        points("on the frontier", front, PALETTE[0], "circle", 6.0),
        points("recommended", chosen, PALETTE[1], "star", 12.0),
    ]
    kind = "measured" if found.candidates[0].measured else "forecast"
    panel = Panel(
        "Which checkpoint to take", found.metric, f"{kind} drop of the prior score, points", layers, x_percent=False,
        y_percent=False,
    )  # fmt: skip
    drawing.save(Figure("pick", [panel], columns=1), folder)
