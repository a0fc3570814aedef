"""`razor convert`: a GGUF file as a folder of safetensors, which every other command makes of it too, in the cache."""

import argparse
from pathlib import Path

from rlrazor.cli import exits
from rlrazor.cli.early import require_source
from rlrazor.cli.printing import Subparsers, print_json
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra, needs_package
from rlrazor.system.progress import doing
from rlrazor.system.terminal import Terminal


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "convert",
        help="a GGUF file as a folder of safetensors, and where that is",
        description="Print the folder of float32 safetensors that was made of a GGUF file, by its content; "
        "make it where there is none.",
    )
    parser.add_argument("gguf", metavar="FILE.gguf", help="a model that was quantised for inference")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="a folder that is not there yet (default: in the cache, by FILE's name)"
    )
    parser.add_argument("--json", action="store_true", help="print the folder as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, or find what was converted, and print the folder."""
    if not arguments.gguf.endswith(".gguf"):
        raise RazorError(f"{arguments.gguf} is not a .gguf file.")
    require_source(arguments.gguf)
    needs_extra("guard")
    needs_package("gguf", "A GGUF file")
    from rlrazor.lm import gguf

    with doing(Terminal(stderr=True), f"Converting {Path(arguments.gguf).name}"):
        folder = gguf.convert(Path(arguments.gguf), out=arguments.out)
    if arguments.json:
        print_json({"gguf": arguments.gguf, "folder": str(folder)})
    else:
        print(folder)
    return exits.DONE
