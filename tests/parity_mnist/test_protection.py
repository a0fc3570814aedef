"""Terms against forgetting, against numpy, scipy and counting."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr, softmax
from torch import Generator, Tensor

from rlrazor.experiments.parity_mnist.policy import (
    NEW_TASK,
    PRIOR_TASK,
    DigitPolicy,
    as_inputs,
    diagonal_fisher,
)
from rlrazor.experiments.parity_mnist.protection import (
    Past,
    elastic_weight_consolidation,
    learning_without_forgetting,
    replay,
)


def images(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, 28, 28), generator=Generator().manual_seed(seed), dtype=torch.uint8)


def logits_of(policy: DigitPolicy, inputs: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        logits: NDArray[np.float64] = policy(inputs).double().numpy()
    return logits


@pytest.fixture
def past() -> Past:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = DigitPolicy()
    inputs = as_inputs(images(40, 1), PRIOR_TASK)
    return Past(base, inputs, torch.arange(40) % 10, strength=0.3, rng=Generator().manual_seed(2))


@pytest.fixture
def tuned(past: Past) -> DigitPolicy:
    moved, generator = copy.deepcopy(past.base), Generator().manual_seed(3)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return moved


@pytest.fixture
def batch() -> Tensor:
    return as_inputs(images(16, 4), NEW_TASK)


# --- EWC ---


def test_ewc_is_a_quadratic_form_around_the_base(past: Past, tuned: DigitPolicy, batch: Tensor) -> None:
    fisher, before = diagonal_fisher(past.base, past.prior_inputs), copy.deepcopy(past.base.state_dict())
    term = elastic_weight_consolidation(past)
    with torch.no_grad():
        for weight in past.base.parameters():
            weight.zero_()  # what the term keeps is a copy
    value = term(tuned, batch)
    value.backward()
    expected = 0.0
    for name, weight in tuned.named_parameters():
        information = fisher[name].double().numpy()
        change = weight.detach().double().numpy() - before[name].double().numpy()
        expected += 0.3 / 2 * float((information * change**2).sum())
        assert weight.grad is not None
        np.testing.assert_allclose(weight.grad, 0.3 * information * change, rtol=1e-4, atol=1e-12)
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_ewc_does_not_pull_the_base_anywhere(past: Past, batch: Tensor) -> None:
    policy = copy.deepcopy(past.base)
    value = elastic_weight_consolidation(past)(policy, batch)
    value.backward()
    assert value.item() == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in policy.parameters())


# --- LwF ---


def test_lwf_is_the_kl_at_temperature_2_of_new_images_asked_as_the_prior_task(
    past: Past, tuned: DigitPolicy, batch: Tensor
) -> None:
    given = batch.clone()
    value = learning_without_forgetting(past)(tuned, batch).item()
    assert torch.equal(batch, given)
    asked = as_inputs(images(16, 4), PRIOR_TASK)
    base, policy = softmax(logits_of(past.base, asked) / 2, axis=1), softmax(logits_of(tuned, asked) / 2, axis=1)
    assert value == pytest.approx(0.3 * 2**2 * rel_entr(base, policy).sum(axis=1).mean(), rel=1e-4)
    assert value > 0.001


def test_lwf_trains_the_policy_and_not_the_base(past: Past, tuned: DigitPolicy, batch: Tensor) -> None:
    term = learning_without_forgetting(past)
    term(tuned, batch).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in tuned.parameters())
    assert all(weight.grad is None for weight in past.base.parameters())
    assert term(copy.deepcopy(past.base), batch).item() == 0


def test_the_temperature_does_not_shrink_the_gradient_of_lwf(past: Past, tuned: DigitPolicy, batch: Tensor) -> None:
    """What T^2 is for: on the last bias it is T * (policy - base) at temperature T, not (policy - base) / T."""
    learning_without_forgetting(replace(past, strength=1.0))(tuned, batch).backward()
    asked = as_inputs(images(16, 4), PRIOR_TASK)
    gap = softmax(logits_of(tuned, asked) / 2, axis=1) - softmax(logits_of(past.base, asked) / 2, axis=1)
    gradient = tuned.get_parameter("4.bias").grad
    assert gradient is not None
    np.testing.assert_allclose(gradient, 2 * gap.mean(axis=0), rtol=1e-3, atol=1e-6)


# --- Replay ---


@pytest.fixture
def asked(tuned: DigitPolicy) -> list[Tensor]:
    """The inputs that `tuned` is asked about, call by call."""
    seen: list[Tensor] = []
    tuned.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize(("strength", "new", "old"), [(0.05, 128, 7), (0.05, 19, 1), (0.5, 16, 16), (0.2, 64, 16)])
def test_a_share_of_each_batch_is_prior_images(
    past: Past, tuned: DigitPolicy, asked: list[Tensor], strength: float, new: int, old: int
) -> None:
    replay(replace(past, strength=strength))(tuned, as_inputs(images(new, 4), NEW_TASK))
    (old_inputs,) = asked
    assert len(old_inputs) == old
    assert old / (old + new) == pytest.approx(strength, abs=0.5 / new)
    prior = {tuple(row.tolist()) for row in past.prior_inputs}
    assert all(tuple(row.tolist()) in prior for row in old_inputs)


def test_even_a_tiny_share_is_one_image(past: Past, tuned: DigitPolicy, asked: list[Tensor], batch: Tensor) -> None:
    replay(replace(past, strength=0.001))(tuned, batch)
    assert len(asked[0]) == 1


@pytest.mark.parametrize("strength", [0.05, 0.3])
def test_prior_images_weigh_as_much_of_the_loss_as_they_are_of_the_batch(
    past: Past, tuned: DigitPolicy, asked: list[Tensor], batch: Tensor, strength: float
) -> None:
    """By scipy: the term, added to a mean over new images, is `strength` of the two together, whatever rounding did."""
    value = replay(replace(past, strength=strength))(tuned, batch).item()
    (old_inputs,) = asked
    label_of = {
        tuple(row.tolist()): int(label) for row, label in zip(past.prior_inputs, past.prior_labels, strict=True)
    }
    logp = log_softmax(logits_of(tuned, old_inputs), axis=1)
    losses = [-logp[i, label_of[tuple(row.tolist())]] for i, row in enumerate(old_inputs)]
    weight = value / np.mean(losses)
    assert weight / (1 + weight) == pytest.approx(strength, rel=1e-4)


def test_the_same_seed_replays_the_same_rows_and_each_step_others(
    past: Past, tuned: DigitPolicy, asked: list[Tensor], batch: Tensor
) -> None:
    for seed in (5, 5, 6):
        term = replay(replace(past, rng=Generator().manual_seed(seed)))
        for _ in range(2):
            term(tuned, batch)
    first, second, first_again, second_again, other, _ = asked
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_replay_draws_every_image_as_often_as_any_other(
    past: Past, tuned: DigitPolicy, asked: list[Tensor], batch: Tensor
) -> None:
    term = replay(replace(past, strength=0.98))  # 784 at a time
    term(tuned, batch)
    term(tuned, batch)
    old_inputs = torch.cat(asked)
    counts = [(old_inputs == row).all(dim=1).sum().item() for row in past.prior_inputs]
    assert sum(counts) == len(old_inputs) == 2 * 784
    spread = np.sqrt(len(old_inputs) / 40 * (1 - 1 / 40))  # of a binomial
    assert np.abs(np.array(counts) - len(old_inputs) / 40).max() < 4 * spread
