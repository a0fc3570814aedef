"""Stale samples that raise the KL, lower it, do nothing, or teach nothing, as planted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy import stats

from rlrazor.analysis.statistics import threshold_most_reach, with_params
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.study import Study
from rlrazor.studies.off_policy import NEVER_REFRESHED, section, series_of
from study_tables import NEWS, cells, check, plus_minus, run, study_of

Arm = tuple[str, int, bool]

JITTER = (0.0, 0.02, -0.02)  # by seed, of all arms: what a base is worth
AGES = (0, 1, 8, 64, NEVER_REFRESHED)
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


def test_each_series_as_planted() -> None:
    planted = study(both(2.0, 0.0, -0.4), sft=3.5)
    found = section(planted)
    check(found, "off-policy")
    ends = {
        arm: plus_minus(at_97(planted, arm, "kl_forward"), nats)
        for arm in (("grpo", 0, False), ("grpo", NEVER_REFRESHED, False), ("grpo", NEVER_REFRESHED, True))
    }
    fresh, oldest, weighted = ends.values()
    assert found.finding.startswith(
        f"At 97% new accuracy, samples of the base (age ∞) instead of fresh ones raise the forward KL of GRPO ({fresh} "
        f"→ {oldest} nats), lower that of 1-0 REINFORCE (0.8"
    )
    assert f"do not measurably change that of weighted GRPO ({fresh} → {weighted} nats);" in found.finding
    assert found.finding.endswith(f"; SFT-2 is at {plus_minus([3.51, 3.53, 3.49], nats)} (3 seeds).")
    drift, prior, best, last = found.tables
    assert drift.headers[1:] == ["0", "1", "8", "64", "∞"]
    # At age 0 all weights are 1: the weighted series starts with the runs of the other.
    assert cells(drift)["weighted GRPO"][0] == cells(drift)["GRPO"][0] == fresh
    assert cells(prior)["GRPO"][3] == plus_minus(at_97(planted, ("grpo", 64, False), "prior"))
    assert cells(best)["GRPO"] == cells(last)["GRPO"] == ["97.3 ± 0.0"] * 5


def test_the_opposite() -> None:
    finding = section(study(both(-0.6, 1.5, 0.0))).finding
    assert "raise the forward KL of weighted GRPO (" in finding
    assert "lower that of GRPO (" in finding
    assert "do not measurably change that of 1-0 REINFORCE (" in finding
    assert "SFT-2" not in finding


def test_lasting_differences_begin_where_planted() -> None:
    flat = both(0.0, 0.0, 0.0)
    late = {**flat, ("grpo", 64, False): 2.0, ("grpo", NEVER_REFRESHED, False): 2.5, ("grpo", NEVER_REFRESHED, True): 3}
    finding = section(study(late)).finding
    assert "; lasting differences begin at age 64 for GRPO and ∞ for weighted GRPO (3 seeds)." in finding
    # One age that stands out, among older ones that do not, is no beginning.
    assert "lasting" not in section(study({**flat, ("grpo", 8, False): 2.0})).finding


def test_axes_show_the_means_and_what_they_can_of_the_intervals() -> None:
    planted = study(both(2.0, 0.0, -0.4))
    unsure = pl.when(pl.col("seed") == 0, pl.col("staleness") == 8).then(0.3).otherwise(0.0)
    points = planted.points.with_columns(prior=pl.col("prior") - unsure)
    drift, kept, _ = section(Study(planted.name, planted.description, points, points, planted.bases)).figure.panels
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
    assert (
        f"the 14 settings that get to 97%, prior accuracy and forward KL have a rank correlation of −{-rank:.3f}."
        in (section(planted).note)
    )


def test_some_never_get_there(tmp_path: Path) -> None:
    oldest: Arm = ("grpo", NEVER_REFRESHED, False)
    found = section(study(both(0.0, 0.0, 0.0), low=(oldest, ("grpo", 64, False))))
    check(found, "off-policy")
    assert "; GRPO never gets there on them; lasting differences begin at age 64 for GRPO" in found.finding
    assert cells(found.tables[0])["GRPO"][3:] == ["—", "—"]
    assert cells(found.tables[2])["GRPO"][4] == "94.0 ± 0.0"
    for panel in found.figure.panels[:2]:
        [marks] = [layer for layer in panel.layers if layer.label.startswith("never reaches")]
        assert isinstance(marks, Points)
        assert marks.hover
        assert [row[0] for row in marks.hover.rows] == ["GRPO, age 64", "GRPO, age ∞"]
        assert marks.x.round().tolist() == [3, 4]
    drawing.save(found.figure, tmp_path)
    assert drawing.to_html(found.figure, with_library=False)


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
    assert "No run reaches a new accuracy of 95% at whatever age of its samples (the best: 94.0%)" in (
        section(study(arms, low=tuple(arms))).finding
    )


def test_one_seed() -> None:
    finding = section(study(both(2.0, 0.0, -0.4), seeds=1)).finding
    assert "±" not in finding
    assert "raise the forward KL of GRPO (1.01 → 3.01 nats)" in finding
    assert "lasting" not in finding
    assert finding.endswith("(1 seed, which leaves it open).")


@pytest.mark.parametrize("params", [{}, {"staleness": None}, {"staleness": 0, "importance": False}])
def test_no_stale_samples(params: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for seed in range(2) for row in run("grpo", seed, params=params)]
    found = section(study_of("off-policy", rows))
    assert found.finding == "The study has no runs on stale samples, so nothing can be said of their age."
    check(found, "off-policy")
    drawing.save(found.figure, tmp_path)


def test_quick_arms() -> None:
    """Three ages, and no weights of REINFORCE."""
    planted = study({arm: kl for arm, kl in both(2.0, 1.0, 0.0).items() if arm[1] in (0, 8, NEVER_REFRESHED)}, seeds=1)
    assert [one.label for one in series_of(planted)] == ["GRPO", "weighted GRPO", "1-0 REINFORCE"]
    check(section(planted), "off-policy")
