"""The text of a section: a Markdown file whose numbers are named, never typed.

    # The question, which is the title

    Why it is asked: paragraphs.

    ## What to make of it

    Paragraphs, in which `{{ grpo.sgd.verdict }}` stands for a cell of the section's tables.

What stands there has to be true whatever the numbers say: a verdict follows a colon, as in "GRPO with SGD: {{ ... }}",
since it may be any of the four. Paragraphs are plain text, with no markup but headings.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlrazor.report.drawing import Figure
from rlrazor.report.keyed import Keyed, numbers_of
from rlrazor.report.study import Section, Study
from rlrazor.report.text import how_many

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


@dataclass(frozen=True)
class Shown:
    """What a section shows beside its text; `numbers` are those of the text that no cell of the tables has."""

    finding: str
    figure: Figure
    tables: Sequence[Keyed]
    numbers: Mapping[str, str] = field(default_factory=dict)


def told(study: Study, path: Path, shown: Shown, below: str = "") -> Section:
    """A section: the text of `path`, which is called as the section, around what it shows; `below` is more of the text.

    `{{ checkpoints }}`, `{{ runs }}`, `{{ methods }}` and `{{ seeds }}` are counts, `{{ made-of }}` tells all of them.
    """
    runs = study.points["trajectory"].n_unique() if "trajectory" in study.points.columns else 0
    sizes = {"checkpoint": len(study.points), "run": runs, "method": len(study.methods), "seed": len(study.seeds)}
    counts = {f"{noun}s": f"{count:,}" for noun, count in sizes.items()}
    made_of = "{}, {} of {}, {}".format(*(how_many(count, noun) for noun, count in sizes.items()))
    numbers = {**counts, "made-of": made_of, **shown.numbers, **numbers_of(shown.tables)}
    prose = read_prose(path, numbers)
    note = "\n\n".join(filter(None, (prose.note, render(below, numbers))))
    name, tables = path.stem.replace("_", "-"), [one.table for one in shown.tables]
    return Section(name, prose.title, prose.question, shown.finding, shown.figure, tables, note)
