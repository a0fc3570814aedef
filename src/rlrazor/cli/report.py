"""`razor report FOLDER`: rebuild every figure and the report from a run folder, without training."""

import argparse
from pathlib import Path

from rich.console import Console

from rlrazor.cli.printing import Subparsers, options_of, print_results


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser("report", help="rebuild the figures and the report of a run folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the --out of an earlier `razor reproduce`")
    parser.add_argument(
        "--markdown", type=Path, metavar="DIR", help="also write the analyses as DIR/findings.md, with their figures"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    parser.set_defaults(run=run, options=options_of(parser))


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its tables."""
    from rlrazor.report import load, write_markdown, write_report

    with Console(stderr=True).status("Fitting the law and drawing the report"):
        results = load(arguments.folder)
        page = write_report(results)
        if arguments.markdown:
            write_markdown(results, arguments.markdown)
    print_results(results, page, as_json=arguments.json)
    return 0
