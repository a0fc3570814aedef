"""Methods that beat GRPO + KL, lose to it, or never learn, by base and group size, as planted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlrazor.analysis import law
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.kl_minimal import section, settings_of
from study_tables import cells, check, plus_minus, run, study_of

Setting = tuple[float, int]

LABELS = {"grpo": "GRPO", "grpo+kl": "GRPO + KL", "kl-dpg": "KL-DPG", "natural-pg": "natural PG"}
GOOD, BAD, SMALL = (1.0, 64), (0.05, 64), (0.05, 8)
BASE_NEW = {1.0: 0.91, 0.05: 0.04}
EXPECTED = {1.0: 0.88, 0.05: 0.07}
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
                    news=(news or {}).get(((share, group), method), NEWS[share, group]),
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


def test_who_beats_grpo_with_kl() -> None:
    worse = {**KEPT, "kl-dpg": 0.45, "natural-pg": 0.6}
    planted = study({GOOD: KEPT, BAD: worse})
    found = section(planted)
    check(found, "kl-minimal")
    better, behind = gain(planted, GOOD, "kl-dpg", 0.97), gain(planted, GOOD, "natural-pg", 0.97)
    assert min(better) > 0 > max(behind)
    level = gain(planted, BAD, "natural-pg", 0.9)
    assert abs(sum(level)) < 0.02
    assert found.finding == (
        "Compared with GRPO + KL, with a base that is right 89.0 % of the time: at 97% new KL-DPG keeps more prior "
        f"accuracy (KL-DPG +{plus_minus(better)} points), natural PG keeps less; 8.0 % of the time: at 90% new KL-DPG "
        "keeps less, natural PG keeps not measurably more or less; exploration fails none of them: all learn, to 93.0 "
        "% new or more (3 seeds)."
    )
    compared, explored, weights = found.tables
    [row] = [row for row in compared.rows if row[0].startswith("base 89.0 %") and row[1] == "KL-DPG"]
    assert row[:3] == ["base 89.0 %, groups of 64", "KL-DPG", "≥ 97%"]
    assert row[4] == f"+{plus_minus(better)}"
    assert row[6:] == ["0.5 ± 0", "0.2 ± 0", "0.03 ± 0"]
    assert cells(explored)["base 8.0 %, groups of 64"][2:] == ["93.0 ± 0.0"] * 4
    # Misses (1 - p)^64 of p = 7, 8 and 9 %; the ESS of three checkpoints is .1, .2, .3 and .01 a seed.
    misses = [(1 - p) ** 64 for p in (0.07, 0.08, 0.09)]
    assert cells(explored)["base 8.0 %, groups of 64"][1] == plus_minus(misses)
    assert list(weights.rows[0][2:]) == [
        plus_minus([0.88, 0.89, 0.90]),
        plus_minus([0.1, 0.11, 0.12]),
        plus_minus([0.3, 0.31, 0.32]),
        f"{1 / 0.31 - 1:.3g}",
    ]


def test_exploration_fails() -> None:
    slow = {(BAD, "natural-pg"): (0.05, 0.2, 0.45), (SMALL, "kl-dpg"): (0.05, 0.6, 0.9)}
    found = section(study({GOOD: KEPT, BAD: KEPT, SMALL: KEPT}, news=slow))
    check(found, "kl-minimal")
    assert "8.0 % of the time: at 90% new KL-DPG keeps more prior accuracy (KL-DPG +10" in found.finding
    assert "natural PG never gets there, exploration fails natural PG (45.0 ± 0.0 % new);" in found.finding
    few = 100 * sum((1 - p) ** 8 for p in (0.07, 0.08, 0.09)) / 3
    assert (
        f"; 8.0 % of the time and groups of 8, of which at least {few:.1f} % hold nothing correct: KL-DPG (90.0 ± 0.0 "
        "% new) learns more than its 40.0 ± 0.0, at 90% new KL-DPG gets there, GRPO + KL and natural PG never get "
        "there, exploration fails natural PG (40.0 ± 0.0 % new) (3 seeds)."
    ) in found.finding
    assert "exploration fails none" not in found.finding
    [marks] = [layer for layer in found.figure.panels[0].layers if layer.label == "never gets there"]
    assert isinstance(marks, Points)
    assert [row[0] for row in marks.rows] == ["natural PG", "GRPO", "GRPO + KL", "natural PG"]


def test_nobody_learns() -> None:
    found = section(study({GOOD: KEPT, SMALL: KEPT}))
    check(found, "kl-minimal")
    assert "no method learns enough to compare (best: GRPO, 40.0 ± 0.0 % new) (3 seeds)." in found.finding
    assert "exploration fails none" not in found.finding
    assert {row[0] for row in found.tables[0].rows} == {"base 89.0 %, groups of 64"}


def test_grpo_with_kl_is_the_one_that_fails() -> None:
    found = section(study({BAD: KEPT}, news={(BAD, "grpo+kl"): (0.05, 0.2)}))
    assert (
        ": KL-DPG (93.0 ± 0.0 % new) and natural PG (93.0 ± 0.0 % new) learn more than its 20.0 ± 0.0," in found.finding
    )
    assert "at 90% new KL-DPG and natural PG get there, GRPO + KL never gets there; exploration" in found.finding


def test_what_chance_can_do_is_no_gain() -> None:
    """One seed in which KL-DPG keeps much more, two in which it does not."""
    planted = study({GOOD: {"grpo+kl": 0.6, "kl-dpg": 0.6}})
    lucky = (pl.col("method") == "kl-dpg") & (pl.col("seed") == 1)
    points = planted.points.with_columns(prior=pl.col("prior") + pl.when(lucky).then(0.1).otherwise(0.0))
    found = section(Study("kl-minimal", planted.description, planted.table, points, planted.bases))
    assert "at 97% new none keeps measurably more or less prior accuracy (KL-DPG +3." in found.finding


def test_rarely_empty_groups_are_not_mentioned() -> None:
    [good, bad] = settings_of(study({GOOD: KEPT, SMALL: KEPT}))
    assert good.without.mean < 1e-30
    assert bad.without.mean == pytest.approx(sum((1 - p) ** 8 for p in (0.07, 0.08, 0.09)) / 3)
    assert good.threshold == 0.97
    assert bad.threshold is None


def test_threshold_is_above_the_base() -> None:
    """A base that is at 91 % leaves 95 % as the lowest threshold, however little most runs learn."""
    [setting] = settings_of(study({GOOD: KEPT}, news={(GOOD, method): (0.92, 0.93) for method in KEPT}))
    assert setting.threshold is None


def test_one_seed(tmp_path: Path) -> None:
    found = section(study({GOOD: KEPT, BAD: KEPT}, seeds=1))
    check(found, "kl-minimal")
    assert "±" not in found.finding
    assert "KL-DPG keeps more prior accuracy (KL-DPG +10.2 points), natural PG keeps less" in found.finding
    assert found.finding.endswith("(1 seed, which leaves it open).")
    drawing.save(found.figure, tmp_path)
    assert drawing.to_html(found.figure, with_library=False)


@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        (("grpo", "grpo+kl"), "methods that aim at the KL-minimal policy"),
        (("grpo", "kl-dpg"), "GRPO + KL"),
    ],
)
def test_missing_arm(methods: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    found = section(study({GOOD: {method: KEPT[method] for method in methods}}))
    check(found, "kl-minimal")
    assert found.finding == f"The study has no runs of {missing}, so there is nothing to compare."
    drawing.save(found.figure, tmp_path)


def test_columns_that_no_arm_sets() -> None:
    planted = study({GOOD: KEPT})
    points, bases = (table.drop("pretrain_accuracy") for table in (planted.points, planted.bases))
    found = section(Study("kl-minimal", planted.description, planted.table, points, bases))
    assert found.finding == section(planted).finding
