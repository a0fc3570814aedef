"""The report's sections on robots, from tables with known counts: intervals against scipy and by hand."""

from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest, sem, t  # type: ignore[attr-defined]  # scipy exports them dynamically

from rlrazor.analysis.lost import mcnemar
from rlrazor.report.sections import interactions, successes
from rlrazor.report.study import Study
from rlrazor.studies import states

TASKS = ["drawer-open", "reach"]


def checkpoint(method: str, seed: int, step: int, counts: dict[str, tuple[int, int]], **more: Any) -> dict[str, Any]:
    """A row; `counts`: of 100 episodes those that succeeded sampled and greedy. One holds all of the other."""
    row: dict[str, Any] = {
        "run_id": f"{method}-{seed}",
        "trajectory": f"{method}-{seed}",
        "method": method,
        "seed": seed,
    }
    row |= {"step": step, "epoch": 1.0, "lr": None if method == "base" else 1e-3, "schedule": "constant", "epochs": 1}
    for task, (sampled, greedy) in counts.items():
        row |= {f"sampled_{task}": sampled / 100, f"greedy_{task}": greedy / 100}
        row[f"greedy_alone_{task}"] = max(greedy - sampled, 0) / 100
    prior = float(np.mean([row[f"sampled_{task}"] for task in TASKS]))
    row |= {"new": row["sampled_new"], "prior": prior, "forgetting": 0.9 - prior, "episodes": 100.0}
    row |= {"kl_forward": step / 10, "kl_forward_on_prior": 0.9 - prior, "kl_forward_on_prior_stderr": 0.03}
    row |= {"kl_forward_per_episode_on_prior": 1.0, "interactions": 1000.0 * step}
    return {**row, **more}


def study(rows: list[dict[str, Any]]) -> Study:
    table = pl.DataFrame(rows, infer_schema_length=None)
    description = {
        "prior_tasks": TASKS,
        "new_task": "pick-place",
        "labels": {"sft": "SFT", "rl": "RL"},
        "thresholds": [0.5],
        "base_range": [0.2, 0.4],
        "kl_unit": "nats per action",
    }
    points = table.filter(pl.col("method") != "base")
    return Study("sweep", description, table, points, table.filter(method="base"), of_sweep=True)


def base(seed: int) -> dict[str, Any]:
    return checkpoint("base", seed, 0, {"new": (30, 30), "drawer-open": (95, 95), "reach": (85, 85)})


def one_seed() -> Study:
    return study(
        [
            base(0),
            checkpoint("sft", 0, 1, {"new": (40, 40), "drawer-open": (90, 80), "reach": (60, 60)}),
            checkpoint("sft", 0, 2, {"new": (60, 66), "drawer-open": (80, 30), "reach": (50, 50)}),
            checkpoint("rl", 0, 4, {"new": (35, 35), "drawer-open": (94, 92), "reach": (80, 78)}),
        ]
    )


def three_seeds() -> Study:
    rows = [base(seed) for seed in range(3)]
    for seed, drawer in enumerate((70, 80, 90)):
        counts = {"new": (60, 60), "drawer-open": (drawer, 40), "reach": (50, 50)}
        rows.append(checkpoint("sft", seed, 2, counts))
        there = {"new": (55 if seed else 30, 60), "drawer-open": (90, 90), "reach": (80, 80)}
        rows.append(checkpoint("rl", seed, 4, there))
    return study(rows)


def test_of_one_seed_the_intervals_are_wilsons_and_the_gaps_are_paired() -> None:
    shown = one_seed()
    arms = successes.arms_of(shown, 0.5)
    assert [(arm.label, arm.reached, arm.rows[0]["step"]) for arm in arms.values()] == [
        ("base", False, 0),
        ("SFT", True, 2),
        ("RL", False, 4),
    ]
    found, wanted = arms["sft"].success("greedy", ["new"]), binomtest(66, 100).proportion_ci(method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((0.66, wanted.low, wanted.high))
    both = arms["sft"].success("sampled", TASKS)
    wanted = binomtest(130, 200).proportion_ci(method="wilson")
    assert (both.mean, both.low, both.high) == pytest.approx((0.65, wanted.low, wanted.high))
    drawer = arms["sft"].gap(["drawer-open"])  # 50 that sampled alone has, and none that greedy alone has
    assert drawer.mean == pytest.approx(-0.5)
    assert drawer.high < -0.3
    assert mcnemar(0, 50) < 1e-9
    assert not arms["rl"].gap(["drawer-open"]).is_told  # 2 of 100: McNemar's p is a half
    assert mcnemar(0, 2) == 0.5


def test_over_seeds_the_intervals_are_students() -> None:
    shown = three_seeds()
    arms = successes.arms_of(shown, 0.5)
    found = arms["sft"].success("sampled", ["drawer-open"])
    wanted = t.interval(0.95, 2, loc=0.8, scale=sem([0.7, 0.8, 0.9]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, *wanted))
    gap = arms["sft"].gap(["drawer-open"])
    wanted = t.interval(0.95, 2, loc=-0.4, scale=sem([-0.3, -0.4, -0.5]))
    assert (gap.mean, gap.low, gap.high) == pytest.approx((-0.4, *wanted))


def test_who_got_there_and_who_did_not_are_never_put_together() -> None:
    arms = successes.arms_of(three_seeds(), 0.5)
    assert [row["seed"] for row in arms["rl"].rows] == [1, 2]  # seed 0 does not get there, and is not shown
    assert arms["rl"].reached
    section = successes.section(three_seeds())
    there = dict(zip(section.tables[0].headers, section.tables[0].rows[2], strict=True))
    assert (there["shown"], there["seeds"]) == ("where it gets there", "2")
    assert [table.title for table in section.tables][-1] == "Each seed"
    assert len(section.tables[-1].rows) == 3 + 3 + 2
    assert section.warning == ""
    assert "30.0 % of the sampled episodes, within the 20% to 40%" in section.note


def test_the_finding_names_where_the_modes_differ() -> None:
    finding = successes.section(one_seed()).finding
    told = "SFT on pick-place (+6.0 points), SFT on drawer-open (−50.0 points)"
    assert finding == f"Greedy minus sampled success, where it can be told from 0: {told}."


def test_prices_are_of_those_that_get_there() -> None:
    section = interactions.section(one_seed())
    assert section.finding == "Steps of the environment to a new score of 50%, demonstrations included: SFT 2,000."
    cells = {row[0]: row[1:] for row in section.tables[0].rows}
    assert cells == {"SFT": ["2,000", "2"], "RL": ["—", "—"]}
    within = {row[0]: dict(zip(section.tables[1].headers, row, strict=True)) for row in section.tables[1].rows}
    assert within["SFT"]["≤ 1,000"] == "40.0 / 75.0"
    assert within["SFT"]["≤ 2,000"] == within["SFT"]["≤ 5,000"] == "60.0 / 65.0"
    assert within["RL"]["≤ 2,000"] == "—"
    assert within["RL"]["≤ 5,000"] == "35.0 / 87.0"


def test_kl_has_its_standard_error() -> None:
    table = states.error_table(three_seeds())
    assert table.rows["sft"][1][f"at-{states.ON_PRIOR}"] == f"{0.9 - (0.8 + 0.5) / 2:.3f} ± {0.03 / 3**0.5:.3f}"
    assert table.rows["sft"][1]["at-kl_forward"] == "0.200"  # none was measured
