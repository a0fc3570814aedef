"""Cosines of steps that follow their change of KL, or not, or go against it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.keyed import numbers_of
from rlrazor.report.study import Study
from rlrazor.studies import dynamics
from rlrazor.studies.dynamics import BLOCK, CHANGE, NEW, PRIOR, STUDY, Link, in_blocks, links_of, tables_of
from study_tables import check, plus_minus, run, study_of


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


def found_in(of: Study) -> dict[str, str]:
    return numbers_of(tables_of(of, links_of(of)))


def test_larger_kl_steps_forget() -> None:
    planted = study({"grpo": 3.0, "sft-2": 4.0})
    found = found_in(planted)
    for method in ("grpo", "sft-2"):
        own = planted.points.filter(pl.col("method") == method)
        expected = stats.pearsonr(own[PRIOR], own[CHANGE]).statistic
        per_seed = [stats.pearsonr(rows[PRIOR], rows[CHANGE]).statistic for rows in own.partition_by("seed")]
        assert found[f"{method}.prior.steps"] == "450"
        assert found[f"{method}.prior.r"].startswith(f"{expected:.2f} [")
        assert found[f"{method}.prior.seeds"] == plus_minus(per_seed, lambda value: f"{value:.2f}")
        assert found[f"{method}.prior.spearman"].startswith(
            f"{stats.spearmanr(own[PRIOR], own[CHANGE]).statistic:.2f} ["
        )
        size = stats.pearsonr(own[PRIOR], own["kl_of_step"]).statistic
        assert found[f"{method}.prior.of-size"] == f"{size:.2f}".replace("-", "−")
        assert (found[f"{method}.prior.verdict"], found[f"{method}.new.verdict"]) == ("more", "less")
    section = STUDY.section(planted)
    check(section, "dynamics")
    assert section.figure.panels[0].title == f"GRPO: r = {found['grpo.prior.r']}"
    assert len(section.figure.panels) == 2 * section.figure.columns == 4


def test_larger_kl_steps_do_not_forget() -> None:
    found = found_in(study({"grpo": -3.0, "sft-2": 0.0}))
    assert (found["grpo.prior.verdict"], found["grpo.new.verdict"]) == ("less", "more")
    assert found["grpo.prior.r"].startswith("−0.")
    assert found["sft-2.prior.verdict"] == found["sft-2.new.verdict"] == "cannot be told"


def test_a_seed_whose_steps_do_not_differ_leaves_it_open() -> None:
    steps = study({"grpo": 3.0}).points.with_columns(
        pl.when(pl.col("seed") == 1).then(0.01).otherwise(CHANGE).alias(CHANGE)
    )
    assert found_in(study_of("dynamics", steps.to_dicts()))["grpo.prior.verdict"] == "not comparable"


def test_the_mean_step_weighs_seeds() -> None:
    planted = study({"grpo": 3.0})
    found = found_in(planted)
    seeds = planted.points.partition_by("seed")
    assert found["grpo.raise"] == plus_minus([float(np.mean(rows[PRIOR].to_numpy() > 0)) for rows in seeds])
    cosine = plus_minus([float(np.mean(rows[PRIOR].to_numpy())) for rows in seeds], lambda value: f"{value:.3f}")
    assert found["grpo.cos-prior"] == cosine.replace("-", "−")
    assert found["grpo.length"] == "0.03 ± 0"


def test_intervals_draw_blocks_not_steps() -> None:
    """Steps that are copies of their block's first are worth one each: as wide an interval as that of the firsts."""
    steps = in_blocks(study({"grpo": 2.0}, seeds=1, steps=20 * BLOCK).points)
    assert steps.group_by("block").len()["len"].to_list() == [BLOCK] * 20
    copies = steps.with_columns(pl.col(PRIOR, CHANGE).first().over("block"))
    firsts = copies.unique("block", keep="first", maintain_order=True)
    of_copies, of_firsts = (
        links_of(study_of("dynamics", rows.to_dicts()))["grpo", "prior"].all for rows in (copies, firsts)
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
    link = Link.of(steps, PRIOR)
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
    one = STUDY.section(study({"grpo": 3.0}, seeds=1))
    check(one, "dynamics")
    assert "cannot be told: GRPO (+0." in one.finding
    assert "±" not in one.finding
    # Two blocks are too few for an interval.
    few = study({"grpo": 3.0}, seeds=1, steps=2 * BLOCK)
    check(STUDY.section(few), "dynamics")
    assert "[" not in found_in(few)["grpo.prior.r"]
    none = study({"grpo": 3.0}, seeds=1, steps=2)
    section = STUDY.section(none)
    check(section, "dynamics")
    assert (found_in(none)["grpo.prior.r"], found_in(none)["grpo.prior.verdict"]) == ("—", "not comparable")
    drawing.save(section.figure, tmp_path)


def test_figure_thins_the_drawing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "DRAWN", 100)
    found = STUDY.section(study({"grpo": 3.0}, seeds=1, steps=210))
    cloud, course = found.figure.panels[0].layers
    assert isinstance(course, Points)
    assert len(cloud.x) == 70  # every third
    assert len(course.x) == 10
    assert course.y[-1] - course.y[0] > 0.05  # the planted slope
    assert found.paragraphs[-1].startswith("210 checkpoints, 1 run of 1 method, 1 seed.")
