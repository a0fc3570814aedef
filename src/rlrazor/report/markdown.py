"""The sections of a report as one Markdown file with its figures beside it: for a repository or a pull request."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.report import drawing
from rlrazor.report.results import Results
from rlrazor.report.sections import KINDS
from rlrazor.report.study import Section
from rlrazor.report.tables import Table
from rlrazor.system.terminal import printable
from rlrazor.system.writing import NOTES, Output, write_text

_MARKUP = re.compile(r"[\\`*_\[\]<>|~$&#!]")
DPI = 110  # half of the report's own: these figures are kept in a repository


def write_markdown(results: Results, folder: Path) -> Path:
    """Write findings.md and findings/NAME.png into `folder`; return the page's path.

    Raises RazorError when there is no section to write, or the folder cannot be written.
    """
    if not results.sections:
        raise RazorError(f"{results.folder} holds no analysis to write: run `razor reproduce ... --analysis` first.")
    for section in results.sections:
        drawing.save(section.figure, folder / "findings", kinds=("png",), dpi=DPI)
    path = folder / "findings.md"
    write_text(path, "\n".join(_page(results)) + "\n", "notes")
    return path


def outputs(folder: Path, names: Iterable[str] = KINDS) -> list[Output]:
    """The files that `write_markdown` may write into a folder; `names` are those of the sections it may have."""
    return [(folder / "findings.md", "notes"), *drawing.files(names, folder / "findings", kinds=("png",))]


def _page(results: Results) -> Iterator[str]:
    yield "# Findings\n"
    runs = zip(results.sections, results.studies, strict=True)
    commands = dict.fromkeys(str(study.description["command"]) for _, study in runs)
    yield f"{NOTES} from a folder that these commands made:\n"
    yield "```sh\n" + "\n".join(commands) + "\n```\n"
    for section in results.sections:
        yield f"- [{section.title}](#{section.name})"
    for section in results.sections:
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield f'\n<a id="{section.name}"></a>\n\n## {section.title}\n'
    yield f"*{_plain(section.question)}*\n"
    yield f"**{_plain(section.finding)}**\n"
    yield f"![{section.title}](findings/{section.figure.name}.png)\n"
    for table in section.tables:
        yield from _table(table)
    for paragraph in section.paragraphs:
        heading = paragraph.startswith("## ")
        yield f"{'#' if heading else ''}{_plain(paragraph)}\n"


def _table(table: Table) -> Iterator[str]:
    yield f"{_plain(table.title)}:\n"
    yield _row(map(_cell, table.headers))
    yield "|" + "---|" * len(table.headers)
    yield from (_row(map(_words if table.words else _cell, row)) for row in table.rows)
    yield ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _words(text: str) -> str:
    """Text that may be anybody's, such as a question of a prior task: no sign in it is markup."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def _plain(text: str) -> str:
    """Text whose asterisks, as in q*, are no emphasis."""
    return printable(text).replace("*", "\\*")
