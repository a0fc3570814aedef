"""`razor theory`: is RL a projection? The paper's Fig. 5 and its numbers, without training anything."""

import argparse
import json
import shlex
from pathlib import Path

from rlrazor.cli.outputs import check_outputs
from rlrazor.cli.printing import Subparsers, print_section
from rlrazor.system.progress import doing
from rlrazor.system.terminal import Terminal


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "theory",
        help="where the paper's projections end, and where policy gradient does",
        description="Compute the alternation of the paper's two projections, SFT, and policy gradient on small finite "
        "sets, against a convex solver; draw the paths on the simplex.",
    )
    parser.add_argument("--preset", default="quick", help="quick (seconds, the default) or paper (minutes)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, comma-separated (default: 0,1,2)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/theory"), help="default: runs/theory")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compute, write the figure and theory.json, print the tables."""
    # Imported here: the report's libraries take a second that `razor --version` should not.
    from rlrazor.experiments.parity_mnist.config import parse_setting
    from rlrazor.report import drawing, sections
    from rlrazor.report.study import Study
    from rlrazor.studies import kinds, theory
    from rlrazor.system.writing import atomic_path

    seeds = list(parse_setting("seeds", arguments.seeds))
    theory.check(arguments.preset, seeds)
    path = arguments.out / f"{theory.NAME}.json"
    check_outputs(arguments, [(path, "json"), *drawing.files([theory.NAME], arguments.out)])
    with atomic_path(path) as partial:
        with doing(Terminal(stderr=True), "Computing the theory"):
            found = theory.theory_study(arguments.preset, seeds)
        description = theory.describe(found, arguments.preset, seeds, shlex.join(["razor", *arguments.argv]))
        partial.write_text(json.dumps(description, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    section = sections.build(Study(theory.NAME, description), kinds())
    drawing.save(section.figure, arguments.out)
    path = arguments.out / f"{section.figure.name}.png"
    print_section(section, "figure", path, as_json=arguments.json, width=140)
    return 0
