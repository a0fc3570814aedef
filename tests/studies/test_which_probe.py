"""Probes whose law holds for all methods, or for those alone that do not protect, as planted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlrazor.report import keyed
from rlrazor.report.study import Study
from rlrazor.studies import which_probe
from rlrazor.studies.which_probe import MEASURES, PLAIN, PROTECTED, examined, grids
from study_tables import BASE_PRIOR, check, run, study_of

KLS = (0.1, 0.3, 0.6, 1.0, 1.5)
TRUE = 0.5  # of a law 0.5 (1 - exp(-KL))
Drift = Callable[[float, str], float]


def planted(new: Drift, prior: Drift = lambda kl, method: kl, seeds: int = 1) -> Study:
    """Forgetting is a law of KL; what a probe measures is a function of that KL and of the method."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for place, method in enumerate((*PLAIN, *PROTECTED)):
            drifts = [(0.8 + 0.1 * place) * (1 + 0.1 * seed) * kl for kl in KLS]
            of_run = run(method, seed, news=[0.93 + 0.01 * at for at in range(len(KLS))])
            for row, kl in zip(of_run, drifts, strict=True):
                row["forgetting"] = TRUE * (1 - np.exp(-kl))
                row["prior"] = BASE_PRIOR - row["forgetting"]
                row |= {name: prior(kl, method) for name in MEASURES} | {"kl_forward": new(kl, method)}
                rows.append(row)
    return study_of("which-probe", rows)


def far(kl: float, method: str) -> float:
    """Methods that protect move ten times as far on the new task."""
    return 10 * kl if method in PROTECTED else kl


def example() -> Study:
    """Of the texts' test."""
    return planted(far, seeds=3)


def numbers_of(study: Study) -> dict[str, str]:
    found = examined(study)
    tables = (which_probe.law_table(found), which_probe.method_table(study, found), which_probe.order_table(found))
    return keyed.numbers_of(tables)


def test_a_probe_that_sees_the_old_holds_for_methods_that_protect() -> None:
    found = numbers_of(planted(far))
    assert (found["unseen.verdict"], found["unseen.protected-verdict"]) == ("better", "better")
    assert found["unseen.holds"] == "across methods"
    assert float(found["unseen.error"].split(" ")[0]) < 1
    assert found["new.protected-verdict"] != "better"
    assert found["new.holds"] != "across methods"
    assert float(found["new.protected"].split(" ")[0]) > 5
    # A method that forgets what its KL says is forecast wrongly by a law of those that do not.
    assert found["best.probe"] != MEASURES["kl_forward"]
    assert found["best-protected.probe"] != MEASURES["kl_forward"]


def test_the_new_tasks_kl_may_be_the_best_of_all() -> None:
    found = numbers_of(planted(lambda kl, method: kl, far))
    assert found["best.probe"] == found["best-protected.probe"] == MEASURES["kl_forward"]
    assert (found["new.verdict"], found["new.protected-verdict"], found["new.holds"]) == (
        *("better", "better"),
        "across methods",
    )
    assert found["unseen.protected-verdict"] != "better"


def test_a_law_of_the_others_is_asked_by_hand() -> None:
    """The law that was planted, at ten times the KL."""
    (new,) = (one for one in examined(planted(far)) if one.of.column == "kl_forward")
    for place, method in enumerate(PROTECTED, len(PLAIN)):
        kls = (0.8 + 0.1 * place) * np.array(KLS)
        missed = TRUE * np.abs(np.exp(-kls) - np.exp(-10 * kls)).mean()
        assert new.carried[method] == pytest.approx(missed, abs=0.005)
    assert set(new.carried) == set(PROTECTED)


def test_the_section_and_a_table_without_methods_that_protect() -> None:
    study = example()
    section = which_probe.section(study)
    check(section, "which-probe")
    assert [panel.title for panel in section.figure.panels][-1] == "Asked about a method not in the fit"
    assert "better: " in section.finding
    rows = [row for row in study.table.to_dicts() if row["method"] in PLAIN]
    plain = study_of("which-probe", rows)
    check(which_probe.section(plain), "which-probe")
    found = numbers_of(plain)
    assert (found["unseen.protected"], found["unseen.carried"], found["best-protected.probe"]) == ("—", "—", "—")
    assert found["unseen.protected-verdict"] == "not comparable"


def test_every_method_is_measured_on_the_probes() -> None:
    for quick in (True, False):
        specs = [spec for grid in grids(quick) for spec in grid.specs((0,), "data")]
        assert {spec.method for spec in specs} == {*PLAIN, *PROTECTED}
        assert all(spec.params["probes"] for spec in specs)
        assert not any("probes" in spec.root.params for spec in specs)  # the bases are those of the sweep
