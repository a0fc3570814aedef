"""Today's methods ahead of RL, behind it, and out of the race, as planted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.analysis import frontier
from rlrazor.report import drawing
from rlrazor.report.drawing import Curve, Points
from rlrazor.report.sections import Study
from rlrazor.report.sections.baselines import leader_of, section, variants_of
from study_tables import BASE_PRIOR, NEWS, cells, check, plus_minus, run, study_of

Arm = tuple[str, float]

JITTER = (0.0, 0.02, -0.02)
NAMES = {"ewc": "EWC", "replay": "replay 5 %", "lwf": "LwF", "dft": "DFT", "dft+kl": "DFT + KL", "lora": "LoRA"}
NAMES |= {"sft-2": "SFT-2", "grpo": "GRPO", "kl-dpg": "KL-DPG", "oracle": "oracle SFT"}
KEPT: dict[Arm, float] = {
    ("sft-2", 0): 0.3,
    ("oracle", 0): 0.72,
    ("grpo", 0): 0.6,
    ("kl-dpg", 0): 0.7,
    ("dft", 0): 0.31,
    ("replay", 0.05): 0.66,
    ("ewc", 100): 0.4,
    ("ewc", 1000): 0.5,
    ("lwf", 1): 0.45,
    ("lwf", 10): 0.55,
    ("dft+kl", 0.1): 0.35,
    ("lora", 8): 0.32,
}


def study(kept: Mapping[Arm, float], seeds: int = 3, news: Mapping[Arm, tuple[float, ...]] | None = None) -> Study:
    """(method, strength) -> prior accuracy at 95 %; a worse learning rate keeps 0.2 less. KL is 1 minus that."""
    rows: list[dict[str, Any]] = []
    for index, ((method, strength), prior) in enumerate(kept.items()):
        by_penalty = method.endswith("+kl")
        params = {"strength": None if by_penalty else (strength or None), "kl_coef": strength if by_penalty else 0.0}
        for seed in range(seeds):
            now = prior + JITTER[seed] + 0.002 * ((seed + index) % 3)
            reached = (news or {}).get((method, strength), NEWS)
            rows += run(method, seed, prior=now, kl=1 - prior, params=params, news=reached)
            rows += run(method, seed, prior=now - 0.2, kl=2.0, params=params, news=reached, lr=1e-3)
    planted = study_of("baselines", rows)
    planted.description["labels"] = NAMES
    return planted


def at(planted: Study, arm: Arm, threshold: float = 0.97) -> list[float]:
    """By a loop: the most that any checkpoint with new >= the threshold keeps, seed by seed."""
    found = []
    for seed in range(3):
        rows = [row for row in planted.points.to_dicts() if (row["method"], row["seed"]) == (arm[0], seed)]
        own = [row for row in rows if (row["strength"] or row["kl_coef"]) in (arm[1], arm[1] or None)]
        found.append(float(max(row["prior"] for row in own if row["new"] >= threshold)))
    return found


def gap(planted: Study, arm: Arm, other: Arm) -> str:
    """The first minus the second, seed by seed, as a section writes it."""
    values = [a - b for a, b in zip(at(planted, arm), at(planted, other), strict=True)]
    return f"{'+' if np.mean(values) > 0 else '−'}{plus_minus([abs(value) for value in values])}"


def test_best_of_today_against_rl() -> None:
    planted = study(KEPT)
    found = section(planted)
    check(found, "baselines")
    replay, lwf = ("replay", 0.05), ("lwf", 10)
    assert found.finding == (
        f"At 97% new accuracy (plain SFT-2 keeps {plus_minus(at(planted, ('sft-2', 0)))} %), the best of today’s "
        f"methods with prior data, replay 5 %, keeps a prior accuracy of {plus_minus(at(planted, replay))} % at a "
        f"forward KL of 0.35 ± 0.00 nats, more than GRPO ({gap(planted, replay, ('grpo', 0))} points), less than "
        f"oracle SFT ({gap(planted, replay, ('oracle', 0))} points) and KL-DPG "
        f"({gap(planted, replay, ('kl-dpg', 0))} points); the best without prior data, LwF, λ = 10, keeps a prior "
        f"accuracy of {plus_minus(at(planted, lwf))} % at a forward KL of 0.46 ± 0.00 nats, less than oracle SFT "
        f"({gap(planted, lwf, ('oracle', 0))} points), GRPO ({gap(planted, lwf, ('grpo', 0))} points) and KL-DPG "
        f"({gap(planted, lwf, ('kl-dpg', 0))} points) (3 seeds)."
    )
    kept, drifted = found.tables
    assert kept.rows[0][:5] == ["base (not fine-tuned)", *["(78.0 ± 0.0)"] * 3, "91.0 ± 0.0"]
    assert [row[0] for row in kept.rows[1:5]] == ["oracle SFT", "KL-DPG", "replay 5 %", "GRPO"]
    table = cells(kept)
    assert table["EWC, λ = 1000"][0] == plus_minus(at(planted, ("ewc", 1000), 0.95))
    assert {name for name, row in table.items() if row[4].startswith("yes")} == {
        *("replay 5 %", "EWC, λ = 100", "EWC, λ = 1000"),
    }
    assert cells(drifted)["DFT + KL, weight 0.1"][2] == "0.66 ± 0.00"
    starred = {name for _, name in found.figure.panels[1].y_ticks or () if name.endswith(" *")}
    assert starred == {"replay 5 % *", "EWC, λ = 100 *", "EWC, λ = 1000 *"}


def test_the_opposite() -> None:
    finding = section(study({**KEPT, ("lora", 8): 0.75, ("ewc", 1000): 0.701})).finding
    assert "with prior data, EWC, λ = 1000, keeps" in finding
    assert "nats, more than GRPO (+10" in finding
    assert "not to be told apart from KL-DPG (" in finding
    assert "the best without prior data, LoRA, rank 8, keeps" in finding
    assert "more than oracle SFT (+3" in finding.split(";")[1]
    assert "less" not in finding.split(";")[1]


def test_none_gets_there_with_prior_data() -> None:
    low = {arm: (0.92, 0.94) for arm in KEPT if arm[0] in ("ewc", "replay")}
    found = section(study(KEPT, news=low))
    assert (
        "none of today’s methods with prior data gets there in most seeds; the best without prior data" in found.finding
    )
    assert cells(found.tables[0])["EWC, λ = 100"][:4] == ["—", "—", "—", "94.0"]
    assert [row[0] for row in found.tables[0].rows[-3:]] == ["replay 5 %", "EWC, λ = 100", "EWC, λ = 1000"]
    [marks] = [layer for layer in found.figure.panels[1].layers if layer.label == "never reaches 97% new"]
    assert isinstance(marks, Points)
    assert marks.y.tolist() == [3, 2, 1]


def test_lucky_seeds_lead_nothing() -> None:
    """A strength that gets there in one seed of three is not the best, however much it keeps."""
    planted = study(KEPT)
    rows = [
        {**row, "new": 0.94 if row["method"] == "replay" and row["seed"] else row["new"]}
        for row in study({**KEPT, ("replay", 0.05): 0.77}).points.to_dicts()
    ]
    lucky = study_of("baselines", rows)
    lucky.description["labels"] = NAMES
    leaders = [leader_of([one for one in variants_of(of) if one.needs_prior], 0.97) for of in (planted, lucky)]
    assert [one.label if one else None for one in leaders] == ["replay 5 %", "EWC, λ = 1000"]
    assert cells(section(lucky).tables[0])["replay 5 %"][2].endswith("(1 of 3 seeds)")


def test_frontier_pools_strengths_and_learning_rates() -> None:
    planted = study(KEPT)
    trade_off, kept = section(planted).figure.panels
    [line] = [layer for layer in trade_off.layers if isinstance(layer, Curve) and layer.label == "EWC"]
    own = [row for row in planted.points.to_dicts() if row["method"] == "ewc"]
    new, prior = (np.array([row[name] for row in own]) for name in ("new", "prior"))
    best = frontier.pareto_set(new, prior)
    assert sorted(zip(line.x, line.y, strict=True)) == sorted(zip(new[best], prior[best], strict=True))
    [dots] = [layer for layer in kept.layers if isinstance(layer, Points) and layer.label == "EWC"]
    assert sorted(dots.x) == pytest.approx(sorted(np.mean(at(planted, ("ewc", by))) for by in (100, 1000)))
    [base] = [layer for layer in kept.layers if layer.label == "base"]
    assert base.x.tolist() == pytest.approx([BASE_PRIOR, BASE_PRIOR])


def test_one_seed(tmp_path: Path) -> None:
    found = section(study(KEPT, seeds=1))
    check(found, "baselines")
    assert "±" not in found.finding
    assert "(plain SFT-2 keeps 29.8 %), the best" in found.finding
    assert found.finding.endswith("(1 seed, which leaves it open).")
    drawing.save(found.figure, tmp_path)
    assert drawing.to_html(found.figure, with_library=False)


@pytest.mark.parametrize(
    ("methods", "finding"),
    [
        (("sft-2", "grpo"), "The study has none of today’s methods against forgetting."),
        (("dft",), "the best of today’s methods without prior data, DFT, keeps a prior accuracy of 31.0 ± 4.7 % at"),
        (("ewc", "grpo"), "the best of today’s methods with prior data, EWC, λ = 1000, keeps"),
    ],
    ids=["none of today", "nothing to compare", "prior data only"],
)
def test_missing_arms(methods: tuple[str, ...], finding: str) -> None:
    found = section(study({arm: prior for arm, prior in KEPT.items() if arm[0] in methods}))
    check(found, "baselines")
    assert finding in found.finding


def test_nothing_is_learnt(tmp_path: Path) -> None:
    found = section(study(KEPT, news=dict.fromkeys(KEPT, (0.92, 0.94))))
    check(found, "baselines")
    assert found.finding == "No method reaches a new accuracy of 95%, so there is nothing to compare."
    assert len(found.figure.panels) == 1
    drawing.save(found.figure, tmp_path)
