"""What a command will write, held against what it reads, before it computes anything."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from rlrazor.cli.early import TINY
from rlrazor.errors import RazorError
from rlrazor.lm.task_names import WORDS
from rlrazor.system import writing
from rlrazor.system.documents import is_utf8
from rlrazor.system.writing import Output

_INPUTS = (
    *("prompts", "law", "generic", "old_examples", "data", "demonstrations", "data_mirror", "config", "data_dir"),
    *("adapter", "base", "tuned", "model", "log"),
)


def inputs_of(arguments: argparse.Namespace) -> list[Path | str]:
    """The files and folders that a command's options name to be read; a hub id may be among them."""
    words = {"generic": WORDS}
    found = [
        value
        for name in _INPUTS
        if (value := getattr(arguments, name, None)) is not None and value not in words.get(name, (TINY,))
    ]
    file, _, function = (getattr(arguments, "verifier", None) or "").rpartition(":")
    return [*found, file] if file and function else found


def check_outputs(arguments: argparse.Namespace, outputs: Iterable[Output]) -> None:
    """Raise RazorError where one of these may not be written; see `writing.check`."""
    writing.check(outputs, inputs_of(arguments))


def check_run_folder(arguments: argparse.Namespace, out: Path, more: Iterable[Output] = ()) -> None:
    """The same for the folder of an experiment, its tables, its report, its figures, and `more`."""
    from rlrazor.report import page
    from rlrazor.runs.store import RunStore
    from rlrazor.studies import PAGE

    check_folder(arguments, out)
    check_outputs(arguments, (*RunStore(out).outputs, *page.outputs(out, PAGE), *more))


def check_folder(arguments: argparse.Namespace, out: Path) -> None:
    """Raise RazorError where the folder of runs is one that is read, or one that models cannot be saved in."""
    if not is_utf8(str(out)):
        raise RazorError(f"{out} is not UTF-8, and what saves models takes no other names: choose another --out.")
    writing.check_folder(out, inputs_of(arguments))
