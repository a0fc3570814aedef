"""Optimisers that matter and ones that do not, one law for all and one that fails, as planted."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rlrazor.analysis.statistics import with_params
from rlrazor.report import drawing
from rlrazor.report.sections import Study
from rlrazor.report.sections.optimizers import section, shared_law
from study_tables import NEWS, cells, check, plus_minus, run, study_of

JITTER = (0.0, 0.01, -0.01)  # by seed; the same for all arms, as a base's quality is
PLANTED = {
    ("grpo", None): 0.5,
    ("grpo", "sgd"): 0.6,
    ("grpo", "muon"): 0.5,
    ("sft-2", None): 0.3,
    ("sft-2", "sgd"): 0.3,
    ("sft-2", "muon"): 0.3,
}
OWN = {None: (0.0, 0.0, 0.0), "sgd": (0.01, -0.01, 0.0), "muon": (-0.01, 0.01, 0.004)}


def study(
    planted: dict[tuple[str, str | None], float],
    seeds: int = 3,
    news: tuple[float, ...] = NEWS,
    beyond: dict[str | None, float] | None = None,
) -> Study:
    """(method, optimiser) -> prior accuracy at 95 %; KL is such that forgetting is 0.1 KL, plus `beyond`."""
    rows: list[dict[str, Any]] = []
    for (method, optimizer), prior in planted.items():
        for seed in range(seeds):
            kept = prior + JITTER[seed] + OWN[optimizer][seed]
            of_run = run(method, seed, prior=kept, news=news, params={"optimizer": optimizer})
            for row in of_run:
                row["kl_forward"] = 10 * (row["forgetting"] - (beyond or {}).get(optimizer, 0.0))
            rows += of_run
    return study_of("optimizers", rows)


def kept(planted: Study, method: str, optimizer: str | None, seed: int, at: float) -> float:
    """By a loop: the most that any checkpoint keeps at new >= `at`."""
    arm = method, optimizer, seed
    rows = planted.table.to_dicts()
    return float(max(r["prior"] for r in rows if (r["method"], r["optimizer"], r["seed"]) == arm and r["new"] >= at))


def test_an_optimizer_that_matters() -> None:
    planted = study(PLANTED)
    found = section(planted)
    check(found, "optimizers")
    sgd, adamw = ([kept(planted, "grpo", name, seed, 0.95) for seed in range(3)] for name in ("sgd", None))
    gain = plus_minus([a - b for a, b in zip(sgd, adamw, strict=True)])
    assert f"at least 95%, prior accuracy against AdamW’s is, in points, for GRPO SGD +{gain} and" in found.finding
    assert (
        ": the optimiser matters for GRPO, not measurably for SFT-2; GRPO keeps more than SFT-2 with each (+20.0"
        in (found.finding)
    )
    assert "; one quadratic in forward KL explains forgetting under all with R² 1.000 (3 seeds)." in found.finding
    table, against, law = found.tables
    assert cells(table)["GRPO, SGD"][0].startswith(f"{plus_minus(sgd)} / ")
    assert cells(against)["GRPO, SGD"][0] == f"+{gain}"
    assert float(cells(against)["GRPO, SGD"][1].split(" ")[0].replace("−", "-")) == pytest.approx(-1.0)
    assert cells(law)["AdamW"] == ["42", "0.0 ± 0.0", "0.0", cells(law)["AdamW"][3]]


def test_an_optimizer_that_does_not() -> None:
    same = dict.fromkeys(PLANTED, 0.5)
    finding = section(study(same)).finding
    assert "no difference that can be told from chance; GRPO keeps measurably more than SFT-2 with none" in finding
    worse = section(study({**PLANTED, ("grpo", "sgd"): 0.4, ("sft-2", "muon"): 0.2})).finding
    assert "SGD −10.0" in worse
    assert "the optimiser matters for GRPO and SFT-2" in worse
    reversed_ = section(study({**PLANTED, ("sft-2", "muon"): 0.55})).finding
    assert "GRPO keeps measurably more than SFT-2 only with AdamW and SGD" in reversed_


def test_a_law_that_one_optimizer_breaks() -> None:
    planted = study(PLANTED, beyond={"muon": 0.1})
    points = with_params(planted.points, optimizer="adamw")
    x, y = points["kl_forward"].to_numpy(), points["forgetting"].to_numpy()
    left = y - np.polyval(np.polyfit(x, y, 2), x)
    law = shared_law(points)
    assert law is not None
    assert law.r2 == pytest.approx(1 - np.var(left) / np.var(y))
    muon = [left[(points["optimizer"] == "muon").to_numpy() & (points["seed"] == seed).to_numpy()] for seed in range(3)]
    assert law.residual["muon"].mean == pytest.approx(np.mean([part.mean() for part in muon]))
    finding = section(planted).finding
    assert "which is off for AdamW by −" in finding
    assert f"Muon by +{plus_minus([float(part.mean()) for part in muon])} points" in finding
    assert law.left_out is not None
    others = points["optimizer"] != "muon"
    fit = np.polyfit(x[others.to_numpy()], y[others.to_numpy()], 2)
    held_out = ~others.to_numpy()
    expected = np.abs(np.polyval(fit, x[held_out]) - y[held_out]).mean()
    assert law.left_out.by_method["muon"] == pytest.approx(expected)


def test_one_seed_and_arms_that_do_not_get_there(tmp_path: Path) -> None:
    one = section(study(PLANTED, seeds=1))
    check(one, "optimizers")
    assert "±" not in one.finding
    assert "(1 seed, which leaves it open)" in one.finding
    rows = study(PLANTED).points.to_dicts()
    slow = [r for r in rows if (r["method"], r["optimizer"], r["seed"]) != ("sft-2", "muon", 1) or r["new"] < 0.95]
    found = section(study_of("optimizers", slow))
    check(found, "optimizers")
    assert "; SFT-2, Muon did not get there in all seeds (3 seeds)" in found.finding
    assert cells(found.tables[0])["SFT-2, Muon"][0].endswith("(2 of 3 seeds)")
    assert "SFT-2, Muon" not in cells(found.tables[1])
    for empty in (section(study(PLANTED, news=(0.9, 0.92))), section(study({("grpo", None): 0.5}))):
        check(empty, "optimizers")
        assert empty.finding.startswith("Optimisers cannot be compared")
    drawing.save(empty.figure, tmp_path)


def test_figure_has_a_place_per_optimizer() -> None:
    panels = section(study(PLANTED)).figure.panels
    assert [panel.title for panel in panels] == [
        "Kept at new ≥ 95%",
        "Trade-off",
        "Learning against drift",
        "Forgetting law",
    ]
    assert [name for _, name in panels[0].x_ticks or ()] == ["AdamW", "SGD", "Muon"]
    assert {layer.label for layer in panels[1].layers} >= {"GRPO, Muon", "SFT-2, AdamW", "base"}
    assert panels[3].layers[-1].label == "quadratic, R² = 1.000"
    unknown = study({("grpo", None): 0.5}).points.with_columns(optimizer=pl.lit("lion"))
    assert with_params(unknown, optimizer="adamw")["optimizer"].unique().to_list() == ["lion"]
