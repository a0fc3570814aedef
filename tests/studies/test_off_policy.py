"""Stale samples that raise the KL, lower it, do nothing, or teach nothing, as planted."""

from collections.abc import Mapping
from math import log2
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy import stats

from rlrazor.analysis.statistics import threshold_most_reach, with_params
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.off_policy import NEVER_REFRESHED, STUDY
from study_tables import NEWS, check, numbers_of, plus_minus, run, study_of

Arm = tuple[str, int, bool]

JITTER = (0.0, 0.02, -0.02)  # by seed, of all arms: what a base is worth
AGES = (0, 1, 8, 64, NEVER_REFRESHED)
NAMES = {NEVER_REFRESHED: "base"}
LOW = (0.91, 0.92, 0.94)  # new accuracies of a run that does not get there


def study(planted: Mapping[Arm, float], seeds: int = 3, low: tuple[Arm, ...] = (), sft: float | None = None) -> Study:
    """(method, age, weighted) -> KL at 95 % new; a tenth of it is forgotten. SFT-2, if any, is at `sft` nats."""
    rows: list[dict[str, Any]] = []
    for (method, age, weighted), kl in planted.items():
        for seed in range(seeds):
            own = 0.003 * ((seed * (age % 7 + 1)) % 3)  # of this arm and seed alone
            params = {"staleness": age, "importance": weighted} if age else {"staleness": None, "importance": None}
            news = LOW if (method, age, weighted) in low else NEWS
            now = kl + JITTER[seed] + own
            rows += run(method, seed, news=news, kl=now, prior=0.78 - now / 10, params=params)
    if sft is not None:
        for seed in range(seeds):
            rows += run("sft-2", seed, kl=sft + JITTER[seed], params={"staleness": None, "importance": None})
    return study_of("off-policy", rows)


def both(change: float, weighted_change: float, reinforce: float) -> dict[Arm, float]:
    """KL changes evenly from one age to the next, to end this much above that of fresh samples."""
    step = {age: index / (len(AGES) - 1) for index, age in enumerate(AGES)}
    grpo = {("grpo", age, False): 1.0 + change * step[age] for age in AGES}
    weighted = {("grpo", age, True): 1.0 + weighted_change * step[age] for age in AGES if age}
    return {**grpo, **weighted, **{("reinforce", age, False): 0.8 + reinforce * step[age] for age in AGES}}


def at_97(planted: Study, arm: Arm, column: str) -> list[float]:
    """By a loop: `column` of the checkpoint with new >= 97 % that keeps most, seed by seed."""
    found = []
    for seed in range(3):
        rows = [
            row
            for row in planted.table.to_dicts()
            if (row["method"], row["staleness"] or 0, bool(row["importance"]), row["seed"]) == (*arm, seed)
            and row["new"] >= 0.97
        ]
        found.append(float(max(rows, key=lambda row: float(row["prior"]))[column]))
    return found


def nats(value: float) -> str:
    return f"{value:.2f}"


def key(arm: Arm) -> str:
    method, age, weighted = arm
    return ".".join([method, *(["weighted"] if weighted else []), *([NAMES.get(age, str(age))] if age else [])])


def doublings(planted: Study, arm: Arm, reference: Arm) -> list[float]:
    own, other = (at_97(planted, of, "kl_forward") for of in (arm, reference))
    return [log2(ours / theirs) for ours, theirs in zip(own, other, strict=True)]


def test_each_series_as_planted() -> None:
    planted = study(both(2.0, 0.0, -0.4), sft=3.5)
    found = numbers_of(planted)
    fresh = ("grpo", 0, False)
    for arm, verdict in (
        (("grpo", NEVER_REFRESHED, False), "worse"),
        (("grpo", NEVER_REFRESHED, True), "cannot be told"),
        (("reinforce", NEVER_REFRESHED, False), "better"),
    ):
        assert found[f"{key(arm)}.verdict"] == found[f"{key(arm)}.fresh.verdict"] == verdict
        assert found[f"{key(arm)}.kl"] == plus_minus(at_97(planted, arm, "kl_forward"), nats)
        assert found[f"{key(arm)}.prior"] == plus_minus(at_97(planted, arm, "prior"))
    for arm in (("grpo", 8, False), ("grpo", 64, False), ("grpo", NEVER_REFRESHED, False)):
        assert found[f"{key(arm)}.fresh.gap"] == "+" + plus_minus(doublings(planted, arm, fresh), nats)
    # On fresh samples all weights are 1: the weighted are compared with the runs of the others.
    assert "grpo.weighted.kl" not in found
    assert found["sft-2.kl"] == plus_minus([3.51, 3.53, 3.49], nats)
    assert (found["grpo.base.sft-2.verdict"], found["grpo.8.best"]) == ("better", "97.3 ± 0.0")


def test_the_opposite() -> None:
    found = numbers_of(study(both(-0.6, 1.5, 0.0), sft=0.1))
    assert found["grpo.base.verdict"] == "better"
    assert found["grpo.base.gap"].startswith("−1.")  # to less than half of 1 nat
    assert found["grpo.weighted.base.verdict"] == found["grpo.base.sft-2.verdict"] == "worse"
    assert found["reinforce.base.verdict"] == "cannot be told"
    section = STUDY.section(study(both(-0.6, 1.5, 0.0)))
    check(section, "off-policy")
    assert section.finding.startswith("Forward KL at new ≥ 97% against that on fresh samples: better: GRPO, age ∞ (−1.")
    assert "cannot be told: 1-0 REINFORCE, age ∞ (" in section.finding
    assert "SFT-2" not in section.finding


def test_lasting_differences_begin_where_planted() -> None:
    flat = both(0.0, 0.0, 0.0)
    late = {**flat, ("grpo", 64, False): 2.0, ("grpo", NEVER_REFRESHED, False): 2.5, ("grpo", NEVER_REFRESHED, True): 3}
    found = numbers_of(study(late))
    assert (found["grpo.lasting"], found["grpo.weighted.lasting"], found["reinforce.lasting"]) == ("64", "∞", "—")
    # One age that stands out, among older ones that do not, is no beginning.
    early = numbers_of(study({**flat, ("grpo", 8, False): 2.0}))
    assert (early["grpo.8.fresh.verdict"], early["grpo.lasting"]) == ("worse", "—")
    # One at which nothing is learnt neither begins nor ends it.
    gap = numbers_of(study({**late, ("grpo", 8, False): 2.0}, low=(("grpo", 64, False), ("grpo", 1, False))))
    assert (gap["grpo.64.fresh.verdict"], gap["grpo.lasting"]) == ("not comparable", "8")


def test_axes_show_the_means_and_what_they_can_of_the_intervals() -> None:
    planted = study(both(2.0, 0.0, -0.4))
    unsure = pl.when(pl.col("seed") == 0, pl.col("staleness") == 8).then(0.3).otherwise(0.0)
    points = planted.points.with_columns(prior=pl.col("prior") - unsure)
    unsure_study = Study(planted.name, planted.description, points, points, planted.bases)
    drift, kept, _ = STUDY.section(unsure_study).figure.panels
    kl = [arm for panel in (drift,) for layer in panel.layers if isinstance(layer, Points) for arm in layer.y]
    assert drift.y.log
    assert drift.y.range == pytest.approx((min(kl) / 2, max(kl) * 2))
    ends = [
        (layer.interval.low, layer.interval.high)
        for layer in kept.layers
        if isinstance(layer, Points) and layer.interval
    ]
    assert kept.y.range is not None
    assert max(high.max() for _, high in ends) > 1
    assert kept.y.range[1] == 1.04
    assert -0.04 <= kept.y.range[0] < min(low.min() for low, _ in ends)


def test_rank_correlation_of_what_is_kept_with_the_kl() -> None:
    planted = study(both(2.0, 0.5, -0.4))
    kl, prior = [], []
    for arm in both(0, 0, 0):
        kl.append(sum(at_97(planted, arm, "kl_forward")))
        prior.append(sum(at_97(planted, arm, "prior")))
    rank = stats.spearmanr(kl, prior).statistic
    found = numbers_of(planted)
    assert (found["ranks.correlation"], found["ranks.arms"]) == (f"−{-rank:.3f}", "14")


def test_some_never_get_there(tmp_path: Path) -> None:
    oldest: Arm = ("grpo", NEVER_REFRESHED, False)
    planted = study(both(0.0, 0.0, 0.0), low=(oldest, ("grpo", 64, False)))
    section, found = STUDY.section(planted), numbers_of(planted)
    check(section, "off-policy")
    assert (found["grpo.base.verdict"], found["grpo.base.kl"], found["grpo.base.n"]) == ("not comparable", "—", "—")
    assert "not comparable: GRPO, age ∞." in section.finding
    assert found["grpo.base.best"] == found["grpo.base.last"] == "94.0 ± 0.0"
    for panel in section.figure.panels[:2]:
        [marks] = [layer for layer in panel.layers if layer.label.startswith("never reaches")]
        assert isinstance(marks, Points)
        assert marks.hover
        assert [row[0] for row in marks.hover.rows] == ["GRPO, age 64", "GRPO, age ∞"]
        assert marks.x.round().tolist() == [3, 4]
    drawing.save(section.figure, tmp_path)
    assert drawing.to_html(section.figure, with_library=False)


def test_the_highest_threshold_that_most_reach() -> None:
    """By counting: of 14 settings, so many stop at 94, at 95.4 and at 96.3 %."""
    by, levels = ["method", "staleness", "importance"], (0.95, 0.96, 0.97)
    for stop_94, stop_95, stop_96, expected in (
        (6, 0, 0, 0.97),
        (0, 0, 1, 0.97),
        (0, 0, 7, 0.96),
        (0, 8, 0, 0.95),
        (8, 6, 0, 0.95),
    ):
        tops = [0.94] * stop_94 + [0.954] * stop_95 + [0.963] * stop_96
        rows = [
            row
            for index in range(14)
            for row in run("grpo", 0, news=(0.92, [*tops, *[0.973] * 14][index]), params={"staleness": index})
        ]
        few = with_params(study_of("off-policy", rows).points, importance=False)
        bases = pl.DataFrame({"new": [0.91]})
        assert threshold_most_reach(few, bases, by, levels) == expected
        assert threshold_most_reach(few, pl.DataFrame({"new": [0.98]}), by, levels) is None
    arms = both(0.0, 0.0, 0.0)
    nothing = STUDY.section(study(arms, low=tuple(arms)))
    assert nothing.finding.startswith("Nothing can be compared: no arm reaches a new score of 95%")
    assert [panel.title for panel in nothing.figure.panels] == ["What is learnt at all"]


def test_methods_that_cannot_be_stale_do_not_choose_where_to_compare() -> None:
    rows = study(both(0.0, 0.0, 0.0)).points.to_dicts()
    for index in range(20):
        rows += run(f"other-{index}", 0, news=(0.92, 0.954), params={"staleness": None, "importance": None})
    assert STUDY.section(study_of("off-policy", rows)).figure.panels[0].title == "Drift at new ≥ 97%"


def test_one_seed() -> None:
    planted = study(both(2.0, 0.0, -0.4), seeds=1)
    found = numbers_of(planted)
    assert not any("±" in text for text in found.values())
    assert (found["grpo.kl"], found["grpo.base.kl"], found["grpo.base.verdict"]) == ("1.01", "3.01", "cannot be told")
    assert found["grpo.lasting"] == "—"


@pytest.mark.parametrize("params", [{}, {"staleness": None}, {"staleness": 0, "importance": False}])
def test_no_stale_samples(params: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for seed in range(2) for row in run("grpo", seed, params=params)]
    section = STUDY.section(study_of("off-policy", rows))
    assert section.finding.endswith("not comparable: there are no runs to compare.")
    check(section, "off-policy")
    drawing.save(section.figure, tmp_path)


def test_quick_arms() -> None:
    """Three ages, and no weights of REINFORCE."""
    planted = study({arm: kl for arm, kl in both(2.0, 1.0, 0.0).items() if arm[1] in (0, 8, NEVER_REFRESHED)}, seeds=1)
    drift = STUDY.section(planted).figure.panels[0]
    lines = [layer.label for layer in drift.layers if isinstance(layer, Points) and layer.marker.line]
    assert lines == ["GRPO", "weighted GRPO", "1-0 REINFORCE"]
    assert [name for _, name in drift.x.ticks or ()] == ["0", "8", "∞"]
    assert all(layer.x.size == 3 for layer in drift.layers if layer.label in lines)  # the weighted from age 0, too
    check(STUDY.section(planted), "off-policy")
