"""`razor report FOLDER ...`: figures and report of a run folder, or several compared; nothing is trained."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from rlrazor.cli.printing import Subparsers, print_results, print_section
from rlrazor.errors import RazorError
from rlrazor.runs.store import RunStore
from rlrazor.system import writing
from rlrazor.system.terminal import Terminal
from rlrazor.system.writing import Output


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser("report", help="rebuild the report of a run folder, or compare several")
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="the --out of a sweep; of several, a panel for each task",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the comparison of several folders goes (default: runs/comparison)",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="DIR", help="also write the analyses as DIR/findings.md, with their figures"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its tables."""
    if len(arguments.folders) > 1:
        return _compare(arguments)
    if arguments.out:
        raise RazorError("--out is for the comparison of several folders: the report of one goes into that folder.")
    from rlrazor.report import load, markdown, page, write_markdown, write_report
    from rlrazor.studies import kinds

    folder = arguments.folders[0]
    known = kinds()
    notes = markdown.outputs(arguments.markdown, known) if arguments.markdown else []
    _check(arguments, [*page.outputs(folder, known), *notes])
    with Terminal(stderr=True).status("Fitting the law and drawing the report"):
        results = load(folder, known)
        if (folder / "law.json").exists():  # of a calibration: what the law says of itself comes first
            from rlrazor.cli.law_page import with_law

            results = with_law(results)
        written = write_report(results)
        if arguments.markdown:
            write_markdown(results, arguments.markdown)
    print_results(results, written, as_json=arguments.json)
    return 0


def _check(arguments: argparse.Namespace, outputs: Iterable[Output]) -> None:
    """The tables of the folders are what is read."""
    writing.check(outputs, [path for folder in arguments.folders for path, _ in RunStore(folder).outputs])


def _compare(arguments: argparse.Namespace) -> int:
    from rlrazor.report import compare_folders, page

    if arguments.markdown:
        raise RazorError("--markdown is for the report of one folder.")
    out = arguments.out or Path("runs/comparison")
    _check(arguments, page.outputs_of_comparison(out))
    with Terminal(stderr=True).status("Comparing the folders"):
        section, written = compare_folders(arguments.folders, out)
    print_section(section, "report", written, as_json=arguments.json)
    return 0
