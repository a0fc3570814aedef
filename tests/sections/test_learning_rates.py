"""Methods at matched score with their curves over learning rates: planted, so that every number is known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import matched_loops
from rlrazor.analysis import law
from rlrazor.report import drawing, keyed, load, summary, write_markdown, write_report
from rlrazor.report.drawing import Points
from rlrazor.report.rates import NOT_TUNED, ONE_SEED, Line, Rates
from rlrazor.report.sections import KINDS, learning_rates
from rlrazor.report.sections.learning_rates import applies, section
from rlrazor.report.study import Study
from study_tables import BASE_PRIOR, NEWS, cells, check, plus_minus, run, study_of
from test_report import CONFIG, make_folder, text_of

RATES = (1e-4, 2e-4, 4e-4)
JITTER = (0.0, 0.01, -0.02)
Kept = Mapping[str, Sequence[float | None]]


def study(kept: Kept, seeds: int = 3, low: tuple[tuple[str, float, int], ...] = ()) -> Study:
    """Method -> prior accuracy at 95 % at each learning rate; None: it does not get there, `low` not in that seed."""
    rows: list[dict[str, Any]] = []
    for method, by_rate in kept.items():
        for lr, prior in zip(RATES, by_rate, strict=False):
            for seed in range(seeds):
                short = prior is None or (method, lr, seed) in low
                own = (prior or 0.5) + JITTER[seed] * (1 if method == "grpo" else 2)
                rows += run(method, seed, lr=lr, prior=own, news=(0.92, 0.94) if short else NEWS)
    return study_of("learning-rates", rows)


def numbers_of(of: Study) -> dict[str, str]:
    lines = {name: Line((name,), name, ("#000000", "circle")) for name in of.methods}
    rates = Rates(of.points, ("method",), 0.95, lines)
    return keyed.numbers_of([learning_rates.kept_table(of, rates), *rates.tables])


EXAMPLE = {"grpo": (0.5, 0.6, None), "sft-2": (0.3, 0.35, 0.4), "sft-1": (None, None, None)}


def test_each_method_has_its_own_learning_rate_and_the_curve_stands_beside_it() -> None:
    planted = study({**EXAMPLE, "grpo": (0.6, 0.5, None)})
    found = section(planted)
    check(found, "learning-rates")
    own = [0.6 + jitter for jitter in JITTER]
    other = [0.4 + 2 * jitter for jitter in JITTER]
    table = cells(found.tables[0])
    assert found.tables[0].title == "At new ≥ 97%"  # the highest that all reach which reach any
    at_97 = [[value - 0.1 * 0.02 for value in of] for of in (own, other)]
    assert table["GRPO"][:2] == [plus_minus(at_97[0]), plus_minus([BASE_PRIOR - value for value in at_97[0]])]
    assert table["GRPO"][3:] == ["3", "97.0 ± 0.0", "1.0e-04", "3", "3"]
    assert table["SFT-2"][0] == plus_minus(at_97[1])
    assert table["SFT-2"][5:] == ["4.0e-04", "3", "3"]
    assert table["SFT-1"] == ["—", "—", "—", "—", "—", "—", "3", "3"]
    gaps = [first - second for first, second in zip(*at_97, strict=True)]
    assert cells(found.tables[1])["SFT-2"] == [f"−{plus_minus(gaps)}", "3", "worse"]
    assert found.finding == (
        f"Prior score kept at new ≥ 97%, learning rates tuned, against GRPO’s: worse: SFT-2 (−{plus_minus(gaps)} "
        "points); not comparable: SFT-1."
    )
    drops, news = (cells(table) for table in found.tables[2:])
    assert found.tables[2].headers == ["learning rate", "1.0e-04", "2.0e-04", "4.0e-04"]
    assert drops["GRPO"] == [
        plus_minus([BASE_PRIOR - value for value in at_97[0]]),
        plus_minus([BASE_PRIOR - value + 0.1 for value in at_97[0]]),
        "—",
    ]
    assert drops["SFT-1"] == ["—"] * 3
    assert news["GRPO"] == ["97.3 ± 0.0", "97.3 ± 0.0", "94.0 ± 0.0"]


def test_panels_show_what_is_not_reached_as_such(tmp_path: Path) -> None:
    planted = study({"grpo": (0.6, 0.5, None), "sft-2": (0.3, 0.35, 0.4)}, low=(("sft-2", 1e-4, 1),))
    figure = section(planted).figure
    forgotten, reached = figure.panels
    assert forgotten.x.log
    shown = [layer for layer in forgotten.layers if isinstance(layer, Points)]
    by_label = {label: [layer for layer in shown if layer.label == label] for label in {layer.label for layer in shown}}
    [grpo] = by_label["GRPO"]
    assert len(grpo.x) == 2
    assert grpo.y == pytest.approx([BASE_PRIOR - 0.598 + 0.01 / 3, BASE_PRIOR - 0.498 + 0.01 / 3])
    assert grpo.x == pytest.approx(RATES[:2], rel=0.2)  # beside SFT-2's, not on them
    some = by_label["in some of the seeds only"]
    assert [len(layer.x) for layer in some] == [0, 1]
    assert some[1].y == pytest.approx([BASE_PRIOR - 0.298 + 0.02])
    absent = by_label[""]
    assert [len(layer.x) for layer in absent] == [1, 0]
    assert forgotten.y.range
    assert absent[0].y[0] < min(grpo.y)
    lines = {layer.label: layer for layer in reached.layers}
    assert lines["GRPO"].y == pytest.approx([0.973, 0.973, 0.94])
    assert set(lines["new = 97%"].y) == {0.97}
    drawing.save(figure, tmp_path)
    assert (tmp_path / "learning-rates.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_what_loops_find() -> None:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for method in ("grpo", "sft-2", "simpo"):
        for lr in RATES:
            for seed in range(3):
                news = np.sort(rng.uniform(0.92, 0.98, size=5))
                rows += run(method, seed, lr=lr, news=news.tolist(), prior=float(rng.uniform(0.3, 0.7)))
    planted = study_of("learning-rates", rows)
    found, loops = numbers_of(planted), matched_loops.reported(planted.points.to_dicts(), 0.95)
    for method in planted.methods:
        own = [loops[method, seed] for seed in range(3)]
        assert found[f"{method}.prior"] == plus_minus([row["prior"] for row in own])
        assert found[f"{method}.stopped"] == plus_minus([row["new"] for row in own])
        assert found[f"{method}.lr"] == ", ".join(f"{lr:.1e}" for lr in sorted({row["lr"] for row in own}))
        alone = [row for row in planted.points.to_dicts() if (row["method"], row["lr"]) == (method, 2e-4)]
        there = matched_loops.reported(alone, 0.95)
        drops = [there[method, seed]["forgetting"] for seed in range(3) if (method, seed) in there]
        if len(drops) == 3:
            assert found[f"{method}.drop-0.0002"] == plus_minus(drops)
        else:
            assert found[f"{method}.drop-0.0002"].endswith("of 3 seeds)")


def test_what_is_unfair_is_said() -> None:
    assert section(study(EXAMPLE, seeds=1)).finding.endswith(ONE_SEED)
    once = study({"grpo": (0.6,), "sft-2": (0.4,)})
    assert section(once).finding.endswith(NOT_TUNED)
    uneven = section(study({"grpo": (0.6, 0.5), "sft-2": (0.4,)}))
    assert uneven.finding.endswith("The budgets differ, by runs in a seed. 2: GRPO; 1: SFT-2.")
    rows = study(EXAMPLE).points.filter(~((pl.col("seed") == 1) & (pl.col("lr") == 4e-4))).to_dicts()
    assert "2 to 3" not in section(study_of("learning-rates", rows)).finding  # all alike
    assert cells(section(study_of("learning-rates", rows)).tables[0])["GRPO"][-1] == "2 to 3"


def test_nothing_to_compare_and_one_method() -> None:
    nothing = section(study({"grpo": (None,), "sft-2": (None, None)}))
    assert nothing.finding == "Nothing can be compared: no method gets to new ≥ 95% in all seeds, above the base."
    check(nothing, "learning-rates")
    alone = study({"sft-2": (0.4, 0.5)})
    kept = plus_minus([0.498 + 2 * jitter for jitter in JITTER])
    assert section(alone).finding == f"Prior score kept at new ≥ 97%, learning rate tuned, by SFT-2: {kept} %."


def test_it_is_for_sweeps_of_several_learning_rates_alone() -> None:
    assert applies(study(EXAMPLE))
    assert not applies(study({"grpo": (0.6,), "sft-2": (0.4,)}))
    stages = study(EXAMPLE)
    staged = Study("x", {}, stages.table.with_columns(stage=1), stages.points, stages.bases)
    assert not applies(staged)


def test_page_markdown_and_json_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "bootstrap", lambda *_, **__: (0.0, 1.0))  # takes seconds
    monkeypatch.setattr(drawing, "save", lambda figure, folder, **_: None)  # so does this; a test above looks at a file
    planted = study(EXAMPLE)
    folder = make_folder(tmp_path / "out", planted.table)
    config = {**CONFIG, "labels": planted.description["labels"], "drift": ["kl_forward"]}
    (folder / "config.json").write_text(json.dumps(config))
    results = load(folder, {"learning-rates": KINDS["learning-rates"]})
    own = section(planted)
    [found] = results.sections
    assert (found.finding, found.tables) == (own.finding, own.tables)
    assert own.finding in text_of(write_report(results).read_text())
    notes = write_markdown(results, tmp_path / "docs").read_text()
    assert "![Which method keeps most" in notes
    assert "(findings/learning-rates.png)" in notes
    tables = json.loads(json.dumps(summary(results)))["sections"]["learning-rates"]["tables"]
    assert tables[0]["rows"][0] == list(own.tables[0].rows[0])
