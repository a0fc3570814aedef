"""The text of a section: a Markdown file whose numbers are named, never typed.

    # The question, which is the title

    Why it is asked: paragraphs.

    ## What to make of it

    Paragraphs, in which `{{ grpo.sgd.verdict }}` stands for a cell of the section's tables.

What stands there has to be true whatever the numbers say: a verdict follows a colon, as in "GRPO with SGD: {{ ... }}",
since it may be any of the four. Paragraphs are plain text, with no markup but headings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = "not run"
_KEY = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)


@dataclass(frozen=True)
class Prose:
    """The parts of a section that a person wrote."""

    title: str
    question: str
    note: str


def render(text: str, numbers: Mapping[str, str], absent: str | None = None) -> str:
    """The text with its numbers; for a key that is unknown `absent`, as of an arm that was not run.

    Without `absent` such a key raises KeyError.
    """
    return _KEY.sub(lambda key: numbers[key[1]] if absent is None else numbers.get(key[1], absent), text)


def read_prose(path: Path, numbers: Mapping[str, str], absent: str | None = NOT_RUN) -> Prose:
    """The file's text with its numbers."""
    title, _, rest = render(path.read_text("utf-8"), numbers, absent).partition("\n")
    question, heading, note = rest.partition("\n## ")
    return Prose(title.removeprefix("# "), " ".join(question.split()), (heading + note).strip())
