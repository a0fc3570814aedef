"""KL penalties that help SFT, do nothing, or harm, as planted."""

import pytest

from rlrazor.report.study import Study
from rlrazor.runs.records import RunSpec
from rlrazor.studies.kl_penalty import STUDY
from study_tables import NEWS, check, numbers_of, planted

OWN = {0.0: (0.0, 0.0, 0.0), 0.1: (0.01, -0.01, 0.0), 0.3: (0.004, 0.0, -0.01), 1.0: (-0.01, 0.01, 0.004)}
RL = {0.0: 0.6, 0.1: 0.65, 0.3: 0.65, 1.0: 0.7}


def study(sft: dict[float, float], rl: dict[float, float] = RL, low: float | None = None) -> Study:
    """Coefficient -> prior accuracy at 95 %; SFT with the coefficient `low` does not learn."""

    def prior(spec: RunSpec) -> float:
        coefficient = spec.params["kl_coef"]
        return (sft if spec.method.startswith("sft") else rl)[coefficient] + OWN[coefficient][spec.seed]

    def news(spec: RunSpec) -> tuple[float, ...]:
        return (0.92,) if spec.method.startswith("sft") and spec.params["kl_coef"] == low else NEWS

    return planted("kl-penalty", prior, news=news)


@pytest.mark.parametrize(
    ("sft", "best", "against_none", "against_rl"),
    [
        ({0.0: 0.3, 0.1: 0.8, 0.3: 0.4, 1.0: 0.4}, "0.1", "better", "better"),
        ({0.0: 0.3, 0.1: 0.4, 0.3: 0.4, 1.0: 0.6}, "1", "better", "cannot be told"),
        ({0.0: 0.3, 0.1: 0.4, 0.3: 0.5, 1.0: 0.4}, "0.3", "better", "worse"),
        ({0.0: 0.3, 0.1: 0.3, 0.3: 0.2, 1.0: 0.2}, "0.1", "cannot be told", "worse"),
        ({0.0: 0.9, 0.1: 0.8, 0.3: 0.7, 1.0: 0.7}, "0.1", "worse", "better"),
    ],
)
def test_verdicts_follow_what_is_planted(
    sft: dict[float, float], best: str, against_none: str, against_rl: str
) -> None:
    found = numbers_of(study(sft))
    assert found["best-sft-2.arm"] == f"SFT-2, c = {best}"
    assert found["best-sft-2.sft-2.verdict"] == found[f"sft-2.{best}.none.verdict"] == against_none
    assert found["best-sft-2.grpo.verdict"] == found[f"sft-2.{best}.verdict"] == against_rl
    gap = 100 * (sft[float(best)] - sft[0.0])
    shown = float(found["best-sft-2.sft-2.gap"].split(" ")[0].replace("−", "-"))
    assert shown == pytest.approx(gap + 100 * sum(OWN[float(best)]) / 3, abs=0.051)


def test_rl_gains_from_its_own_penalty_and_pairs_are_of_one_coefficient() -> None:
    found = numbers_of(study(dict.fromkeys(RL, 0.65)))
    assert (found["best-grpo.arm"], found["best-grpo.grpo.verdict"]) == ("GRPO, c = 1", "better")
    assert found["sft-2.1.same.verdict"] == "worse"
    assert found["sft-2.0.1.same.verdict"] == "cannot be told"
    assert found["sft-2.same.verdict"] == "better"


def test_a_penalty_too_strong_to_learn_is_not_the_best() -> None:
    planted_study = study({0.0: 0.3, 0.1: 0.35, 0.3: 0.4, 1.0: 0.9}, low=1.0)
    found = numbers_of(planted_study)
    assert found["best-sft-2.arm"] == "SFT-2, c = 0.3"
    assert found["sft-2.1.verdict"] == "not comparable"
    section = STUDY.section(planted_study)
    check(section, "kl-penalty")
    best = next(table for table in section.tables if table.title == "The best at new ≥ 95%")
    assert [row[0] for row in best.rows if row[1]] == ["SFT-2 with a penalty", "GRPO with a penalty"]
    assert [panel.title for panel in section.figure.panels] == [
        "Kept at new ≥ 95%",
        "Drift at new ≥ 95%",
        "Trade-off",
        "Forgotten at new ≥ 95% (triangle at the edge: never there)",
        "How far each learning rate gets",
    ]
    assert [name for _, name in section.figure.panels[0].x.ticks or ()] == ["0", "0.1", "0.3", "1"]
