"""Cosines of steps that follow their change of KL, or not, or go against it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies import dynamics
from rlrazor.studies.dynamics import BLOCK, CHANGE, NEW, PRIOR, in_blocks, links, section
from study_tables import cells, check, plus_minus, run, study_of


def study(slopes: dict[str, float], seeds: int = 3, steps: int = 150, noise: float = 0.02) -> Study:
    """The cosine with the prior task's gradient is `slope` * KL change + noise, with the new task's its opposite."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for method, slope in slopes.items():
        for seed in range(seeds):
            for step, of_run in enumerate(run(method, seed, news=(0.95,) * steps)):
                change = 0.01 * float(rng.normal())
                cosine = slope * change + noise * float(rng.normal())
                traced = {PRIOR: cosine, NEW: -slope * change + noise * float(rng.normal())}
                traced |= {CHANGE: change, "kl_of_step": abs(change), "update_norm": 0.03}
                rows.append({**of_run, **traced, "step": step + 1})
    return study_of("dynamics", rows)


def test_larger_kl_steps_forget() -> None:
    planted = study({"grpo": 3.0, "sft-2": 4.0})
    found = section(planted)
    check(found, "dynamics")
    table = cells(found.tables[0])
    for method, label in (("grpo", "GRPO"), ("sft-2", "SFT-2")):
        own = planted.points.filter(pl.col("method") == method)
        expected = stats.pearsonr(own[PRIOR], own[CHANGE]).statistic
        per_seed = [stats.pearsonr(rows[PRIOR], rows[CHANGE]).statistic for rows in own.partition_by("seed")]
        row = table[f"{label}, prior task’s gradient"]
        assert row[0] == "450"
        assert row[1].startswith(f"{expected:.2f} [")
        assert row[2] == plus_minus(per_seed, lambda value: f"{value:.2f}")
        assert f"{label} (r = {row[1]})" in found.finding
    assert found.finding.startswith("Steps that raise KL more point more along the prior task’s gradient in GRPO (r =")
    assert ", as the paper finds; for the new task’s gradient r is −0." in found.finding


def test_larger_kl_steps_do_not_forget() -> None:
    against = section(study({"grpo": -3.0}, seeds=1)).finding
    assert against.startswith("Steps that raise KL more point less along the prior task’s gradient in GRPO (r = −0.")
    assert "against the paper" in against
    mixed = section(study({"grpo": 3.0, "sft-2": 0.0, "sft-1": -3.0}, seeds=1)).finding
    assert "more along the prior task’s gradient in GRPO" in mixed
    assert "less along the prior task’s gradient in SFT-1" in mixed
    assert "as far as can be told, in SFT-2" in mixed
    assert "the paper" not in mixed


def test_intervals_draw_blocks_not_steps() -> None:
    """Steps that are copies of their block's first are worth one each: as wide an interval as that of the firsts."""
    steps = in_blocks(study({"grpo": 2.0}, seeds=1, steps=20 * BLOCK).points)
    assert steps.group_by("block").len()["len"].to_list() == [BLOCK] * 20
    copies = steps.with_columns(pl.col(PRIOR, CHANGE).first().over("block"))
    firsts = copies.unique("block", keep="first", maintain_order=True)
    of_copies, of_firsts = (
        links(study_of("dynamics", rows.to_dicts()), rows)["grpo", PRIOR].all for rows in (copies, firsts)
    )
    assert of_copies is not None
    assert of_firsts is not None
    assert of_copies.pearson == pytest.approx(of_firsts.pearson)
    assert of_copies.pearson_interval == pytest.approx(of_firsts.pearson_interval)


def test_what_only_changes_in_the_course_of_training_is_gone_within_blocks() -> None:
    rng = np.random.default_rng(1)
    drifting = study({"grpo": 0.0}, seeds=1, steps=300, noise=0.01)
    course = drifting.points.with_columns((pl.col("step") - 1) // BLOCK / 12)
    both = {name: course["step"] + 0.05 * rng.normal(size=300) for name in (PRIOR, CHANGE)}
    steps = in_blocks(drifting.points.with_columns(**both))
    link = links(drifting, steps)["grpo", PRIOR]
    assert link.all is not None
    assert link.within is not None
    assert link.all.pearson > 0.9
    assert abs(link.within) < 0.2
    centred = [
        np.concatenate([rows[name].to_numpy() - rows[name].to_numpy().mean() for rows in steps.partition_by("block")])
        for name in (PRIOR, CHANGE)
    ]
    assert link.within == pytest.approx(stats.pearsonr(*centred).statistic)


def test_one_seed_and_few_steps(tmp_path: Path) -> None:
    found = section(study({"grpo": 3.0}, seeds=1))
    check(found, "dynamics")
    assert "(95 % intervals over blocks of steps, 1 seed)" in found.finding
    assert "±" not in found.finding
    # Two blocks are too few for an interval, and so for a claim.
    few = section(study({"grpo": 3.0}, seeds=1, steps=2 * BLOCK))
    check(few, "dynamics")
    assert "as far as can be told" in few.finding
    none = section(study({"grpo": 3.0}, seeds=1, steps=2))
    check(none, "dynamics")
    assert none.finding.startswith("The runs have too few steps")
    drawing.save(none.figure, tmp_path)


def test_figure_thins_the_drawing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "DRAWN", 100)
    found = section(study({"grpo": 3.0}, seeds=1, steps=210))
    cloud, course = found.figure.panels[0].layers
    assert isinstance(course, Points)
    assert len(cloud.x) == 70  # every third
    assert len(course.x) == 10
    assert course.y[-1] - course.y[0] > 0.05  # the planted slope
    assert found.note.startswith("210 steps of 1 run, 1 seed.")
