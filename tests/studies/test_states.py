"""KL on states of which only one kind orders what is lost, as planted: it is found, and so is the opposite."""

import numpy as np
import pytest
from test_text_probes import FREE, HELD, KLS

from rlrazor.report import keyed
from rlrazor.report.study import Study
from rlrazor.studies import states
from rlrazor.studies.states import MEASURES, ON_PRIOR, error_table
from rlrazor.studies.which_probe import ProbeColumns, examined, tables
from study_tables import BASE_PRIOR, run, study_of

METHODS = (*FREE, *HELD)
COPIES = {
    "kl_reverse": "kl_forward",
    "kl_forward_per_episode": "kl_forward",
    "kl_reverse_on_prior": ON_PRIOR,
    "kl_forward_per_episode_on_prior": ON_PRIOR,
}


def planted(law_in: str = ON_PRIOR, noise: float = 0.0) -> Study:
    """Forgetting is a law of KL on those states; on the others each method moves at a pace of its own."""
    other = "kl_forward" if law_in == ON_PRIOR else ON_PRIOR
    rng, rows = np.random.default_rng(5), []
    for seed in range(3):
        for place, method in enumerate(METHODS):
            for row, kl in zip(run(method, seed, news=[0.93 + 0.01 * at for at in range(5)]), KLS, strict=True):
                row["forgetting"] = 0.5 * (1 - np.exp(-kl)) + noise * rng.normal()
                row["prior"] = BASE_PRIOR - row["forgetting"]
                row |= {law_in: kl, other: kl * 3.0 ** (place - 2)}
                row |= {copy: 1.1 * row[of] for copy, of in COPIES.items()}
                row |= {f"{ON_PRIOR}_stderr": 0.04}
                rows.append(row)
    return study_of("states", rows)


def example() -> Study:
    """Of the texts' test."""
    return planted(noise=0.005)


def numbers_of(study: Study) -> dict[str, str]:
    probes = ProbeColumns(MEASURES, (), states.protects)
    return keyed.numbers_of(tables(study, examined(study, probes)))


def test_the_states_that_were_planted_are_found() -> None:
    found = numbers_of(planted())
    assert "the prior tasks’ states" in found["best.probe"]
    assert (found["prior.holds"], found["prior.verdict"]) == ("across methods", "better")
    assert found["new.holds"] != "across methods"
    assert float(found["prior.error"].split(" ")[0]) < 0.5 < 3 < float(found["new.error"].split(" ")[0])


def test_and_so_is_the_opposite() -> None:
    found = numbers_of(planted("kl_forward"))
    assert "the new task’s states" in found["best.probe"]
    assert (found["new.holds"], found["new.verdict"]) == ("across methods", "better")
    assert found["prior.holds"] != "across methods"


def test_the_section_draws_both_laws_and_shows_errors() -> None:
    section = states.section(planted())
    assert [panel.title for panel in section.figure.panels[:2]] == [
        "KL on the new task’s states",
        "KL on the prior tasks’ states",
    ]
    errors = error_table(planted()).rows["sft"][1]
    assert errors[f"at-{ON_PRIOR}"].endswith(f" ± {0.04 / 3**0.5:.3f}")
    assert "±" not in errors["at-kl_forward"]


@pytest.mark.parametrize(("method", "held"), [("grpo+kl", True), ("grpo", False), ("kl-dpg", False)])
def test_a_penalty_protects(method: str, held: bool) -> None:
    assert states.protects(method) is held
