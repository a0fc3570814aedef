"""The methods: what weight each gives to a trajectory, by hand, and the gradient that follows."""

import numpy as np
import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.methods import METHODS, capped, find_method, label_of
from rlrazor.experiments.robot.train import effective, trajectory_weights
from rlrazor.objectives import dpg_weights

REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
LOGP = torch.tensor([[-30.0, -31, -29, -33], [-20, -20, -20, -20], [-40, -42, -41, -45]])
BASE = torch.tensor([[-31.0, -30, -29, -31], [-20, -21, -22, -23], [-43, -42, -40, -40]])


def test_reinforce_normalises_over_all_trajectories_of_an_update() -> None:
    rewards = REWARDS.numpy()
    expected = -(rewards - rewards.mean()) / rewards.std(ddof=1) / rewards.size
    found = trajectory_weights(METHODS["reinforce"], LOGP, REWARDS, BASE)
    np.testing.assert_allclose(found, expected.flatten(), rtol=1e-5)


def test_grpo_normalises_over_those_of_a_start() -> None:
    """Where all succeed or none does there is nothing to learn."""
    rewards, rows = REWARDS.numpy(), []
    for row in rewards:
        std = row.std(ddof=1)
        rows.append(-(row - row.mean()) / std / rewards.size if std else np.zeros(4))
    found = trajectory_weights(METHODS["grpo"], LOGP, REWARDS, BASE)
    np.testing.assert_allclose(found, np.concatenate(rows), rtol=1e-5)
    assert (found.view(3, 4)[1] == 0).all()


def test_kl_dpg_weighs_successes_by_the_base_up_to_a_cap() -> None:
    """w proportional to R pi0 / pi over all trajectories, none above 1 / sqrt(12), what is cut off shared out."""
    weights = (REWARDS.numpy() * np.exp((BASE - LOGP).numpy().astype(np.float64))).flatten()
    weights /= weights.sum()
    assert weights.max() > 0.6
    cap, over = 12**-0.5, np.zeros(12, bool)
    while (weights > cap + 1e-12).any():
        over |= weights > cap
        free = np.where(over, 0, weights)
        weights = np.where(over, cap, free / free.sum() * (1 - cap * over.sum()))
    found = trajectory_weights(METHODS["kl-dpg"], LOGP, REWARDS, BASE)
    np.testing.assert_allclose(found, -weights, rtol=1e-4)
    assert METHODS["kl-dpg"].weighted


@pytest.mark.parametrize("successes", range(1, 6))
def test_no_success_has_more_than_its_cap_however_unlike_they_are(successes: int) -> None:
    """Log-ratios 0, -6, -6, ... and one so low that its weight is 0 in float32; the weights still add up to 1."""
    rewards = torch.zeros(2, 5)
    rewards[0, :successes] = 1
    base = torch.tensor([[0.0, -6, -6, -6, -300]] * 2)
    weights = capped(dpg_weights(torch.zeros(2, 5), rewards, base), rewards > 0)
    assert weights[0].sum().item() == pytest.approx(1, rel=1e-5)
    assert weights[0].max().item() <= max(5**-0.5, 1 / successes) * (1 + 1e-6)
    assert (weights[0, :successes] > 0).all()
    assert (weights[0, successes:] == 0).all()
    assert (weights[1] == 0).all()  # of a group without any success
    if successes == 3:
        np.testing.assert_allclose(weights[0, :3], [5**-0.5, *[(1 - 5**-0.5) / 2] * 2], rtol=1e-5)


def test_weights_below_the_cap_stay_as_they_are() -> None:
    weights = torch.tensor([[0.3, 0.3, 0.2, 0.2, 0.0]])
    assert torch.equal(capped(weights, weights > 0), weights)


def test_the_effective_number_of_trajectories() -> None:
    assert effective(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])) == pytest.approx(4)
    assert effective(torch.tensor([-1.0, 0, 0])) == pytest.approx(1)
    assert effective(torch.zeros(3)) == 0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.on_policy and not method.weighted])
def test_weights_of_other_methods_follow_from_rewards_alone(name: str) -> None:
    """So that log-probabilities need not be known before: any will do."""
    zeros = torch.zeros_like(LOGP)
    found = trajectory_weights(METHODS[name], LOGP, REWARDS, BASE)
    assert torch.equal(found, trajectory_weights(METHODS[name], zeros, REWARDS, zeros))


def test_each_method_is_found_with_and_without_a_penalty() -> None:
    assert [find_method(name)[1] for name in ("sft", "sft+kl", "reinforce+kl")] == [False, True, True]
    assert label_of("grpo+kl") == "GRPO + KL"
    assert {name for name, method in METHODS.items() if method.on_policy} == {"reinforce", "grpo", "kl-dpg"}
    with pytest.raises(RazorError, match=r"Unknown method 'ppo'.*sft-second"):
        find_method("ppo")
