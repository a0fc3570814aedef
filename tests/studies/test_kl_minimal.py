"""Methods that beat GRPO + KL, lose to it, or never learn, by base and group size, as planted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlrazor.analysis import law
from rlrazor.errors import RazorError
from rlrazor.report import drawing, keyed
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.kl_minimal import DRIFTS, METHODS, STUDY, settings_of, tables_of
from study_tables import check, plus_minus, run, study_of

Setting = tuple[float, int]

LABELS = {"grpo": "GRPO", "grpo+kl": "GRPO + KL", "kl-dpg": "KL-DPG", "natural-pg": "natural PG"}
GOOD, BAD, SMALL = (1.0, 64), (0.05, 64), (0.05, 8)
BASE_NEW = {1.0: 0.91, 0.3: 0.5, 0.05: 0.04, 0.0: 0.04}
EXPECTED = {1.0: 0.88, 0.3: 0.3, 0.05: 0.07, 0.0: 0.07}
NEWS = {GOOD: (0.94, 0.96, 0.972), BAD: (0.5, 0.9, 0.93), SMALL: (0.05, 0.3, 0.4)}
JITTER = (0.0, 0.02, -0.02)
KEPT = {"grpo": 0.5, "grpo+kl": 0.6, "kl-dpg": 0.7, "natural-pg": 0.55}


def study(
    kept: Mapping[Setting, Mapping[str, float]],
    seeds: int = 3,
    news: Mapping[tuple[Setting, str], tuple[float, ...]] | None = None,
) -> Study:
    """(pretrain accuracy, group) -> method -> prior accuracy. ESS rises from checkpoint to checkpoint by a tenth."""
    rows: list[dict[str, Any]] = []
    bases: list[dict[str, Any]] = []
    for share, group in kept:
        params = {"pretrain_accuracy": None if share == 1 else share, "group_size": group}
        for seed in range(seeds):
            expected = EXPECTED[share] + 0.01 * seed
            name = {"run_id": f"base {share} {seed}", "trajectory": f"base {share} {seed}", "method": "base"}
            scores = {"new": BASE_NEW[share], "prior": 0.78, "new_expected": expected, "relative_ess": expected}
            if not any(base["run_id"] == name["run_id"] for base in bases):
                bases.append(
                    {**name, **scores, "seed": seed, "step": 0, "pretrain_accuracy": params["pretrain_accuracy"]}
                )
            for index, (method, prior) in enumerate(kept[share, group].items()):
                own = 0.002 * ((seed + index) % 3)
                of_run = run(
                    method,
                    seed,
                    news=(news or {}).get(((share, group), method), NEWS.get((share, group), NEWS[GOOD])),
                    prior=prior + JITTER[seed] + own,
                    kl=1 - prior,
                    params=params,
                    kl_reverse=0.5,
                    kl_forward_within_correct=0.2,
                    kl_reverse_within_correct=0.01 * (index + 1),
                )
                for row in of_run:
                    row["relative_ess"] = 0.1 * (row["step"] + index) + 0.01 * seed
                rows += of_run
    tuned = study_of("kl-minimal", rows).points
    table = pl.concat([pl.DataFrame(bases, infer_schema_length=None), tuned], how="diagonal_relaxed")
    bases_only = table.filter(pl.col("method") == "base")
    return Study("kl-minimal", {"labels": LABELS}, table, law.distinct(table), bases_only)


def gain(planted: Study, setting: Setting, method: str, at: float) -> list[float]:
    """By a loop: what the best checkpoint keeps beyond that of GRPO + KL, seed by seed."""
    share = None if setting[0] == 1 else setting[0]
    best: dict[tuple[str, int], float] = {}
    for row in planted.points.to_dicts():
        if (row["pretrain_accuracy"], row["group_size"]) == (share, setting[1]) and row["new"] >= at:
            key = row["method"], row["seed"]
            best[key] = max(best.get(key, 0.0), row["prior"])
    return [best[method, seed] - best["grpo+kl", seed] for seed in range(3)]


def numbers_of(of: Study) -> dict[str, str]:
    return keyed.numbers_of(tables_of(of, settings_of(of)))


def example() -> Study:
    """What the paper preset leaves, for the text."""
    settings = ((1.0, 64), (0.3, 64), (0.0, 64), (0.0, 8))
    return study({setting: dict.fromkeys(METHODS, 0.5) for setting in settings})


def test_who_beats_grpo_with_kl() -> None:
    worse = {**KEPT, "kl-dpg": 0.45, "natural-pg": 0.6}
    planted = study({GOOD: KEPT, BAD: worse})
    better, behind = gain(planted, GOOD, "kl-dpg", 0.97), gain(planted, GOOD, "natural-pg", 0.97)
    assert min(better) > 0 > max(behind)
    assert abs(sum(gain(planted, BAD, "natural-pg", 0.9))) < 0.02
    found = numbers_of(planted)
    assert (found["1-64.at"], found["0.05-64.at"]) == ("≥ 97%", "≥ 90%")
    assert (found["1-64.kl-dpg.gap"], found["1-64.kl-dpg.verdict"]) == (f"+{plus_minus(better)}", "better")
    assert found["1-64.natural-pg.verdict"] == found["0.05-64.kl-dpg.verdict"] == "worse"
    assert found["0.05-64.natural-pg.verdict"] == "cannot be told"
    assert found["1-64.kl-dpg.kl_forward"] == "0.311 ± 0"  # 0.3, and half of what 97.2 % is beyond 95 %
    within = [found[f"1-64.kl-dpg.{name}"] for name in list(DRIFTS)[1:]]
    assert within == ["0.5 ± 0", "0.2 ± 0", "0.03 ± 0"]
    section = STUDY.section(planted)
    check(section, "kl-minimal")
    assert f"Base 89.0 %, groups of 64, new ≥ 97%: better: KL-DPG (+{plus_minus(better)} points); " in section.finding


def test_bases_and_weights_by_other_means() -> None:
    """Misses (1 - p)^64 of p = 7, 8 and 9 %; the ESS of three checkpoints is .1, .2, .3 and .01 a seed."""
    found = numbers_of(study({GOOD: KEPT, BAD: KEPT, SMALL: KEPT}))
    assert found["0.05-64.without"] == plus_minus([(1 - p) ** 64 for p in (0.07, 0.08, 0.09)])
    assert found["0.05-8.without"] == plus_minus([(1 - p) ** 8 for p in (0.07, 0.08, 0.09)])
    assert found["0.05-64.expected"] == plus_minus([0.07, 0.08, 0.09])
    assert found["0.05-64.greedy"] == "4.0 ± 0.0"
    assert found["1-64.base-ess"] == plus_minus([0.88, 0.89, 0.90])
    assert found["1-64.grpo.ess.first"] == plus_minus([0.1, 0.11, 0.12])
    assert found["1-64.grpo.ess.end"] == plus_minus([0.3, 0.31, 0.32])
    assert found["1-64.grpo.variance"] == f"{1 / 0.31 - 1:.3g}"


def test_exploration_fails() -> None:
    slow = {(BAD, "natural-pg"): (0.05, 0.2, 0.45), (SMALL, "kl-dpg"): (0.05, 0.6, 0.9)}
    planted = study({GOOD: KEPT, BAD: KEPT, SMALL: KEPT}, news=slow)
    found = numbers_of(planted)
    assert found["0.05-64.kl-dpg.verdict"] == "better"
    assert found["0.05-64.natural-pg.verdict"] == "not comparable"
    assert (found["0.05-64.natural-pg.best.new"], found["0.05-64.natural-pg.best.gap"]) == ("45.0 ± 0.0", "−48.0 ± 0.0")
    assert found["0.05-64.natural-pg.best.verdict"] == "worse"
    assert found["0.05-64.kl-dpg.best.verdict"] == "cannot be told"
    # GRPO + KL itself does not get there: KL-DPG keeps something, and learns more, but nothing is compared.
    assert (found["0.05-8.grpo+kl.prior"], found["0.05-8.kl-dpg.verdict"]) == ("—", "not comparable")
    assert found["0.05-8.kl-dpg.prior"] != "—"
    assert found["0.05-8.kl-dpg.best.verdict"] == "better"
    [marks] = [layer for layer in STUDY.section(planted).figure.panels[0].layers if layer.label == "never gets there"]
    assert isinstance(marks, Points)
    assert marks.hover is not None
    assert sorted(row[0] for row in marks.hover.rows) == ["GRPO", "GRPO + KL", "natural PG", "natural PG"]


def test_nothing_is_shown_where_nobody_learns() -> None:
    planted = study({GOOD: KEPT, SMALL: KEPT})
    found = numbers_of(planted)
    assert found["0.05-8.at"] == "—"
    assert {found[f"0.05-8.{method}.prior"] for method in KEPT} == {"—"}
    assert found["0.05-8.kl-dpg.verdict"] == "not comparable"
    section = STUDY.section(planted)
    check(section, "kl-minimal")
    assert "groups of 8, new —: not comparable: GRPO, KL-DPG, natural PG." in section.finding


def test_what_chance_can_do_is_no_gain() -> None:
    """One seed in which KL-DPG keeps much more, two in which it does not."""
    planted = study({GOOD: {"grpo+kl": 0.6, "kl-dpg": 0.6}})
    lucky = (pl.col("method") == "kl-dpg") & (pl.col("seed") == 1)
    points = planted.points.with_columns(prior=pl.col("prior") + pl.when(lucky).then(0.1).otherwise(0.0))
    found = numbers_of(replace(planted, points=points))
    assert found["1-64.kl-dpg.gap"].startswith("+3.")
    assert found["1-64.kl-dpg.verdict"] == "cannot be told"


def test_threshold_is_above_the_base() -> None:
    """A base that is at 91 % leaves 95 % as the lowest threshold, however little most runs learn."""
    [setting] = settings_of(study({GOOD: KEPT}, news={(GOOD, method): (0.92, 0.93) for method in KEPT}))
    assert not setting.compared.reached


def test_one_seed(tmp_path: Path) -> None:
    planted = study({GOOD: KEPT, BAD: KEPT}, seeds=1)
    section = STUDY.section(planted)
    check(section, "kl-minimal")
    assert "±" not in section.finding
    found = numbers_of(planted)
    assert (found["1-64.kl-dpg.gap"], found["1-64.kl-dpg.verdict"]) == ("+10.2", "cannot be told")
    drawing.save(section.figure, tmp_path)
    assert drawing.to_html(section.figure, with_library=False)


@pytest.mark.parametrize("methods", [("grpo", "grpo+kl"), ("grpo", "kl-dpg")])
def test_missing_arm(methods: tuple[str, ...], tmp_path: Path) -> None:
    planted = study({GOOD: {method: KEPT[method] for method in methods}})
    found = numbers_of(planted)
    told = {found[f"1-64.{method}.verdict"] for method in methods}
    assert told == ({"worse", "—"} if "grpo+kl" in methods else {"not comparable"})
    section = STUDY.section(planted)
    check(section, "kl-minimal")
    drawing.save(section.figure, tmp_path)


def test_columns_that_no_arm_sets() -> None:
    planted = study({GOOD: KEPT})
    points, bases = (table.drop("pretrain_accuracy") for table in (planted.points, planted.bases))
    assert numbers_of(replace(planted, points=points, bases=bases)) == numbers_of(planted)


def test_runs_whose_base_is_missing() -> None:
    planted = study({GOOD: KEPT, BAD: KEPT})
    with pytest.raises(RazorError, match="lacks the base of some of its runs"):
        STUDY.section(replace(planted, bases=planted.bases.filter(pl.col("pretrain_accuracy").is_null())))
