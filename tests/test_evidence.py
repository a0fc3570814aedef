"""docs/evidence.md cannot drift from the results: each figure is in the page that it links to, each command in docs."""

import re
from pathlib import Path

import pytest

from rlrazor import studies

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence.md"
FIGURE = re.compile(r"\[([^][]*(?:\[[^]]*\])?)\]\(([^)#]+)#([^)]+)\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
WITHOUT = ("not run", "not run yet", "not compared", "not compared in pairs")
VERDICTS = (": **holds**", ": **does not**", ": cannot be told")
EQUAL = ("no difference", "as much", "The same with")


def rows() -> list[list[str]]:
    """The cells of the table, without its header and the rows that only divide it."""
    lines = [line for line in EVIDENCE.read_text().splitlines() if line.startswith("| ")][1:]
    return [cells for line in lines if any((cells := [cell.strip() for cell in line.strip("|").split("|")])[1:])]


def linked(page: str, anchor: str) -> str:
    """The part of a page from an anchor to the next."""
    _, mark, rest = (ROOT / "docs" / page).read_text().partition(f'<a id="{anchor}"></a>')
    assert mark, f"{page} has no {anchor}"
    return rest.partition('<a id="')[0]


FIGURES = [(row[0], cell, *found.groups()) for row in rows() for cell in row[1:5] for found in FIGURE.finditer(cell)]


def test_there_is_a_row_for_each_claim_with_a_cell_for_each_model() -> None:
    assert {len(row) for row in rows()} == {6}
    assert len(rows()) > 20
    assert len(FIGURES) > 30
    for claim, *cells, _ in rows():
        for cell in cells:
            assert cell in WITHOUT or cell.endswith(VERDICTS), claim
            assert len(FIGURE.findall(cell)) <= 1, claim
            assert cell in WITHOUT or "holds" not in cell or FIGURE.search(cell), claim


@pytest.mark.parametrize(("claim", "cell", "figure", "page", "anchor"), FIGURES)
def test_each_figure_is_in_the_page_that_it_links_to(
    claim: str, cell: str, figure: str, page: str, anchor: str
) -> None:
    section = linked(page, anchor)
    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", section) or _in_a_row(figure, section), claim
    assert "±" in figure or "[" in figure  # with its interval
    assert re.search(r"\d seeds|\d+ methods|\d+ runs?", cell)  # and of how many


def _in_a_row(figure: str, section: str) -> bool:
    """Whether a sentence has the figure's interval without the spaces of a table, as "r = 0.21 [0.03, 0.38]"."""
    return " ".join(figure.split()) in " ".join(section.split())


@pytest.mark.parametrize(("claim", "cell", "figure", "page", "anchor"), FIGURES)
def test_verdicts_on_differences_follow_from_their_intervals(
    claim: str, cell: str, figure: str, page: str, anchor: str
) -> None:
    if not (signed := re.fullmatch(r"([+−])([\d.]+) ± ([\d.]+)", figure)):
        return
    mean, half = float(signed[2]) * (1 if signed[1] == "+" else -1), float(signed[3])
    apart = abs(mean) > half
    if any(word in claim for word in EQUAL):
        within = abs(mean) + half <= 1.0 + 1e-9
        expected = "holds" if within else "does not" if apart else "cannot be told"
    else:
        expected = "holds" if apart and mean > 0 else "does not" if apart else "cannot be told"
    if "No other measure" in claim:
        expected = "does not" if apart else "cannot be told"
    assert expected in cell


def test_commands_are_those_of_the_results() -> None:
    told = (ROOT / "docs" / "results.md").read_text()
    for claim, *_, cell in rows():
        for command in re.findall(r"`(razor [^`]*)`", cell):
            analysis = re.search(r"--analysis (\S+)", command)
            assert analysis is None or analysis[1] in studies.ANALYSES, claim
            plain = re.sub(r"--analysis \S+", "--analysis all", command)
            assert command in told or plain in told, claim


def test_the_readmes_summary_is_five_sentences_without_a_figure_of_its_own() -> None:
    section = (ROOT / "README.md").read_text().partition("## What it shows\n")[2].partition("\n## ")[0]
    text = re.sub(r"\]\([^)]*\)", "]", section)
    assert len(re.findall(r"[.](?=\s|$)", text.strip())) == 5
    evidence = NUMBER.findall(EVIDENCE.read_text())
    assert set(NUMBER.findall(text)) <= set(evidence)
