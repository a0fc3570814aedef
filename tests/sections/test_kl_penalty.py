"""KL penalties that help SFT, do nothing, or harm, as planted."""

from pathlib import Path
from typing import Any

import pytest

from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.sections import Study
from rlrazor.report.sections.kl_penalty import by_family, compare, section
from study_tables import NEWS, cells, check, plus_minus, run, study_of

JITTER = (0.0, 0.01, -0.01)  # by seed, of all arms
OWN = {0.0: (0.0, 0.0, 0.0), 0.1: (0.01, -0.01, 0.0), 1.0: (-0.01, 0.01, 0.004)}
RL = {("grpo", 0.0): 0.6, ("grpo", 0.1): 0.65, ("grpo", 1.0): 0.7}


def study(planted: dict[tuple[str, float], float], seeds: int = 3, news: tuple[float, ...] = NEWS) -> Study:
    """(method without penalty, coefficient) -> prior accuracy at 95 %."""
    rows: list[dict[str, Any]] = []
    for (family, coefficient), prior in planted.items():
        method = f"{family}+kl" if coefficient else family
        for seed in range(seeds):
            kept = prior + JITTER[seed] + OWN[coefficient][seed]
            rows += run(method, seed, prior=kept, kl=2 - prior, news=news, params={"kl_coef": coefficient})
    return study_of("kl-penalty", rows)


def sft(plain: float, weak: float, strong: float) -> dict[tuple[str, float], float]:
    return {("sft-2", 0.0): plain, ("sft-2", 0.1): weak, ("sft-2", 1.0): strong}


def kept(planted: Study, method: str, coefficient: float, seed: int, at: float) -> float:
    """By a loop: the most that any checkpoint keeps at new >= `at`."""
    arm, rows = (method, coefficient, seed), planted.table.to_dicts()
    return float(max(r["prior"] for r in rows if (r["method"], r["kl_coef"], r["seed"]) == arm and r["new"] >= at))


def test_penalty_helps_but_not_enough() -> None:
    planted = study({**sft(0.3, 0.35, 0.5), **RL})
    found = section(planted)
    check(found, "kl-penalty")
    best, plain = (
        [kept(planted, *arm, seed, 0.95) for seed in range(3)] for arm in (("sft-2+kl", 1.0), ("sft-2", 0.0))
    )
    rl, both = ([kept(planted, *arm, seed, 0.95) for seed in range(3)] for arm in (("grpo", 0.0), ("grpo+kl", 1.0)))
    gain = plus_minus([a - b for a, b in zip(best, plain, strict=True)])
    short, shorter = (plus_minus([b - a for a, b in zip(best, of, strict=True)]) for of in (rl, both))
    assert found.finding == (
        f"At a new accuracy of at least 95%, SFT-2 with its best penalty (coefficient 1) keeps a prior accuracy of "
        f"{plus_minus(best)} %, +{gain} points against SFT-2 without and −{short} against GRPO without: the penalty "
        f"makes SFT forget less, but still more than RL, and against GRPO with its own best (coefficient 1) it is "
        f"−{shorter} (3 seeds)."
    )
    table, worth = found.tables
    assert cells(table)["SFT-2, c = 1"][0].startswith(f"{plus_minus(best)} / ")
    assert cells(worth)["1"][0] == f"+{gain}"
    assert cells(worth)["1"][2:] == [f"−{short}", f"−{shorter}"]
    assert cells(worth)["0"][:2] == ["—", "—"]


@pytest.mark.parametrize(
    ("of_sft", "verdict"),
    [
        (sft(0.3, 0.8, 0.4), "(coefficient 0.1) keeps a prior accuracy of 80.0"),
        (sft(0.3, 0.8, 0.4), "the penalty makes SFT forget less than RL"),
        (sft(0.3, 0.4, 0.6), "the penalty makes SFT forget less, and no longer measurably more than RL"),
        (sft(0.3, 0.3, 0.3), "the penalty makes no difference that can be told from chance, and SFT forgets more than"),
        (sft(0.6, 0.6, 0.6), "the penalty makes no difference that can be told from chance, and SFT and RL cannot be"),
        (sft(0.5, 0.4, 0.3), "even the best penalty harms, and SFT forgets more than RL"),
        (sft(0.9, 0.8, 0.7), "even the best penalty harms, and SFT forgets less than RL"),
    ],
)
def test_verdict_follows_what_is_planted(of_sft: dict[tuple[str, float], float], verdict: str) -> None:
    assert verdict in section(study({**of_sft, **RL})).finding


def test_penalties_too_strong_to_learn_are_left_out() -> None:
    rows = study({**sft(0.3, 0.35, 0.5), **RL}).points.to_dicts()
    weak = [r for r in rows if (r["method"], r["kl_coef"]) != ("sft-2+kl", 1.0) or r["new"] < 0.95]
    planted = study_of("kl-penalty", weak)
    found = compare(by_family(planted.points), 0.95)
    assert found is not None
    assert found.coefficient == 0.1
    section_ = section(planted)
    check(section_, "kl-penalty")
    assert cells(section_.tables[0])["SFT-2, c = 1"] == ["—"] * 3
    assert cells(section_.tables[1])["1"][0] == "—"


def test_missing_arms_one_seed_and_nothing_learnt(tmp_path: Path) -> None:
    full = {**sft(0.3, 0.35, 0.5), **RL}
    one = section(study(full, seeds=1))
    check(one, "kl-penalty")
    assert "±" not in one.finding
    assert "(1 seed, which leaves it open)" in one.finding
    no_rl_penalty = section(study({**sft(0.3, 0.35, 0.5), ("grpo", 0.0): 0.6}))
    check(no_rl_penalty, "kl-penalty")
    assert "still more than RL (3 seeds)" in no_rl_penalty.finding
    for planted in (study(sft(0.3, 0.35, 0.5)), study(RL), study(full, news=(0.9, 0.92))):
        empty = section(planted)
        check(empty, "kl-penalty")
        assert empty.finding.startswith("KL-regularised SFT and RL cannot be compared")
    drawing.save(empty.figure, tmp_path)


def test_figure_runs_over_the_coefficients() -> None:
    by_prior, by_kl, trade_off = section(study({**sft(0.3, 0.35, 0.5), **RL})).figure.panels
    assert list(by_prior.x_ticks or ()) == [(0.0, "0"), (1.0, "0.1"), (2.0, "1")]
    for panel, sign in ((by_prior, 1), (by_kl, -1)):
        of_sft, of_rl = panel.layers[:2]
        assert isinstance(of_sft, Points)
        assert of_sft.interval is not None
        assert (sign * (of_rl.y - of_sft.y) > 0).all()
        assert of_sft.x.tolist() == [0.0, 1.0, 2.0]
    colors = [layer.color for layer in trade_off.layers]
    assert len(set(colors)) == 7  # six arms, a shade each, and the base
