"""The engine on tables that are planted: better, worse, no difference, one seed, an arm that never gets there."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from rlrazor.analysis.statistics import Estimate, Standing, verdict
from rlrazor.report import keyed
from rlrazor.report.drawing import save
from rlrazor.report.keyed import Column, Judged, Keyed, Value, gap, in_short, table_of
from rlrazor.report.study import Study
from rlrazor.report.text import written
from rlrazor.studies import engine, panels
from rlrazor.studies.engine import Against, Arms, ArmStudy, Compared
from rlrazor.studies.grids import Grid
from rlrazor.studies.tables import ArmGroup, best_table, law_table, rank_table, shared_law
from study_tables import NEWS, cells, mean_and_half, run, study_of

SPREAD = {"a": (0.0, 0.01, -0.01), "b": (0.004, -0.004, 0.002)}


def grids(quick: bool) -> list[Grid]:
    return [Grid(("grpo",), (1e-4,))]


CURVES = ["Forgotten at new ≥ 95% (triangle at the edge: never there)", "How far each learning rate gets"]
ALL = [panels.kept(str), panels.trade_off, panels.trade_off_of_methods, panels.learning, panels.forgetting_law]
TOY = ArmStudy(
    "toy",
    grids,
    Arms(("method", "setting"), label=lambda study, arm: f"{study.label(arm[0])} {arm[1]}"),
    against=[Against("a’s", {"setting": "a"}), Against("SFT-2’s", {"method": "sft-2"}, "sft")],
    panels=[*ALL, panels.ranked],
    tables=[
        law_table("setting", str.upper),
        rank_table,
        best_table([ArmGroup("best", "GRPO", lambda arm: arm[0] == "grpo")], {"SFT-2 a": ("sft-2", "a")}),
    ],
)


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "toy.md"
    path.write_text("# A toy?\n\nWhy\nso.\n\n## What\n\nIt is {{ grpo.b.verdict }} by {{ grpo.b.gap }}.\n")
    monkeypatch.setattr(engine, "text_of", lambda name: path)
    return path


def study(prior: dict[tuple[str, str], float], seeds: int = 3, low: tuple[Any, ...] = ()) -> Study:
    """(method, setting) -> prior accuracy at 95 %; the arm and seed `low` does not learn."""
    rows: list[dict[str, Any]] = []
    for (method, setting), kept in prior.items():
        for seed in range(seeds):
            news = (0.92, 0.94) if low in ((method, setting, seed), (method, setting)) else NEWS
            for lr in (1e-4, 2e-4):
                at = kept + 0.05 * seed + SPREAD[setting][seed] - 100 * lr  # a seed's base is worth as much to all
                rows += run(method, seed, lr=lr, news=news, prior=at, kl=2 - kept, params={"setting": setting})
    return study_of("toy", rows)


PRIOR = {("grpo", "a"): 0.5, ("grpo", "b"): 0.6, ("sft-2", "a"): 0.4, ("sft-2", "b"): 0.4}


def best(table: pl.DataFrame, arm: tuple[str, str], seed: int, column: str = "prior", at: float = 0.95) -> float:
    """By a loop: `column` of the first checkpoint that keeps most at new >= `at`.

    That is what is reported as well: prior falls with every checkpoint, and the lower rate is better in every seed.
    """
    rows = [row for row in table.to_dicts() if (row["method"], row["setting"], row["seed"]) == (*arm, seed)]
    chosen = max((row for row in rows if row["new"] >= at), key=lambda row: row["prior"])
    return float(chosen[column])


def numbers(of: Study) -> dict[str, str]:
    return keyed.numbers_of(TOY.tables_of(Compared.make(of, TOY.arms, TOY.at)))


def per_cent(values: list[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def test_every_cell_is_what_a_loop_finds() -> None:
    planted = study(PRIOR)
    found = numbers(planted)
    for arm in PRIOR:
        kept, kl, drop = (
            [best(planted.points, arm, seed, column) for seed in range(3)]
            for column in ("prior", "kl_forward", "forgetting")
        )
        key = ".".join(arm)
        assert found[f"{key}.prior"] == per_cent(kept)
        assert found[f"{key}.drop"] == per_cent(drop)
        assert found[f"{key}.kl"] == "{:.2f} ± {:.2f}".format(*mean_and_half(kl))
        assert found[f"{key}.n"] == "3"
        assert found[f"{key}.at-97"] == per_cent([best(planted.points, arm, seed, at=0.97) for seed in range(3)])
        assert found[f"{key}.best-new"] == f"{100 * max(NEWS):.1f}"


@pytest.mark.parametrize(
    ("of_b", "expected"), [(0.6, "better"), (0.4, "worse"), (0.5, "cannot be told"), (0.515, "cannot be told")]
)
def test_verdicts_are_those_of_a_paired_t_test(of_b: float, expected: str) -> None:
    planted = study({**PRIOR, ("grpo", "b"): of_b})
    own, reference = ([best(planted.points, ("grpo", name), seed) for seed in range(3)] for name in "ba")
    told = stats.ttest_rel(own, reference).pvalue < 0.05
    assert told == (expected in ("better", "worse"))
    found = numbers(planted)
    assert found["grpo.b.verdict"] == expected
    gap = float(np.mean(np.subtract(own, reference)))
    assert found["grpo.b.gap"].startswith(f"{'+' if gap >= 0.0005 else ''}{100 * gap:.1f}".replace("-", "−"))
    # The seeds' own spread, five points from one to the next, is in both and cancels.
    assert float(found["grpo.b.gap"].split("± ")[1]) < 5 < float(found["grpo.b.prior"].split("± ")[1])


def test_each_comparison_has_its_own_reference() -> None:
    found = numbers(study(PRIOR))
    assert (found["grpo.b.sft.verdict"], found["grpo.a.sft.verdict"]) == ("better", "better")
    assert found["sft-2.b.verdict"] == "cannot be told"
    assert "grpo.a.verdict" not in found  # the reference itself
    assert "sft-2.a.sft.verdict" not in found
    assert found["grpo.b.sft.kl-gap"] == "−0.20 ± 0.00"


def test_one_seed_tells_nothing() -> None:
    section = TOY.section(study(PRIOR, seeds=1))
    assert section.finding == (
        "Prior score kept at new ≥ 95% against a’s: cannot be told: GRPO b (+10.4 points), SFT-2 b (+0.4 points). "
        "With one seed each learning rate is chosen on the score shown, which flatters, most who was tried at most."
    )
    assert not any("±" in cell for table in section.tables for row in table.rows for cell in row)


def test_an_arm_that_misses_a_seed_is_not_comparable(tmp_path: Path) -> None:
    planted = study(PRIOR, low=("grpo", "b", 1))
    found = numbers(planted)
    assert found["grpo.b.n"] == "2 of 3"
    assert found["grpo.b.verdict"] == found["grpo.b.sft.verdict"] == "not comparable"
    kept = [best(planted.points, ("grpo", "b"), seed, at=0.97) for seed in (0, 2)]
    assert found["grpo.b.at-97"].startswith(f"{100 * np.mean(kept):.1f} ± ")
    assert found["grpo.b.at-97"].endswith(" (2 of 3 seeds)")  # a mean over the lucky ones says so
    assert found["best.arm"] == "GRPO a"  # though b keeps more in the seeds that got there
    absent = TOY.section(study(PRIOR, low=("grpo", "b")))
    assert "not comparable: GRPO b." in absent.finding
    [marks] = [layer for layer in absent.figure.panels[-3].layers if layer.label.startswith("never")]
    assert marks.x.size == 1
    save(absent.figure, tmp_path)


def test_nothing_is_compared_below_the_threshold_or_the_base() -> None:
    rows = [{**row, "new": row["new"] - 0.1} for row in study(PRIOR).points.to_dicts()]
    section = TOY.section(study_of("toy", rows, base_new=0.8))
    assert section.finding.startswith("Nothing can be compared: no arm reaches a new score of 95% in all seeds")
    assert {row[-1] for table in section.tables[2:4] for row in table.rows} == {"not comparable"}
    assert [panel.title for panel in section.figure.panels][:1] == ["Trade-off"]
    above = TOY.section(study_of("toy", study(PRIOR).points.to_dicts(), base_new=0.96))
    assert above.finding.startswith("Nothing can be compared")


def test_the_text_gets_its_numbers_and_the_section_its_parts(tmp_path: Path) -> None:
    planted = study(PRIOR)
    section, found = TOY.section(planted), numbers(planted)
    assert (section.name, section.title, section.question) == ("toy", "A toy?", "Why so.")
    first, second, made_of = section.paragraphs
    assert (first, second) == ("## What", f"It is better by {found['grpo.b.gap']}.")
    assert made_of.startswith("168 checkpoints, 24 runs of 2 methods, 3 seeds.")
    assert section.finding == (
        f"Prior score kept at new ≥ 95% against a’s: better: GRPO b ({found['grpo.b.gap']} points); "
        f"cannot be told: SFT-2 b ({found['sft-2.b.gap']} points)."
    )
    assert all(len(row) == len(table.headers) for table in section.tables for row in table.rows)
    assert cells(section.tables[0])["GRPO b"][0] == found["grpo.b.prior"]
    titles = ["Kept at new ≥ 95%", "Trade-off", "Trade-off", "Learning against drift", "Forgetting law"]
    assert [panel.title for panel in section.figure.panels] == [*titles, "Kept at new ≥ 95%", *CURVES]
    assert all(any(layer.x.size for layer in panel.layers) for panel in section.figure.panels)
    save(section.figure, tmp_path)


def test_best_of_a_group_and_rank_over_the_arms() -> None:
    planted = study(PRIOR)
    found = numbers(planted)
    assert (found["best.arm"], found["best.prior"]) == ("GRPO b", found["grpo.b.prior"])
    gaps = [best(planted.points, ("grpo", "b"), s) - best(planted.points, ("sft-2", "a"), s) for s in range(3)]
    assert found["best.sft-2.a.gap"] == f"+{per_cent(gaps)}"
    assert found["best.sft-2.a.verdict"] == "better"
    kept, kl = (
        [np.mean([best(planted.points, arm, seed, column) for seed in range(3)]) for arm in PRIOR]
        for column in ("prior", "kl_forward")
    )
    rank = stats.spearmanr(kept, kl).statistic
    assert float(found["ranks.correlation"].replace("−", "-")) == pytest.approx(rank, abs=0.005)
    assert found["ranks.arms"] == "4"


def test_one_law_for_all_and_what_is_beyond_it() -> None:
    rows = study(PRIOR).points.to_dicts()
    for row in rows:  # b forgets a tenth more than the law of a
        row["kl_forward"] = 10 * (row["forgetting"] - (0.1 if row["setting"] == "b" else 0.0))
    planted = study_of("toy", rows)
    shared = shared_law(planted.points).quadratic
    assert shared
    x, y = (planted.points[name].to_numpy() for name in ("kl_forward", "forgetting"))
    left = y - np.polyval(np.polyfit(x, y, 2), x)
    assert shared.r2 == pytest.approx(1 - np.var(left) / np.var(y))
    is_b, seed = (planted.points["setting"] == "b").to_numpy(), planted.points["seed"].to_numpy()
    of_b = [float(left[is_b & (seed == at)].mean()) for at in range(3)]
    found = numbers(planted)
    assert found["law.b.beyond"] == f"+{per_cent(of_b)}"
    assert found["law.a.beyond"].startswith("−")
    error = np.abs(np.polyval(np.polyfit(x[~is_b], y[~is_b], 2), x[is_b]) - y[is_b]).mean()
    assert found["law.b.error"] == f"{100 * error:.1f}"
    assert found["law.r2"] == f"{shared.r2:.2f}"


def test_names_of_numbers_stand_for_one_cell() -> None:
    table = Keyed("t", "", {"x": "X"}, {"row": ("Row", {"x": "1"}), "": ("All", {"x": "2"})})
    assert table.numbers == {"row.x": "1", "x": "2"}
    with pytest.raises(ValueError, match=r"two cells are called row\.x"):
        keyed.numbers_of([table, Keyed("u", "", {"x": "X"}, {"row": ("Row", {"x": "3"})})])


def test_another_measure_may_be_better_where_it_is_lower() -> None:
    measure = engine.Contrast("kl_forward", "forward KL", "nats", "{:.2f}".format, lower_is_better=True)
    toy = replace(TOY, against=[Against("a’s", {"setting": "a"}, measure=measure)])
    planted = study(PRIOR)
    found = keyed.numbers_of(toy.tables_of(Compared.make(planted, toy.arms, toy.at)))
    assert (found["grpo.b.gap"], found["grpo.b.verdict"]) == ("−0.10 ± 0.00", "better")
    assert "better: GRPO b (−0.10 ± 0.00 nats)" in toy.section(planted).finding
    assert toy.section(planted).finding.startswith("Forward KL at new ≥ 95% against a’s: ")


def test_a_table_of_columns_judges_differences_and_counts_seeds() -> None:
    whole, part = Estimate(0.05, 0.01, 3), Estimate(-0.02, 0.001, 2)
    columns = [
        Column[Value]("size", "Size", lambda one: one),
        gap("other.gap", "Gap", lambda one: one),
        gap("low.gap", "Lower", lambda one: one, partial(verdict, lower_is_better=True)),
    ]
    rows: dict[str, tuple[str, Value]] = {"a": ("A", whole), "b": ("B", part), "c": ("C", None), "d": ("D", "word")}
    made = table_of("Title", "of", rows, columns, seeds=3)
    assert made.table.headers == ["of", "Size", "Gap", "seeds", "verdict", "Lower", "seeds", "verdict"]
    assert cells(made.table) == {
        "A": ["5.0 ± 1.0", "+5.0 ± 1.0", "3", "better", "+5.0 ± 1.0", "3", "worse"],
        "B": ["−2.0 ± 0.1 (2 of 3 seeds)", *["−2.0 ± 0.1", "2 of 3", "not comparable"] * 2],
        "C": ["—", *["—", "—", "not comparable"] * 2],
        "D": ["word"] * 7,
    }
    assert (made.numbers["a.other.verdict"], made.numbers["a.low.n"], made.numbers["b.size"]) == (
        "better",
        "3",
        "−2.0 ± 0.1 (2 of 3 seeds)",
    )


def test_verdicts_in_short_are_sorted_by_kind() -> None:
    gap = study_gap()
    judged = [Judged("A", gap, Standing.WORSE), Judged("B", None, Standing.APART), Judged("C", gap, Standing.BETTER)]
    size = f"+{written(gap)} points"
    assert in_short(judged) == f"better: C ({size}); worse: A ({size}); not comparable: B"
    assert in_short([]) == "not comparable: there are no runs to compare"


def study_gap() -> Any:
    planted = study(PRIOR)
    return Compared.make(planted, TOY.arms, TOY.at).gap(("grpo", "b"), ("grpo", "a"))
