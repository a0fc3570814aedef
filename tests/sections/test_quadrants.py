"""The 2 x 2 of on-policy data and negative examples, each effect planted, absent and reversed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.report import drawing
from rlrazor.report.study import Study
from rlrazor.studies.quadrants import QUADRANTS, effects, section
from study_tables import BASE_PRIOR, NEWS, cells, check, plus_minus, run, study_of

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


def test_on_policy_is_what_matters() -> None:
    planted = study(0.3, 0.0)
    found = section(planted)
    check(found, "quadrants")
    by_seed = [{method: kept(planted, method, seed, 0.97) for method in QUADRANTS} for seed in range(3)]
    own = [(of["grpo"] + of["reinforce"] - of["sft-2"] - of["simpo"]) / 2 for of in by_seed]
    wrong = [(of["grpo"] + of["simpo"] - of["reinforce"] - of["sft-2"]) / 2 for of in by_seed]
    size = plus_minus([abs(value) for value in own])
    # All four keep a tenth of what they gain beyond 95 % less at 97 %: the effects are the same.
    assert sum(wrong) < 0
    sizes = f"+{size}", f"−{plus_minus([-value for value in wrong])}"
    assert found.finding == (
        f"At a new accuracy of at least 95%, being on-policy is worth {sizes[0]} points of prior accuracy and negative "
        f"examples {sizes[1]}: being on-policy keeps prior accuracy, negative examples make no difference that can be "
        "told from chance, as the paper finds; at 97%, the highest that all four reach, they are worth "
        f"{' and '.join(sizes)}: the same (3 seeds)."
    )
    by_method, worth = found.tables
    grpo = [of["grpo"] for of in by_seed]
    assert cells(by_method)["GRPO: on-policy, with negatives"][2] == f"{plus_minus(grpo)} / 1.01 ± 0.00"
    assert cells(worth)["being on-policy"] == [f"+{size}"] * 3 + ["−1.00 ± 0.00"]
    crossed = [of["grpo"] - of["reinforce"] - of["simpo"] + of["sft-2"] for of in by_seed]
    assert cells(worth)["interaction"][0] == f"−{plus_minus([-value for value in crossed])}"


@pytest.mark.parametrize(
    ("on_policy", "negatives", "verdict"),
    [
        (-0.3, 0.0, "being on-policy costs prior accuracy, negative examples make no difference that can be told"),
        (0.3, -0.2, "being on-policy keeps prior accuracy, negative examples cost prior accuracy, as the paper finds"),
        (0.0, 0.3, "no difference that can be told from chance, negative examples keep prior accuracy; at 97%"),
        (0.0, 0.0, "neither makes a difference that can be told from chance; at 97%"),
        (0.1, 0.3, "both keep prior accuracy, negative examples more of it"),
        (0.3, 0.1, "both keep prior accuracy, being on-policy more of it"),
        (-0.3, -0.3, "being on-policy costs prior accuracy, negative examples cost prior accuracy, against the paper"),
    ],
)
def test_verdict_follows_what_is_planted(on_policy: float, negatives: float, verdict: str) -> None:
    assert verdict in section(study(on_policy, negatives)).finding


def test_effects_need_all_four() -> None:
    planted = study(0.3, 0.1, interaction=0.2)
    rows = planted.points.filter(planted.points["step"] == 1, planted.points["lr"] == 1e-4)
    found = effects(rows, "prior")
    # The interaction is shared out evenly between the main effects.
    assert found["being on-policy"].mean == pytest.approx(0.4, abs=0.01)
    assert found["negative examples"].mean == pytest.approx(0.2, abs=0.01)
    assert found["interaction"].mean == pytest.approx(0.2, abs=0.02)
    one_less = rows.filter((rows["method"] != "simpo") | (rows["seed"] != 0))
    assert effects(one_less, "prior")["being on-policy"].seeds == 2
    assert effects(rows.filter(rows["method"] != "simpo"), "prior") == {}


def test_compared_where_all_four_get_in_all_seeds() -> None:
    rows = study(0.3, 0.0).points.to_dicts()
    short = [r for r in rows if (r["method"], r["seed"]) != ("simpo", 2) or r["new"] < 0.96]
    found = section(study_of("quadrants", short))
    assert "at least 95%" in found.finding
    assert "the highest that all four reach" not in found.finding
    assert [panel.title for panel in found.figure.panels][2:] == ["Kept at new ≥ 95%"]
    # Thresholds below the base's accuracy are no comparison.
    assert "cannot be compared" in section(study_of("quadrants", short, base_new=0.955)).finding


def test_verdicts_may_differ_between_thresholds() -> None:
    """Being on-policy is worth something at 95 %, and nothing that can be told at 97 %."""
    rows = study(0.3, 0.0).points.to_dicts()
    for row in rows:
        if row["new"] >= 0.965 and row["method"] in ("grpo", "reinforce"):
            row["prior"] -= (0.5, 0.3, 0.1)[row["seed"]]
    finding = section(study_of("quadrants", rows)).finding
    first, second = finding.split("; at 97%, the highest that all four reach, ")
    assert "being on-policy keeps prior accuracy" in first
    assert second.endswith("neither makes a difference that can be told from chance (3 seeds).")


def test_one_seed_missing_methods_and_nothing_learnt(tmp_path: Path) -> None:
    one = section(study(0.3, 0.0, seeds=1))
    check(one, "quadrants")
    assert "±" not in one.finding
    assert "(1 seed, which leaves it open)" in one.finding
    without = study_of("quadrants", [r for r in study(0.3, 0.0).points.to_dicts() if r["method"] != "simpo"])
    missing = section(without)
    check(missing, "quadrants")
    assert missing.finding == "The four cannot be compared: there are no runs of SimPO."
    nothing = section(study(0.3, 0.0, news=(0.9, 0.91)))
    check(nothing, "quadrants")
    assert "cannot be compared" in nothing.finding
    drawing.save(nothing.figure, tmp_path)


def test_figure_shows_the_two_by_two() -> None:
    figure = section(study(0.3, 0.0)).figure
    drift, trade_off, factors, further = figure.panels
    assert [panel.title for panel in (drift, trade_off)] == ["Learning against drift", "Trade-off"]
    assert further.title == "Kept at new ≥ 97%"
    on_policy, offline, untuned = factors.layers
    assert np.round(on_policy.x).tolist() == np.round(offline.x).tolist() == [0.0, 1.0]
    assert (on_policy.y > offline.y + 0.2).all()
    assert untuned.y.tolist() == pytest.approx([BASE_PRIOR] * 2)
    assert [text for _, _, text in factors.texts] == ["1-0 REINFORCE", "GRPO", "SFT-2", "SimPO"]
