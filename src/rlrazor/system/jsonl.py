"""JSON Lines: a strict reader, which refuses a line that it cannot read and says where it is, and a lenient one.

Of a text only a newline ends a line: a JSON string may hold characters that `str.splitlines` takes for line ends.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.system.documents import NotJSONError, NotReadableError, loads, unreadable

Say = Callable[[str, NotReadableError], RazorError]
"""(where the line is, why it cannot be read) -> the error to raise."""


def strict(
    text: str, file: Path | str, *, say: Say = unreadable, nan: Callable[[str], Any] | None = None, torn: bool = False
) -> Iterator[tuple[str, Any]]:
    """Where each line that is not blank is, as "FILE, line 3", and what it is in JSON (`documents.loads`).

    `torn`: a last line without a newline that is no JSON is half of one, left by a process that was killed, and none.
    Raises what `say` makes of a line that cannot be read, by default a RazorError.
    """
    last = text.count("\n") + 1
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = loads(line, nan=nan)
        except NotReadableError as error:
            if torn and number == last and isinstance(error, NotJSONError):
                return
            raise say(where, error) from error
        yield where, value


def lenient(content: bytes) -> Iterator[Any]:
    """What each line is, as most readers have it, None for one that is no JSON: to tell whose a file is."""
    for line in content.splitlines():
        try:
            yield loads(line.decode(), nan=float, lenient=True)
        except ValueError:
            yield None
