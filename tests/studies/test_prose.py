"""The studies' texts: every number is named, none is typed, and each name is that of a cell."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from test_continual import own_sequence

from rlrazor import studies
from rlrazor.report import prose
from rlrazor.report.prose import NOT_RUN, read_prose, render
from rlrazor.report.study import Study
from rlrazor.studies import engine
from study_tables import planted

TEXTS = sorted(path.stem.replace("_", "-") for path in Path(engine.__file__).parent.glob("*.md"))
TYPED = re.compile(r"\d[\d.,]*\s*(%|points?\b|nats?\b|±)")
USUAL = "95 % "  # of intervals


@pytest.mark.parametrize("name", TEXTS)
def test_no_result_is_typed(name: str) -> None:
    text = re.sub(r"\{\{.*?\}\}", "", engine.text_of(name).read_text(), flags=re.DOTALL).replace(USUAL, "")
    assert not TYPED.search(text)
    title, *_ = text.splitlines()
    assert title.startswith("# ")
    assert title.endswith("?")
    assert text.count("\n## ") >= 1


def example(name: str) -> Study:
    """The table that the paper preset leaves; a study that needs more than the usual columns plants its own."""
    if name == "own-sequence":
        return own_sequence()
    of_study = import_module(f"test_{name.replace('-', '_')}")
    own = getattr(of_study, "example", None)
    return own() if own else planted(name, lambda spec: 0.5 + 0.01 * spec.seed)


@pytest.mark.parametrize("name", TEXTS)
def test_every_name_is_that_of_a_cell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the table that the paper preset leaves; a folder with fewer runs says so instead."""
    monkeypatch.setattr(prose, "read_prose", lambda path, numbers: read_prose(path, numbers, None))
    section = studies.kinds()[name].section(example(name))
    assert "{{" not in section.question + section.note
    assert NOT_RUN not in section.note


def test_an_unknown_name_is_an_error_unless_there_is_a_word_for_it() -> None:
    assert render("It is {{ a.b }} and {{c}}.", {"a.b": "1.0 ± 0.2", "c": "better"}) == "It is 1.0 ± 0.2 and better."
    with pytest.raises(KeyError, match="c"):
        render("{{ c }}", {})
    assert render("{{ c }}", {}, NOT_RUN) == NOT_RUN


def test_typed_results_are_found() -> None:
    for typed in ("by 1.2 points", "of 3 nats", "keeps 77 %", "0.5 ± 0.1"):
        assert TYPED.search(typed)
    for fine in ("SFT-2, one of two", "arXiv:2509.23753", "1-0 REINFORCE", "Fig. 9"):
        assert not TYPED.search(fine)
