"""Text of other people's on a terminal: names, prompts and messages are shown as they are, and cannot act.

Square brackets are no markup, an escape sequence in a name does not reach the terminal, and what a stream's encoding
lacks is written as an escape instead of raising.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment
from rich.text import Text

# C0 but for tab and newline, DEL, C1; the marks that turn the reading direction; halves of surrogate pairs, which is
# how Python holds the bytes of a name that is not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with what acts on a terminal, or has no encoding, as escapes: `\\x1b[31m`."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Terminal(Console):
    """A console that takes text as it is. A reader that has gone raises BrokenPipeError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """What strings become, table cells too, before their width is taken."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The rest, such as `Text`, as it is drawn."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; but not the empty line that Rich ends a progress display with which nobody could see."""
        if objects or self.is_interactive:
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Rich would exit with 1, which is a finding of some commands."""
        raise BrokenPipeError


class PlainColumn(TextColumn):
    """A column of a progress display whose text is no markup."""

    def __init__(self, text_format: str, style: str = "none") -> None:
        super().__init__(text_format, style=style, markup=False)


def never_fail_to_encode() -> None:
    """From here on, what the encoding of standard output or error lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def shown_on(stream: TextIO | None, text: str) -> str:
    """The text as it can be printed there, without changing the stream, which may not be ours."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard error by default, whatever is in it; where nobody listens, that is that."""
    stream = stream or sys.stderr
    with suppress(OSError, ValueError, AttributeError):  # full; closed; none
        print(shown_on(stream, text), file=stream, flush=True)
