"""The options that say how KL is measured, which compare and pick share."""

import argparse
from typing import TYPE_CHECKING, Any

from rlrazor.cli.early import generic_source
from rlrazor.cli.language import stop_of
from rlrazor.errors import RazorError

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile


def add_probe(group: Any) -> None:
    """Declare them, in a parser or a group of its options."""
    group.add_argument(
        "--generic",
        type=generic_source,
        metavar="FILE|self",
        help="text that stands for what must not change; self: what the base writes from nothing (a file of that name "
        "is ./self)",
    )
    group.add_argument("--max-new-tokens", type=int, help="of a completion (default: 128)")
    group.add_argument("--samples", type=int, help="completions of each prompt (default: 1)")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="what ends one, \\n being a line end; may be repeated (default: the end of text alone)",
    )
    group.add_argument("--no-chat", action="store_true", help="do not put prompts into the chat template")
    group.add_argument("--dtype", help="float32 or bfloat16, half the memory (default: the law's, or float32)")


def probe_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the probes that were given, by their names in `ProbeSettings`."""
    own = {
        "max_new_tokens": arguments.max_new_tokens,
        "samples": arguments.samples,
        "stop": stop_of(arguments) or None,
        "chat": False if arguments.no_chat else None,
    }
    return {name: value for name, value in own.items() if value is not None}


def probe_without_law(arguments: argparse.Namespace, law: "LawFile | None") -> dict[str, Any]:
    """The same. Raises RazorError where a law says how to measure, and so does an option."""
    given = probe_given(arguments)
    if law is not None and (given or arguments.generic):
        raise RazorError("With --law, the law's own probe and settings are used: leave the others out.")
    return given


def dtype_of(given: str | None, law: "LawFile | None") -> str:
    """What models are loaded in: what was asked for, else what the law was calibrated in."""
    return given or (law.settings.precision if law is not None else None) or "float32"
