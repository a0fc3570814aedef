"""Optimisers that matter and ones that do not, as planted."""

import pytest

from rlrazor.report.study import Study
from rlrazor.runs.records import RunSpec
from rlrazor.studies.optimizers import STUDY
from study_tables import NEWS, check, numbers_of, planted

OWN = {"adamw": (0.0, 0.0, 0.0), "sgd": (0.01, -0.01, 0.0), "muon": (-0.01, 0.01, 0.004)}


def study(kept: dict[tuple[str, str], float], low: tuple[str, str] | None = None) -> Study:
    """(method, optimiser) -> prior accuracy at 95 %, of 0.5 else."""

    def arm(spec: RunSpec) -> tuple[str, str]:
        return spec.method, spec.params.get("optimizer", "adamw")

    return planted(
        "optimizers",
        lambda spec: kept.get(arm(spec), 0.5) + OWN[arm(spec)[1]][spec.seed],
        news=lambda spec: (0.92, 0.94) if arm(spec) == low else NEWS,
    )


def test_verdicts_follow_what_is_planted() -> None:
    found = numbers_of(study({("grpo", "sgd"): 0.6, ("sft-2", "muon"): 0.4, ("sft-2", "adamw"): 0.5}))
    assert found["grpo.sgd.verdict"] == "better"
    assert found["grpo.sgd.gap"].startswith("+10.0 ± ")
    assert found["grpo.muon.verdict"] == found["sft-2.sgd.verdict"] == "cannot be told"
    assert found["sft-2.muon.verdict"] == "worse"
    assert found["grpo.sgd.sft-2.verdict"] == found["grpo.muon.sft-2.verdict"] == "better"
    assert found["grpo.adamw.sft-2.verdict"] == "cannot be told"
    opposite = numbers_of(study({("grpo", "sgd"): 0.4, ("sft-2", "muon"): 0.6}))
    assert (opposite["grpo.sgd.verdict"], opposite["sft-2.muon.verdict"]) == ("worse", "better")
    assert opposite["grpo.muon.sft-2.verdict"] == "worse"


def test_section_has_every_optimizer() -> None:
    section = STUDY.section(study({("grpo", "sgd"): 0.6}, low=("sft-2", "muon")))
    check(section, "optimizers")
    assert "better: GRPO, SGD (+10.0" in section.finding
    assert "not comparable: SFT-2, Muon. The budgets differ, by runs in a seed. 3: " in section.finding
    assert section.finding.endswith("; 1: GRPO, Muon, SFT-2, Muon.")
    titles = ["Kept at new ≥ 95%", "Trade-off", "Learning against drift", "Forgetting law"]
    titles += ["Forgotten at new ≥ 95% (triangle at the edge: never there)", "How far each learning rate gets"]
    assert [panel.title for panel in section.figure.panels] == titles
    assert [name for _, name in section.figure.panels[0].x.ticks or ()] == ["AdamW", "SGD", "Muon"]
    assert {layer.label for layer in section.figure.panels[1].layers} >= {"GRPO, Muon", "SFT-2, AdamW", "base"}


@pytest.mark.parametrize(("quick", "optimizers"), [(True, 3), (False, 3)])
def test_both_methods_learn_with_each(quick: bool, optimizers: int) -> None:
    pairs = {(s.method, s.params.get("optimizer")) for grid in STUDY.grids(quick) for s in grid.specs((0,), "data")}
    assert len(pairs) == 2 * optimizers
