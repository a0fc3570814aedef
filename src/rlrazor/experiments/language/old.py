"""Old examples: text that stands for what must not be lost, which methods train on or measure weights by."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import TINY
from rlrazor.experiments.language.methods import EWC, LWF, REPLAY, SELF_REPLAY, protection_of
from rlrazor.lm.prompts import check_text
from rlrazor.system.rows import read_located

READS = (REPLAY, EWC, LWF)  # methods that take a file of old examples
NEEDS = (REPLAY, EWC)  # ... and those that cannot do without, where nothing else is old


@dataclass(frozen=True)
class OldText:
    """A completion with its prompt, or without one a text of which every token counts."""

    completion: str
    prompt: str | None = None


def read_old(path: Path) -> list[OldText]:
    """The examples of a file of rows with prompt and completion, or with text, or of a text file with a text a line.

    Repeated ones are dropped. Raises RazorError for a file that is missing, empty or damaged, and for a row that lacks
    its text, saying which.
    """
    found: dict[OldText, None] = {}
    for where, row in read_located(path, line="text"):
        if "text" in row:
            check_text(row["text"], where)
            found[OldText(row["text"])] = None
            continue
        for name in ("prompt", "completion"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise RazorError(
                    f"{where}: an old example is `text`, or `prompt` and `completion`, each of them text; this row has "
                    f"{', '.join(row)}."
                )
        found[OldText(row["completion"], row["prompt"])] = None
    return list(found)


def check_old(path: Path | None, methods: Iterable[str], base: str, *, alone: bool) -> None:
    """Raise RazorError where methods need old examples and there are none, or the file's would be left unused.

    `alone`: on one task; in a sequence there are those of the stages before. The tiny base has some of its own.
    """
    names = list(methods)
    if path is not None and not any(protection_of(name) in READS for name in names):
        raise RazorError(f"--old-examples is for the methods {', '.join(READS)}, and none of these is one.")
    if path is None and alone and base != TINY:
        for name in names:
            if protection_of(name) in NEEDS:
                raise RazorError(
                    f"{name} needs examples of what must not be lost: give --old-examples FILE, or take a method that "
                    f"writes its own, such as {SELF_REPLAY}."
                )
