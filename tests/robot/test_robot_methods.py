"""The methods: what weight each gives to a trajectory, by hand, and the gradient that follows."""

import numpy as np
import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.methods import METHODS, find_method, label_of
from rlrazor.experiments.robot.train import trajectory_weights

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
    """w proportional to R pi0 / pi, of sum 1 over a start's trajectories, cut off at 1 / sqrt(4), and over 3 starts."""
    rows = []
    for reward, logp, base in zip(REWARDS.numpy(), LOGP.numpy(), BASE.numpy(), strict=True):
        weights = reward * np.exp((base - logp).astype(np.float64))
        weights = np.minimum(weights / max(weights.sum(), 1e-30), 0.5)
        rows.append(-weights / max(weights.sum(), 1e-30) / 3)
    found = trajectory_weights(METHODS["kl-dpg"], LOGP, REWARDS, BASE)
    np.testing.assert_allclose(found, np.concatenate(rows), rtol=1e-5)
    assert METHODS["kl-dpg"].weighted


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
