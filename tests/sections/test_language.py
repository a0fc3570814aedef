"""A language sweep's report: quadrants, representation and thresholds come from its config."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from language_tables import CONFIG, make_folder, make_table, study_of
from matched_loops import by_seed
from rlrazor.analysis import law
from rlrazor.errors import RazorError
from rlrazor.report import drawing, load, summary, write_report
from rlrazor.report.sections import representation
from rlrazor.report.study import Study
from rlrazor.studies import kinds, quadrants
from study_tables import cells, check
from test_report import text_of


def test_quadrants_come_from_the_config() -> None:
    study = study_of(make_table(), "quadrants")
    assert quadrants.applies(study)
    found = quadrants.section(study)
    check(found, "quadrants")
    [square, *_] = found.tables
    assert [[cell.split(":")[0] for cell in row] for row in square.rows] == [
        ["on-policy", "1-0 REINFORCE", "GRPO"],
        ["offline", "SFT, one answer", "SimPO"],
    ]
    assert found.finding.startswith("What each is worth in prior score kept, at new ≥ 80%: better: being on-policy (+")
    assert [header for table in found.tables for header in table.headers if header.startswith("new ≥ ")] == [
        *("new ≥ 80%", "new ≥ 90%"),
    ]
    assert not quadrants.applies(study_of(make_table(methods=["grpo", "simpo", "sft-one"])))
    assert not quadrants.applies(Study("quadrants", {}, study.table, study.points, study.bases))


def test_quadrants_take_the_first_method_there_is() -> None:
    more = {"dr-grpo": [True, True], **CONFIG["quadrants"], "sft-uniform": [False, False]}
    study = study_of(make_table(), "quadrants", quadrants=more)
    assert quadrants.quadrants_of(study) == {
        "grpo": (True, True),
        "reinforce": (True, False),
        "simpo": (False, True),
        "sft-one": (False, False),
    }
    with pytest.raises(RazorError, match="leave one of the four without a method"):
        quadrants.quadrants_of(study_of(make_table(), "quadrants", quadrants={"grpo": [True, True]}))


def test_representation_takes_families_margin_and_text_from_the_config() -> None:
    study = study_of(make_table(), "representation")
    assert representation.applies(study)
    found = representation.section(study)
    check(found, "representation")
    gap = cells(found.tables[0])["new = 80% ± 3"]
    assert [cell.split(" ± ")[0] for cell in gap[:3]] == ["0.92", "0.69", "+0.23"]
    assert gap[3:] == ["2 of 2", "better"]
    assert [panel.title for panel in found.figure.panels] == ["CKNNA at equal accuracy", "CKNNA along training"]
    assert "On 100 paragraphs." in found.note
    assert "images" not in found.note
    assert "within 3 points" in found.note
    assert "SFT: SFT, one answer, SFT, uniform." in found.note  # SimPO is not among them
    assert found.tables[1].headers[1:] == ["new = 80% ± 3", "new = 90% ± 3"]
    swapped = {"RL": CONFIG["families"]["SFT"], "SFT": CONFIG["families"]["RL"]}
    opposite = representation.section(study_of(make_table(), families=swapped))
    assert cells(opposite.tables[0])["new = 80% ± 3"][-1] == "worse"


# The page


def test_page_of_a_language_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "save", lambda figure, folder: None)  # takes seconds
    monkeypatch.setattr(law, "bootstrap", lambda *_, **__: (0.0, 1.0))  # so does this
    table = make_table(methods=["grpo", "reinforce", "simpo", "sft-one"])
    results = load(make_folder(tmp_path, table), kinds())
    names = ["learning-rates", "kl-laws", "predictors", "representation", "quadrants"]
    assert [section.name for section in results.sections] == names
    page = write_report(results).read_text()
    shown = text_of(page)
    assert "A policy that can do both pairs and prior tasks was fine-tuned on pairs alone" in shown
    assert "95.0 % on prior tasks, the mean over copy, sort." in shown
    assert "At 80 % on the new task, each method at its own learning rate, " in shown
    assert "in nats per completion, over pairs inputs only" in shown
    assert "new ≥ 80%" in shown
    assert "new ≥ 95%" not in shown
    assert not re.search(r"\bimages?\b|\bdigits?\b|\blabels? that", shown)
    assert {row["threshold"] for row in summary(results)["retention"]} == {0.8, 0.9}
    # Copying loses all that is lost, sorting nothing.
    losses = by_seed(table.filter(pl.col("method") != "base").to_dicts(), "simpo", 0.8, "forgetting")
    assert f"−{200 * np.mean(losses):.1f} ± " in shown
    assert "Change of each prior task at new ≥ 80%, points" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"thresholds": []}, "thresholds that are not accuracies"),
        ({"thresholds": [90]}, "thresholds that are not accuracies"),
        ({"families": {"RL": ["grpo"]}}, "families other than RL and SFT"),
    ],
)
def test_wrong_configs(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RazorError, match=message):
        load(make_folder(tmp_path, make_table(), **wrong))
