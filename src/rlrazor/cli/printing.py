"""What the commands print: findings as tables for people or as JSON for machines."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table

from rlrazor.runs.records import Record
from rlrazor.system.terminal import PlainColumn, Terminal

if TYPE_CHECKING:
    from rlrazor.report import Results
    from rlrazor.report.study import Section

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


def print_results(results: "Results", report: Path, *, as_json: bool) -> None:
    """The findings on standard output, and where the report is."""
    from rlrazor.report import summary, terminal_tables

    if as_json:
        print_json({"report": str(report), **summary(results)})
        return
    console = console_for_tables()
    for table in terminal_tables(results):
        console.print(table)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def print_section(section: "Section", kind: str, path: Path, *, as_json: bool, width: int = 120) -> None:
    """A section's finding and tables, and where its `kind` is: a report or, with the note printed here, a figure."""
    from rlrazor.report.tables import to_rich

    if as_json:
        tables = [asdict(table) for table in section.tables]
        print_json({kind: str(path), "finding": section.finding, "tables": tables})
        return
    console = console_for_tables(width)
    for table in section.tables:
        console.print(to_rich(table))
    console.print(section.finding, highlight=False)
    for paragraph in section.paragraphs if kind == "figure" else ():
        console.print("\n" + paragraph.removeprefix("## "), style="dim", highlight=False)
    console.print(f"{kind.capitalize()}: {path}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print what JSON can hold, in ASCII: whatever the locale, it is valid; a number that is none is null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def console_for_tables(width: int = 120) -> Terminal:
    """Standard output; a file has no width of its own, and the tables need more than the usual guess of 80."""
    console = Terminal()
    if not console.is_terminal:
        console.width = width
    return console


@contextmanager
def steps_shown(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's standard error for so many steps; what it gives is told of each as that begins."""
    columns = (PlainColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    console = Terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def told(step: str) -> None:
            nonlocal begun
            progress.update(task, description=step, completed=begun)
            begun += 1

        yield told


def human_bytes(count: int | None) -> str:
    """`3 MB` or `1.6 GB`."""
    megabytes = (count or 0) / 1e6
    return f"{megabytes / 1e3:.1f} GB" if megabytes >= 1000 else f"{max(1, round(megabytes))} MB"


def shown(value: Any) -> str:
    """A setting as a table shows it."""
    if not isinstance(value, tuple | list):
        return str(value)
    return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value) or "none"


def print_plan(config: Any, estimate: Mapping[str, Any], what: str, *, as_json: bool) -> None:
    """What a dry run prints: the settings of a grid, and what it would take, in words or, as JSON, in numbers."""
    settings = asdict(config)
    if hasattr(config, "used"):
        settings = {name: settings[name] for name in config.used()}
    if as_json:
        print_json({"config": settings, "estimate": estimate})
        return
    table = Table(title="The grid", title_justify="left", show_header=False)
    for name in settings:
        table.add_row(name, shown(settings[name]))
    console = console_for_tables()
    console.print(table)
    console.print(f"{what} Nothing was run.", highlight=False, soft_wrap=True)


def records_table(base: Record, records: Sequence[Record]) -> Table:
    """Checkpoints below their base, scores in %, KL in nats; ±: one standard error."""
    caption = "Of the scores more is better; ±: one standard error, where there is one."
    if not base.prior:
        caption += " What was forgotten was not measured: there are no prior tasks."
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    robust = [name for name in base.prior if f"robust_{name}" in base.metrics]
    table.add_column("step")
    for header in (
        "new, %",
        *(f"{name}, %" for name in base.prior),
        *(f"{name}, any template, %" for name in robust),
        *(("prior, %",) if base.prior else ()),
        "forward KL",
        "reverse KL",
        "KL, probe",
    ):
        table.add_column(header, justify="right", overflow="fold")
    for record in (base, *records):
        errors = record.metrics
        new_errors = [errors[name] for name in ("new_greedy_stderr", "new_sampled_stderr") if name in errors]
        scores = [
            f"{100 * record.new:.1f}" + (f" ± {100 * max(new_errors):.1f}" if new_errors else ""),
            *(_with_error(100 * value, errors, f"prior_{name}_stderr", 100) for name, value in record.prior.items()),
            *(f"{100 * errors[f'robust_{name}']:.1f}" if f"robust_{name}" in errors else "—" for name in robust),
            *((_with_error(100 * record.prior_mean, errors, "prior_stderr", 100),) if record.prior else ()),
        ]
        kls = [
            _with_error(record.drift[name], errors, f"{name}_stderr", 1, digits=3) if name in record.drift else "—"
            for name in ("kl_forward", "kl_reverse", "kl_probe")
        ]
        table.add_row("base" if record is base and not record.drift else str(record.step), *scores, *kls)
    return table


def _with_error(value: float, errors: Mapping[str, float], name: str, scale: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" + (f" ± {scale * errors[name]:.{digits}f}" if name in errors else "")
