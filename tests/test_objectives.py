"""Each objective's gradient against one written by hand, and against exact expectations."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
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
    result = np.zeros((B, V))
    probs = np.exp(logits_BV.numpy()) / np.exp(logits_BV.numpy()).sum(axis=1, keepdims=True)
    for b, g in itertools.product(range(B), range(actions_BG.shape[1])):
        onehot = np.eye(V)[actions_BG[b, g]]
        result[b] += coefficients_BG[b, g] * (onehot - probs[b])
    return result


def test_sft_gradient(logits_BV: Tensor, actions_BG: Tensor, rewards_BG: Tensor, base_logp_BV: Tensor) -> None:
    expected = by_hand(np.full((B, G), -1 / (B * G)), logits_BV, actions_BG)
    np.testing.assert_allclose(gradient(objectives.sft, logits_BV, actions_BG, rewards_BG, base_logp_BV), expected)


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


def exact_expectation(objective: objectives.Objective, logits: Tensor, correct: Tensor, group: int) -> Floats:
    """The gradient averaged over every possible group of samples, weighted by its probability under the policy."""
    probs, total = logits.softmax(dim=0), np.zeros(len(logits))
    for actions in itertools.product(range(len(logits)), repeat=group):
        row = torch.tensor([actions])
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(dim=0)[None]
        objective(logp.gather(1, row), correct[row].double(), logp.detach().gather(1, row)).backward()
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


def test_kl_dpg_ends_at_the_kl_minimal_policy_and_reinforce_does_not() -> None:
    """Exact expected gradients on three outcomes, two of them correct, from the base (.2, .1 | .7 wrong).

    q* has the base's ratio 2 between the correct outcomes; under REINFORCE the likelier one gains.
    The group is every outcome once; its frequency pi enters as a factor of the reward, or of KL-DPG's weight.
    """
    base = torch.tensor([[0.2, 0.1, 0.7]], dtype=torch.float64).log()
    correct = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)

    def reinforce(logp: Tensor) -> Tensor:
        return objectives.reinforce(logp, 3 * logp.detach().exp() * correct, base)

    def kl_dpg(logp: Tensor) -> Tensor:
        return objectives.kl_dpg(logp, correct, base + logp.detach())

    def ending(loss: Callable[[Tensor], Tensor]) -> Floats:
        logits = base.clone().requires_grad_()
        for _ in range(2000):
            (gradient,) = torch.autograd.grad(loss(logits.log_softmax(dim=1)), logits)
            logits = (logits - gradient).detach().requires_grad_()
        return np.asarray(logits.detach().softmax(dim=1)[0])

    for loss, low, high in ((kl_dpg, 1.99, 2.01), (reinforce, 20, np.inf)):
        likely, unlikely, wrong = ending(loss)
        assert wrong < 1e-3
        assert low < likely / unlikely < high


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
