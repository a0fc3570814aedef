"""KL between policies: by the chain rule as over all actions, and over all trajectories of a world small enough."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from rlrazor.experiments.robot.policy import Seen, Steps, kl, kl_of_actions, log_probs_of, taken
from rlrazor.experiments.robot.rollout import Rolled
from rlrazor.experiments.robot.transformer import ActionTransformer, Size
from rlrazor.experiments.robot.world import Episode
from robot_runs import all_actions, everywhere
from robot_worlds import Points

TEXT = "go to the goal"


class Space(Points):
    """Three numbers to choose for an action."""

    @property
    def action_low(self) -> np.ndarray:
        return np.full(3, -1, np.float32)

    @property
    def action_high(self) -> np.ndarray:
        return np.full(3, 1, np.float32)


def tiny(seed: int, world: Points, bins: int) -> ActionTransformer:
    """A policy of few bins, far from uniform."""
    torch.manual_seed(seed)
    policy = ActionTransformer(world, Size(width=16, layers=2, heads=2, bins=bins))
    with torch.no_grad():
        policy.head.weight.mul_(20)
        policy.head.bias.normal_(std=0.5)
        policy.bin.weight.mul_(20)
    return policy


def joint(policy: ActionTransformer, history_HS: Tensor) -> np.ndarray:
    """The probability of every action at a state, by the product over its tokens."""
    actions = all_actions(policy.bins, policy.action_size)
    with torch.no_grad():
        logp = policy.log_probs(everywhere(TEXT, history_HS, len(actions)), actions)
    return np.asarray(taken(logp.double(), actions).exp())


def test_kl_of_an_action_is_that_over_all_actions() -> None:
    """The chain rule's sum, averaged over the first policy's actions, is sum p log(p / q) over the 64 actions."""
    base, tuned = (tiny(seed, Space(), bins=4) for seed in (0, 1))
    actions = all_actions(4, 3)
    for history in torch.randn(3, 2, 7):
        p, q = joint(base, history), joint(tuned, history)
        assert p.sum() == pytest.approx(1, abs=1e-5)
        seen = everywhere(TEXT, history, len(actions))
        with torch.no_grad():
            logp, other = base.log_probs(seen, actions), tuned.log_probs(seen, actions)
        forward, reverse = kl_of_actions(logp, other).numpy(), kl_of_actions(other, logp).numpy()
        assert (p * forward).sum() == pytest.approx(rel_entr(p, q).sum(), rel=1e-4)
        assert (q * reverse).sum() == pytest.approx(rel_entr(q, p).sum(), rel=1e-4)
        assert rel_entr(p, q).sum() > 0.05
        assert forward.std() > 0.001  # it does depend on the tokens before


def test_sampled_actions_estimate_it_with_less_spread_than_log_ratios() -> None:
    """Monte Carlo over 4,000 actions drawn by `act`, which knows nothing of `log_probs`."""
    base, tuned = (tiny(seed, Space(), bins=4) for seed in (0, 1))
    history = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    exact = rel_entr(joint(base, history), joint(tuned, history)).sum()
    seen = everywhere(TEXT, history, 4000)
    noise = torch.rand(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drawn = base.act(seen, noise, base.remember())
        logp, other = base.log_probs(seen, drawn), tuned.log_probs(seen, drawn)
    ratios, exactly = taken(logp - other, drawn).numpy(), kl_of_actions(logp, other).numpy()
    for estimate in (ratios, exactly):
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(4000)
    assert exactly.std() < ratios.std() / 2


def trajectories(policy: ActionTransformer, move: Callable[[Tensor, Tensor], Tensor]) -> tuple[np.ndarray, Steps]:
    """Of all episodes of two steps: their probabilities, and what was seen and done in them."""
    actions = all_actions(policy.bins, policy.action_size)
    first = torch.zeros(2, 7)
    rolled = [
        Rolled(
            Episode("reach", 0, TEXT),
            torch.stack([first, move(first, one)]).numpy(),
            torch.stack([one, two]).numpy(),
            True,
        )
        for one, two in product(actions, actions)
    ]
    steps = Steps.of(rolled)
    logp = taken(log_probs_of(policy, steps).double(), steps.tokens).view(-1, 2).sum(dim=1)
    return logp.exp().numpy(), steps


def test_kl_of_an_episode_is_that_over_all_trajectories() -> None:
    """The sum over an episode's steps, averaged over the 81 episodes there are, is sum p log(p / q) over them."""
    base, tuned = (tiny(seed, Points(), bins=3) for seed in (0, 1))

    def move(history_HS: Tensor, tokens: Tensor) -> Tensor:
        after = history_HS.roll(-1, dims=0).clone()
        after[-1, :2] = tokens.float() - 1
        return after

    p, steps = trajectories(base, move)
    q, _ = trajectories(tuned, move)
    assert len(p) == 81
    assert p.sum() == pytest.approx(1, abs=1e-5)
    sums = kl(steps, log_probs_of(base, steps), log_probs_of(tuned, steps)).sums
    assert (p * sums).sum() == pytest.approx(rel_entr(p, q).sum(), rel=1e-4)


def test_means_and_standard_errors_are_over_episodes() -> None:
    """Against a loop, and a bootstrap of episodes: steps of one episode are not independent."""
    rng = np.random.default_rng(0)
    policies = [tiny(seed, Points(), bins=5) for seed in (0, 1)]
    rolled = []
    for _ in range(60):
        length, at = rng.integers(1, 30), rng.standard_normal((1, 2, 7))
        history = np.repeat(at, length, axis=0).astype(np.float32)  # an episode stays where it is
        rolled.append(Rolled(Episode("reach", 0, TEXT), history, rng.integers(5, size=(length, 2)), False))
    steps = Steps.of(rolled)
    logp, other = (log_probs_of(policy, steps) for policy in policies)
    found = kl(steps, logp, other)
    sums, lengths, row = [], [], 0
    for one in rolled:
        p, q = (values[row : row + one.steps].double().exp().numpy() for values in (logp, other))
        sums.append(
            sum(rel_entr(p[step, token], q[step, token]).sum() for step in range(one.steps) for token in (0, 1))
        )
        lengths.append(one.steps)
        row += one.steps
    assert row == len(steps)
    assert found.per_completion.mean == pytest.approx(np.mean(sums))
    assert found.per_completion.stderr == pytest.approx(np.std(sums, ddof=1) / math.sqrt(60))
    assert found.per_token.mean == pytest.approx(np.sum(sums) / np.sum(lengths))
    draws = rng.integers(60, size=(2000, 60))
    ratios = np.array(sums)[draws].sum(axis=1) / np.array(lengths)[draws].sum(axis=1)
    assert found.per_token.stderr == pytest.approx(ratios.std(), rel=0.15)


def test_steps_know_their_episodes() -> None:
    rng = np.random.default_rng(0)
    rolled = [
        Rolled(
            Episode("reach", index, text),
            rng.standard_normal((length, 2, 7)).astype(np.float32),
            rng.integers(9, size=(length, 2)),
            success,
        )
        for index, (text, length, success) in enumerate([("one", 3, True), ("two", 1, False), ("three", 2, True)])
    ]
    steps = Steps.of(rolled)
    assert steps.lengths.tolist() == [3, 1, 2]
    assert steps.success.tolist() == [True, False, True]
    seen = steps.seen(torch.tensor([5, 0, 3]))
    assert isinstance(seen, Seen)
    assert seen.instructions == ["three", "one", "two"]
    assert torch.equal(seen.history[0], torch.from_numpy(rolled[2].history[1]))
    assert [len(rows) for rows in steps.chunks(4)] == [4, 2]
