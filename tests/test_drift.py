"""Distribution measures against scipy and against loops."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cityblock
from scipy.stats import entropy

from rlrazor import drift


@pytest.fixture
def distributions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(10), size=7), rng.dirichlet(np.full(10, 0.3), size=7)


def test_against_scipy(distributions: tuple[np.ndarray, np.ndarray]) -> None:
    base, tuned = distributions
    logs = torch.tensor(base).log(), torch.tensor(tuned).log()
    pairs = list(zip(base, tuned, strict=True))
    np.testing.assert_allclose(drift.forward_kl(*logs), [entropy(p, q) for p, q in pairs], rtol=1e-10)
    np.testing.assert_allclose(drift.reverse_kl(*logs), [entropy(q, p) for p, q in pairs], rtol=1e-10)
    np.testing.assert_allclose(drift.total_variation(*logs), [cityblock(p, q) / 2 for p, q in pairs], rtol=1e-10)


def test_measure_averages_over_inputs(distributions: tuple[np.ndarray, np.ndarray]) -> None:
    base, tuned = distributions
    measured = drift.measure(torch.tensor(base).log(), torch.tensor(tuned).log())
    assert measured["kl_forward"] == pytest.approx(np.mean([entropy(p, q) for p, q in zip(base, tuned, strict=True)]))
    assert set(measured) == {"kl_forward", "kl_reverse", "total_variation"}


def test_an_outcome_that_the_base_never_gives_costs_nothing_one_that_is_lost_costs_infinitely() -> None:
    base, tuned = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert drift.forward_kl(base, tuned).item() == pytest.approx(0.5 * np.log(2))
    assert drift.reverse_kl(base, tuned).item() == np.inf


def test_zero_for_the_same_policy() -> None:
    logp = torch.randn(5, 10).log_softmax(dim=1)
    assert drift.measure(logp, logp) == {"kl_forward": 0.0, "kl_reverse": 0.0, "total_variation": 0.0}
