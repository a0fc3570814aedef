"""Distribution measures against scipy and against loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cityblock, euclidean, jensenshannon
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from rlrazor import drift
from rlrazor.drift import DISTRIBUTION_MEASURES

Array = NDArray[np.float64]

OUTCOMES = np.arange(10)
BY_SCIPY: dict[str, Callable[[Array, Array], float]] = {
    "kl_forward": lambda p, q: float(rel_entr(p, q).sum()),
    "kl_reverse": lambda p, q: float(rel_entr(q, p).sum()),
    "total_variation": lambda p, q: float(cityblock(p, q)) / 2,
    "output_l2": lambda p, q: float(euclidean(p, q)),
    "jensen_shannon": lambda p, q: float(jensenshannon(p, q, base=np.e)) ** 2,
    "hellinger": lambda p, q: float(np.sqrt(1 - np.sqrt(p * q).sum())),  # by the Bhattacharyya coefficient
    "wasserstein_1": lambda p, q: float(wasserstein_distance(OUTCOMES, OUTCOMES, p, q)),
}
BOUNDS = {
    "kl_forward": np.inf,
    "kl_reverse": np.inf,
    "total_variation": 1.0,
    "output_l2": np.sqrt(2),
    "jensen_shannon": np.log(2),
    "hellinger": 1.0,
    "wasserstein_1": 9.0,
}


@pytest.fixture
def distributions() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(10), size=7), rng.dirichlet(np.full(10, 0.3), size=7)


@pytest.fixture
def with_zeros(distributions: tuple[Array, Array]) -> tuple[Array, Array]:
    """Some outcomes that only one of the two gives, some that neither does; in the last row they share none."""
    base, tuned = (part.copy() for part in distributions)
    base[:, 0] = tuned[:, 1] = 0
    base[:, 2] = tuned[:, 2] = 0
    base[-1, :5] = tuned[-1, 5:] = 0
    return base / base.sum(axis=1, keepdims=True), tuned / tuned.sum(axis=1, keepdims=True)


def logs(*probabilities: Array) -> list[torch.Tensor]:
    return [torch.tensor(p).log() for p in probabilities]


@pytest.mark.parametrize("name", DISTRIBUTION_MEASURES)
@pytest.mark.parametrize("pair", ["distributions", "with_zeros"])
def test_against_scipy(name: str, pair: str, request: pytest.FixtureRequest) -> None:
    base, tuned = request.getfixturevalue(pair)
    expected = [BY_SCIPY[name](p, q) for p, q in zip(base, tuned, strict=True)]
    np.testing.assert_allclose(DISTRIBUTION_MEASURES[name](*logs(base, tuned)), expected, rtol=1e-10)


def test_measure_averages_over_inputs(distributions: tuple[Array, Array]) -> None:
    measured = drift.measure(*logs(*distributions))
    assert set(measured) == set(BY_SCIPY)
    for name, by_scipy in BY_SCIPY.items():
        expected = np.mean([by_scipy(p, q) for p, q in zip(*distributions, strict=True)])
        assert measured[name] == pytest.approx(expected)


def test_measure_sums_in_float64() -> None:
    """A float32 policy's log-probabilities: a mean in float32 would be off by 1e-7."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(5_000, 10, generator=generator).log_softmax(dim=1) for _ in range(2))
    expected = rel_entr(np.exp(base.double().numpy()), np.exp(tuned.double().numpy())).sum(axis=1).mean()
    assert drift.measure(base, tuned)["kl_forward"] == pytest.approx(expected, rel=1e-12)


def test_an_outcome_that_the_base_never_gives_costs_nothing_one_that_is_lost_costs_infinitely() -> None:
    base, tuned = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert drift.forward_kl(base, tuned).item() == pytest.approx(0.5 * np.log(2))
    assert drift.reverse_kl(base, tuned).item() == np.inf


@pytest.mark.parametrize("sharpness", [1, 10, 100])
def test_zero_for_the_same_policy(sharpness: float) -> None:
    logp = (sharpness * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))).log_softmax(dim=1)
    logp[0, 3] = -torch.inf
    assert drift.measure(logp, logp) == dict.fromkeys(DISTRIBUTION_MEASURES, 0.0)


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items())
def test_bounds_are_kept_and_reached(name: str, bound: float, with_zeros: tuple[Array, Array]) -> None:
    values = DISTRIBUTION_MEASURES[name](*logs(*with_zeros))
    assert ((values > 0) & (values <= bound + 1e-12)).all()
    first, last = logs(np.eye(10)[:1], np.eye(10)[-1:])  # sure of one end, sure of the other
    assert DISTRIBUTION_MEASURES[name](first, last).item() == pytest.approx(bound)


@pytest.mark.parametrize("name", ["total_variation", "output_l2", "jensen_shannon", "hellinger", "wasserstein_1"])
def test_distances_are_symmetric(name: str, with_zeros: tuple[Array, Array]) -> None:
    base, tuned = logs(*with_zeros)
    torch.testing.assert_close(DISTRIBUTION_MEASURES[name](base, tuned), DISTRIBUTION_MEASURES[name](tuned, base))


def test_only_the_wasserstein_distance_knows_the_order_of_the_outcomes(distributions: tuple[Array, Array]) -> None:
    base, tuned = logs(*distributions)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    changed = {
        name
        for name, distance in DISTRIBUTION_MEASURES.items()
        if not torch.allclose(distance(base, tuned), distance(base[:, order], tuned[:, order]))
    }
    assert changed == {"wasserstein_1"}
