"""The 2 x 2 of on-policy data and negative examples, each effect planted, absent and reversed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.report import drawing
from rlrazor.report.keyed import numbers_of
from rlrazor.report.study import Study
from rlrazor.studies.quadrants import QUADRANTS, STUDY, compared_in, effects, tables_of
from study_tables import BASE_PRIOR, NEWS, check, plus_minus, run, study_of

NOISE = {"grpo": (0.0, 0.01, -0.01), "reinforce": (0.02, 0.0, 0.01), "sft-2": (0.0, 0.0, 0.01), "simpo": (0.01, 0, 0)}


def study(
    on_policy: float, negatives: float, interaction: float = 0.0, seeds: int = 3, news: tuple[float, ...] = NEWS
) -> Study:
    """Prior accuracy 0.4 plus what each factor adds; the worse of two learning rates keeps 0.1 less."""
    rows: list[dict[str, Any]] = []
    for method, (own, wrong) in QUADRANTS.items():
        for seed in range(seeds):
            prior = 0.4 + on_policy * own + negatives * wrong + interaction * (own and wrong) + NOISE[method][seed]
            rows += run(method, seed, prior=prior, kl=2 - own, news=news)
            rows += run(method, seed, prior=prior - 0.1, kl=4, news=news, lr=1e-3)
    return study_of("quadrants", rows)


def kept(planted: Study, method: str, seed: int, at: float) -> float:
    """By a loop: the most that any checkpoint keeps at new >= `at`."""
    rows = planted.table.to_dicts()
    return float(max(r["prior"] for r in rows if (r["method"], r["seed"]) == (method, seed) and r["new"] >= at))


def found_in(of: Study) -> dict[str, str]:
    return numbers_of(tables_of(compared_in(of)))


def test_on_policy_is_what_matters() -> None:
    planted = study(0.3, 0.0)
    found = found_in(planted)
    by_seed = [{method: kept(planted, method, seed, 0.97) for method in QUADRANTS} for seed in range(3)]
    own = [(of["grpo"] + of["reinforce"] - of["sft-2"] - of["simpo"]) / 2 for of in by_seed]
    wrong = [(of["grpo"] + of["simpo"] - of["reinforce"] - of["sft-2"]) / 2 for of in by_seed]
    crossed = [of["grpo"] - of["reinforce"] - of["simpo"] + of["sft-2"] for of in by_seed]
    assert sum(wrong) < 0
    assert sum(crossed) < 0
    # All four keep a tenth of what they gain beyond 95 % less at 97 %: the effects are the same.
    for level, at in (("lowest", "95%"), ("at-96", "96%"), ("highest", "97%")):
        assert found[f"{level}.data.at"] == at
        assert (found[f"{level}.data.verdict"], found[f"{level}.negatives.verdict"]) == ("better", "cannot be told")
        assert found[f"{level}.data.gap"] == f"+{plus_minus(own)}"
        assert found[f"{level}.negatives.gap"] == f"−{plus_minus([-value for value in wrong])}"
        assert found[f"{level}.interaction.gap"] == f"−{plus_minus([-value for value in crossed])}"
        assert found[f"{level}.data.kl-gap"] == "−1.00 ± 0.00"
    grpo = plus_minus([of["grpo"] for of in by_seed])
    assert found["on-policy.with"] == f"GRPO: {grpo}"
    assert (found["grpo.prior"], found["grpo.kl"]) == (grpo, "1.01 ± 0.00")
    section = STUDY.section(planted)
    check(section, "quadrants")
    told = f"better: being on-policy (+{plus_minus(own)} points); cannot be told: negative examples ("
    assert section.finding.startswith(f"What each is worth in prior score kept, at new ≥ 95%: {told}")
    assert f"; at new ≥ 97%: {told}" in section.finding


@pytest.mark.parametrize(
    ("on_policy", "negatives", "verdicts"),
    [
        (-0.3, 0.0, ("worse", "cannot be told")),
        (0.3, -0.2, ("better", "worse")),
        (0.0, 0.3, ("cannot be told", "better")),
        (0.0, 0.0, ("cannot be told", "cannot be told")),
        (0.1, 0.3, ("better", "better")),
        (-0.3, -0.3, ("worse", "worse")),
    ],
)
def test_verdict_follows_what_is_planted(on_policy: float, negatives: float, verdicts: tuple[str, str]) -> None:
    found = found_in(study(on_policy, negatives))
    assert (found["lowest.data.verdict"], found["lowest.negatives.verdict"]) == verdicts


def test_negatives_may_be_worth_more_on_policy() -> None:
    for interaction, told in ((0.2, "more"), (-0.2, "less"), (0.01, "cannot be told")):
        found = found_in(study(0.3, 0.1, interaction=interaction))
        assert {found[f"{level}.interaction.verdict"] for level in ("lowest", "at-96", "highest")} == {told}


def test_effects_need_all_four() -> None:
    planted = study(0.3, 0.1, interaction=0.2)
    rows = planted.points.filter(planted.points["step"] == 1, planted.points["lr"] == 1e-4)
    found = effects(rows, "prior")
    # The interaction is shared out evenly between the main effects.
    for factor, worth, within in (("data", 0.4, 0.01), ("negatives", 0.2, 0.01), ("interaction", 0.2, 0.02)):
        assert (of := found[factor])
        assert of.mean == pytest.approx(worth, abs=within)
    one_less = rows.filter((rows["method"] != "simpo") | (rows["seed"] != 0))
    fewer = effects(one_less, "prior")["data"]
    assert fewer
    assert fewer.seeds == 2
    assert set(effects(rows.filter(rows["method"] != "simpo"), "prior").values()) == {None}


def test_compared_where_all_four_get_in_all_seeds() -> None:
    rows = study(0.3, 0.0).points.to_dicts()
    short = [r for r in rows if (r["method"], r["seed"]) != ("simpo", 2) or r["new"] < 0.96]
    section, found = STUDY.section(study_of("quadrants", short)), found_in(study_of("quadrants", short))
    assert found["lowest.data.at"] == found["highest.data.at"] == "95%"
    assert found["lowest.data.gap"] == found["highest.data.gap"] != "—"
    assert [panel.title for panel in section.figure.panels][2:3] == ["Kept at new ≥ 95%"]
    # Thresholds below the base's accuracy are no comparison.
    above = study_of("quadrants", short, base_new=0.955)
    assert STUDY.section(above).finding.startswith("Nothing can be compared")
    assert found_in(above)["lowest.data.verdict"] == "not comparable"


def test_compared_below_the_thresholds_where_some_never_reach_one() -> None:
    found = found_in(study(0.3, 0.0, news=(0.92, 0.935, 0.941)))
    assert found["lowest.data.at"] == found["highest.data.at"] == "94%"
    assert found["highest.data.verdict"] == "better"


def test_verdicts_may_differ_between_thresholds() -> None:
    """Being on-policy is worth something at 95 %, and nothing that can be told at 97 %."""
    rows = study(0.3, 0.0).points.to_dicts()
    for row in rows:
        if row["new"] >= 0.965 and row["method"] in ("grpo", "reinforce"):
            row["prior"] -= (0.5, 0.3, 0.1)[row["seed"]]
    found = found_in(study_of("quadrants", rows))
    assert [found[f"{level}.data.verdict"] for level in ("lowest", "at-96", "highest")] == [
        *("better", "better"),
        "cannot be told",
    ]


def test_one_seed_missing_methods_and_nothing_learnt(tmp_path: Path) -> None:
    one = STUDY.section(study(0.3, 0.0, seeds=1))
    check(one, "quadrants")
    assert "±" not in one.finding
    assert "cannot be told: being on-policy (+3" in one.finding
    without = study_of("quadrants", [r for r in study(0.3, 0.0).points.to_dicts() if r["method"] != "simpo"])
    nothing = study(0.3, 0.0, news=(0.9, 0.91))
    for empty in (without, nothing):
        section = STUDY.section(empty)
        check(section, "quadrants")
        assert section.finding.startswith("Nothing can be compared: at no new score above the base’s")
        assert found_in(empty)["highest.negatives.verdict"] == "not comparable"
        assert found_in(empty)["offline.with"] == "SimPO: —"
        drawing.save(section.figure, tmp_path)


def test_other_methods_are_none_of_its_business() -> None:
    rows = study(0.3, 0.0).points.to_dicts()
    more = [*rows, *run("sft-1", 0, news=(0.92,))]
    assert found_in(study_of("quadrants", more)) == found_in(study_of("quadrants", rows))
    assert STUDY.section(study_of("quadrants", more)).paragraphs[-1].startswith(f"{len(rows)} checkpoints")


def test_figure_shows_the_two_by_two() -> None:
    figure = STUDY.section(study(0.3, 0.0)).figure
    drift, trade_off, factors, further, *curves = figure.panels
    assert len(curves) == 2
    assert [panel.title for panel in (drift, trade_off)] == ["Learning against drift", "Trade-off"]
    assert further.title == "Kept at new ≥ 97%"
    on_policy, offline, untuned = factors.layers
    assert np.round(on_policy.x).tolist() == np.round(offline.x).tolist() == [0.0, 1.0]
    assert (on_policy.y > offline.y + 0.2).all()
    assert untuned.y.tolist() == pytest.approx([BASE_PRIOR] * 2)
    assert [text for _, _, text in factors.texts] == ["1-0 REINFORCE", "GRPO", "SFT-2", "SimPO"]
