"""What the commands print: findings as tables for people or as JSON for machines."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rlrazor.report import Results

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a command, for the error that an unknown one gives."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def print_results(results: "Results", report: Path, *, as_json: bool) -> None:
    """The findings on standard output, and where the report is."""
    from rlrazor.report import summary, terminal_tables

    if as_json:
        print(json.dumps({"report": str(report), **summary(results)}, indent=2))
        return
    console = console_for_tables()
    for table in terminal_tables(results):
        console.print(table)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def console_for_tables(width: int = 120) -> Console:
    """Standard output; a file has no width of its own, and the tables need more than the usual guess of 80."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def human_seconds(seconds: float) -> str:
    """`47 s`, `2 min 5 s` or `1 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
