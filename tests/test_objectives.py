"""Each objective's gradient against one written by hand, and against exact expectations."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from rlrazor import objectives

B, G, V = 4, 6, 5
Floats = NDArray[np.float64]


@pytest.fixture
def logits_BV() -> Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def base_logp_BV() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, V, generator=generator, dtype=torch.float64).log_softmax(dim=1)


@pytest.fixture
def actions_BG() -> Tensor:
    return torch.randint(V, (B, G), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def rewards_BG(actions_BG: Tensor) -> Tensor:
    rewards = (actions_BG % 2 == 0).double()
    rewards[1] = 0  # a prompt that no sample solves
    rewards[2] = 1  # and one that all do
    return rewards


def gradient(
    objective: objectives.Objective, logits_BV: Tensor, actions: Tensor, rewards: Tensor, base: Tensor
) -> Floats:
    logits = logits_BV.clone().requires_grad_()
    logp_BV = logits.log_softmax(dim=1)
    objective(logp_BV.gather(1, actions), rewards, base.gather(1, actions)).backward()
    assert logits.grad is not None
    return np.asarray(logits.grad)


def by_hand(coefficients_BG: Floats, logits_BV: Tensor, actions_BG: Tensor) -> Floats:
    """Gradient of sum(coefficient * log pi(action)): coefficient * (onehot - pi), summed by a loop."""
    result = np.zeros(logits_BV.shape)
    probs = np.exp(logits_BV.numpy()) / np.exp(logits_BV.numpy()).sum(axis=1, keepdims=True)
    for b, g in itertools.product(*map(range, actions_BG.shape)):
        onehot = np.eye(logits_BV.shape[1])[actions_BG[b, g]]
        result[b] += coefficients_BG[b, g] * (onehot - probs[b])
    return result


def test_sft_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    expected = by_hand(np.full((B, G), -1 / (B * G)), logits_BV, actions_BG)
    np.testing.assert_allclose(gradient(objectives.sft, logits_BV, actions_BG, rewards_BG, base_logp_BV), expected)


def test_dft_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    pi = logits_BV.softmax(dim=1).gather(1, actions_BG).numpy()
    actual = gradient(objectives.dft, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, by_hand(-pi / (B * G), logits_BV, actions_BG), atol=1e-15)

    def minus_probability(logp: Tensor, rewards: Tensor, base: Tensor) -> Tensor:
        return -logp.exp().mean()

    np.testing.assert_allclose(
        actual, gradient(minus_probability, logits_BV, actions_BG, rewards_BG, base_logp_BV), atol=1e-15
    )


def test_reinforce_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    expected = by_hand(-rewards_BG.numpy() / (B * G), logits_BV, actions_BG)
    actual = gradient(objectives.reinforce, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, expected, atol=1e-15)
    assert not actual[1].any()  # no correct sample, no signal


def test_grpo_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    rewards = rewards_BG.numpy()
    advantages = np.zeros_like(rewards)
    for b in range(B):
        if rewards[b].std():
            advantages[b] = (rewards[b] - rewards[b].mean()) / np.std(rewards[b], ddof=1)
    expected = by_hand(-advantages / (B * G), logits_BV, actions_BG)
    actual = gradient(objectives.grpo, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-15)
    assert not actual[1:3].any()  # all wrong and all right alike carry no advantage


def test_dr_grpo_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    advantages = rewards_BG.numpy() - rewards_BG.numpy().mean(axis=1, keepdims=True)
    expected = by_hand(-advantages / (B * G), logits_BV, actions_BG)
    actual = gradient(objectives.dr_grpo, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, expected, atol=1e-15)


def test_simpo_gradient(logits_BV: Tensor, base_logp_BV: Tensor) -> None:
    pairs = torch.tensor([[0, 1], [2, 3], [4, 1], [2, 1]])
    logp = logits_BV.log_softmax(dim=1).numpy()
    coefficients = np.zeros((B, 2))
    for b, (winner, loser) in enumerate(pairs.tolist()):
        slack = 1 / (1 + math.exp(logp[b, winner] - logp[b, loser] - 1))  # sigmoid(-(difference - margin))
        coefficients[b] = [-slack / B, slack / B]
    actual = gradient(objectives.simpo, logits_BV, pairs, torch.tensor([[1.0, 0.0]]).expand(B, 2), base_logp_BV)
    np.testing.assert_allclose(actual, by_hand(coefficients, logits_BV, pairs), atol=1e-15)


def test_simpo_refuses_groups_that_are_not_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        objectives.simpo(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_kl_dpg_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    pi, base = logits_BV.softmax(dim=1).numpy(), base_logp_BV.exp().numpy()
    weights = np.zeros((B, G))
    for b in range(B):
        for g in range(G):
            action = actions_BG[b, g]
            weights[b, g] = rewards_BG[b, g] * base[b, action] / pi[b, action]
        if weights[b].sum():
            weights[b] /= weights[b].sum()
    actual = gradient(objectives.kl_dpg, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, by_hand(-weights / B, logits_BV, actions_BG), atol=1e-15)
    assert not actual[1].any()


def exact_expectation(
    objective: objectives.Objective, logits: Tensor, correct: Tensor, group: int, behaviour: Tensor | None = None
) -> Floats:
    """The gradient averaged over every possible group of samples, weighted by its probability.

    The samples come from the policy itself or, importance-weighted, from the probabilities `behaviour`.
    """
    probs, total = logits.softmax(dim=0) if behaviour is None else behaviour, np.zeros(len(logits))
    for actions in itertools.product(range(len(logits)), repeat=group):
        row = torch.tensor([actions])
        leaf = logits.clone().requires_grad_()
        base = logits.log_softmax(dim=0)[None].gather(1, row)
        logp = leaf.log_softmax(dim=0)[None].gather(1, row)
        if behaviour is not None:
            logp = objectives.importance_weighted(logp, behaviour.log()[None].gather(1, row))
        objective(logp, correct[row].double(), base).backward()
        assert leaf.grad is not None
        total += float(probs[list(actions)].prod()) * leaf.grad.numpy()
    return total


def test_dr_grpo_in_expectation_is_the_policy_gradient() -> None:
    """E[gradient] = -(1 - 1/G) grad E[R], by enumerating all 3^4 groups."""
    logits, correct, group = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64), torch.tensor([True, False, True]), 4
    probs = logits.softmax(dim=0).numpy()
    success = probs[correct.numpy()].sum()
    policy_gradient = probs * (correct.numpy() - success)  # d E[R] / d logits of a softmax, in closed form
    expected = -(1 - 1 / group) * policy_gradient
    np.testing.assert_allclose(exact_expectation(objectives.dr_grpo, logits, correct, group), expected, atol=1e-14)


def test_reinforce_in_expectation_is_the_policy_gradient() -> None:
    logits, correct = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64), torch.tensor([True, False, True])
    probs = logits.softmax(dim=0).numpy()
    policy_gradient = probs * (correct.numpy() - probs[correct.numpy()].sum())
    np.testing.assert_allclose(
        exact_expectation(objectives.reinforce, logits, correct, 3), -policy_gradient, atol=1e-14
    )


PI = (0.3, 0.2, 0.1, 0.4)
BASE = (0.1, 0.3, 0.2, 0.4)
CORRECT = (True, True, True, False)
TYPICAL = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3]])
"""A group in which each outcome is as frequent as its probability in PI: its mean is the exact expectation."""


def typical_gradient(objective: objectives.Objective) -> Floats:
    """The objective's gradient on the logits at the policy PI: exact, as if over infinitely many samples."""
    logits, base = (torch.tensor([probs], dtype=torch.float64).log() for probs in (PI, BASE))
    return gradient(objective, logits, TYPICAL, torch.tensor(CORRECT)[TYPICAL].double(), base).squeeze(axis=0)


def jensen_shannon(pi: Floats, target: Floats) -> float:
    return 2 * float(jensenshannon(pi, target)) ** 2  # scipy's is the root of the mean of the two terms


def total_variation(pi: Floats, target: Floats) -> float:
    return float(np.abs(pi - target).sum()) / 2


@pytest.mark.parametrize(
    ("objective", "divergence"), [(objectives.js_dpg, jensen_shannon), (objectives.tv_dpg, total_variation)]
)
def test_f_dpg_in_expectation_is_the_gradient_of_its_divergence(
    objective: objectives.Objective, divergence: Callable[[Floats, Floats], float]
) -> None:
    """Against central differences of scipy's and numpy's divergence from q*, here (.1, .3, .2, 0) / .6."""
    target = np.array(BASE) * CORRECT / np.sum(np.array(BASE)[list(CORRECT)])

    def from_logits(logits: Floats) -> float:
        return divergence(np.exp(logits) / np.exp(logits).sum(), target)

    logits, step = np.log(PI), 1e-6
    expected = (approx_fprime(logits, from_logits, step) + approx_fprime(logits, from_logits, -step)) / 2
    np.testing.assert_allclose(typical_gradient(objective), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("objective", "f_prime"),
    [
        (objectives.js_dpg, lambda t: math.log(2) if t == math.inf else math.log(2 * t / (1 + t))),
        (objectives.tv_dpg, lambda t: 0.5 if t > 1 else -0.5),
    ],
)
def test_f_dpg_gradient(
    objective: objectives.Objective,
    f_prime: Callable[[float], float],
    logits_BV: Tensor,
    actions_BG: Tensor,
    rewards_BG: Tensor,
    base_logp_BV: Tensor,
) -> None:
    pi, base = logits_BV.softmax(dim=1).numpy(), base_logp_BV.exp().numpy()
    coefficients = np.zeros((B, G))
    for b in range(B):
        actions, rewards = actions_BG[b].tolist(), rewards_BG[b].tolist()
        z = sum(r * base[b, y] / pi[b, y] for y, r in zip(actions, rewards, strict=True)) / G
        slopes = [
            f_prime(pi[b, y] / (base[b, y] / z)) if r else f_prime(math.inf)
            for y, r in zip(actions, rewards, strict=True)
        ]
        coefficients[b] = (np.array(slopes) - np.mean(slopes)) / (B * G)
    actual = gradient(objective, logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_allclose(actual, by_hand(coefficients, logits_BV, actions_BG), atol=1e-15)
    assert not actual[1].any()  # no correct sample: Z = 0, all are equally bad


@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [
        (objectives.kl_dpg, 1.99, 2.01),
        (objectives.js_dpg, 1.98, 2.02),
        (objectives.tv_dpg, 1.9, 2.1),
        (objectives.natural_pg, 1.99, 2.01),
        (objectives.reinforce, 20, np.inf),
    ],
)
def test_who_keeps_the_base_ratio_of_the_correct_outcomes(
    objective: objectives.Objective, low: float, high: float
) -> None:
    """Followed from (.2, .1 | .7 wrong), the DPGs and natural gradient end at q*, of ratio 2; plain RL goes elsewhere.

    A group of 2,000 holds the outcomes in proportion to their probabilities: all but exact expectations. The steps
    shrink, since total variation's gradient does not, however near its minimum: it is left swinging around q*.
    """
    base = torch.tensor([[0.2, 0.1, 0.7]], dtype=torch.float64).log()
    correct = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    logits = base.clone().requires_grad_()
    for step in range(1000):
        logp = logits.log_softmax(dim=1)
        actions = torch.searchsorted(logp.detach().exp()[0].cumsum(0), quantiles).clamp(max=2)[None]
        loss = objective(logp.gather(1, actions), correct[actions], base.gather(1, actions))
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - 4 / (1 + (step / 150) ** 2) * slope).detach().requires_grad_()
    likely, unlikely, wrong = logits.detach().softmax(dim=1)[0].tolist()
    assert wrong < 2e-3
    assert low < likely / unlikely < high


def test_natural_pg_in_expectation_is_the_natural_gradient() -> None:
    """-F^+ grad E[R] / V with numpy's pseudo-inverse of the softmax's Fisher matrix: -(R - mean R) / V."""
    pi, correct = np.array(PI), np.array(CORRECT)
    fisher = np.diag(pi) - np.outer(pi, pi)
    natural = np.linalg.pinv(fisher) @ (pi * (correct - pi[correct].sum()))
    np.testing.assert_allclose(natural, correct - correct.mean(), atol=1e-12)
    np.testing.assert_allclose(typical_gradient(objectives.natural_pg), -natural / len(pi), atol=1e-15)


def test_natural_pg_at_a_uniform_policy_is_dr_grpo() -> None:
    logits, actions = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[0, 1, 1, 3, 2, 2, 2]])
    rewards = torch.tensor(CORRECT)[actions].double()
    natural, plain = (
        gradient(objective, logits, actions, rewards, logits)
        for objective in (objectives.natural_pg, objectives.dr_grpo)
    )
    np.testing.assert_allclose(natural, plain, atol=1e-15)


def test_natural_pg_caps_the_weight_of_a_rare_sample() -> None:
    """Probabilities .5, .4999, 1e-4 (wrong): weights 2, 1 / .4999 and 100 instead of 10,000."""
    logits = torch.tensor([[0.5, 0.4999, 1e-4]], dtype=torch.float64).log()
    actions, rewards = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    weights = np.array([2, 1 / 0.4999, objectives.NATURAL_WEIGHT_CAP])
    weights /= weights.sum()
    expected = by_hand(-weights * (rewards.numpy() - weights[:2].sum()), logits, actions)
    np.testing.assert_allclose(gradient(objectives.natural_pg, logits, actions, rewards, logits), expected, atol=1e-15)


@pytest.mark.parametrize("objective", [objectives.reinforce, objectives.dr_grpo])
def test_importance_weighted_samples_give_the_on_policy_gradient(objective: objectives.Objective) -> None:
    """In expectation over all 3^4 groups, drawn from the policy and from mu."""
    logits, correct = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64), torch.tensor([True, False, True])
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    on_policy = exact_expectation(objective, logits, correct, 4)
    np.testing.assert_allclose(exact_expectation(objective, logits, correct, 4, mu), on_policy, atol=1e-14)


def test_importance_weights_of_fresh_samples_change_nothing(
    logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor
) -> None:
    def weighted(logp: Tensor, rewards: Tensor, base: Tensor) -> Tensor:
        return objectives.grpo(objectives.importance_weighted(logp, logp.detach()), rewards, base)

    fresh = (logits_BV, actions_BG, rewards_BG, base_logp_BV)
    np.testing.assert_array_equal(gradient(weighted, *fresh), gradient(objectives.grpo, *fresh))


def test_kl_to_base_value_and_minimum(base_logp_BV: Tensor, logits_BV: Tensor) -> None:
    pi, base = logits_BV.softmax(dim=1).numpy(), base_logp_BV.exp().numpy()
    expected = np.mean([sum(pi[b, v] * math.log(pi[b, v] / base[b, v]) for v in range(V)) for b in range(B)])
    actual = objectives.kl_to_base(logits_BV.log_softmax(dim=1), base_logp_BV)
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert objectives.kl_to_base(base_logp_BV, base_logp_BV).item() == pytest.approx(0, abs=1e-15)


def test_kl_to_base_gradient(base_logp_BV: Tensor, logits_BV: Tensor) -> None:
    """d KL(pi || pi0) / d logits = pi (log(pi / pi0) - KL), by hand."""
    leaf = logits_BV.clone().requires_grad_()
    objectives.kl_to_base(leaf.log_softmax(dim=1), base_logp_BV).backward()
    pi, base = logits_BV.softmax(dim=1).numpy(), base_logp_BV.exp().numpy()
    kl = (pi * np.log(pi / base)).sum(axis=1, keepdims=True)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, pi * (np.log(pi / base) - kl) / B, atol=1e-15)


def test_kl_regularised_reward_has_the_tilted_policy_as_its_optimum() -> None:
    """max E[R] - beta KL(pi || pi0) is pi0 exp(R / beta), normalised: found here by scipy on our own loss."""
    base = np.array([0.2, 0.1, 0.7])
    rewards, beta = np.array([1.0, 1.0, 0.0]), 0.5

    def loss(logits: Floats) -> float:
        logp = torch.tensor(logits)[None].log_softmax(dim=1)
        expected_reward = float((logp.exp().numpy()[0] * rewards).sum())
        return -expected_reward + beta * objectives.kl_to_base(logp, torch.tensor(base)[None].log()).item()

    found = minimize(loss, np.zeros(3), tol=1e-12)
    tilted = base * np.exp(rewards / beta)
    np.testing.assert_allclose(torch.tensor(found.x).softmax(dim=0), tilted / tilted.sum(), atol=1e-5)
