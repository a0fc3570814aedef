"""The texts of the report's own sections: every number is named, none is typed, and each name is that of a cell."""

import re
from pathlib import Path

import polars as pl
import pytest
from test_forecasts import study as of_forecasts
from test_kept_representation import study_of as of_families
from test_kept_representation import with_probe

from language_tables import make_table, study_of
from rlrazor.report import prose, sections, side_by_side
from rlrazor.report.prose import NOT_RUN, read_prose
from rlrazor.report.sections import kl_laws
from rlrazor.report.study import Section, Study

FOLDER = Path(sections.__file__).parent
TEXTS = [*sorted(FOLDER.glob("*.md")), side_by_side.TEXT]
TYPED = re.compile(r"\d[\d.,]*\s*(%|points?\b|nats?\b|±)")
USUAL = "95 % "  # of intervals


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_no_result_is_typed(path: Path) -> None:
    text = re.sub(r"\{\{.*?\}\}", "", path.read_text(), flags=re.DOTALL).replace("95 %\n", USUAL).replace(USUAL, "")
    assert not TYPED.search(text)
    assert text.splitlines()[0].endswith("?")


def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "read_prose", lambda path, numbers: read_prose(path, numbers, None))


def test_every_name_is_that_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    strict(monkeypatch)
    told: list[Section] = [kl_laws.section(study_of(make_table()), 0)]
    told += [sections.build(study_of(make_table(), name)) for name in ("predictors", "representation")]
    told.append(sections.build(of_families(with_probe({"grpo": 0.1, "sft-1": 0.4}))))
    for section in told:
        assert "{{" not in section.question + section.note
        assert NOT_RUN not in section.note


def test_every_name_of_forecasts_is_that_of_a_cell_of_a_folder_with_both_families(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strict(monkeypatch)
    one = of_forecasts()
    tables = [one.table, one.points, one.bases]
    table, points, bases = (table.vstack(table.with_columns(family=pl.lit("parity-mnist"))) for table in tables)
    section = sections.build(Study(one.name, one.description, table, points, bases))
    assert "{{" not in section.question + section.note
