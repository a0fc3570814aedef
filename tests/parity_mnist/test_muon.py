"""Optimisers against their equations in numpy, and Muon against torch's."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrazor.experiments.parity_mnist.optimizers import (
    NEWTON_SCHULZ,
    OPTIMIZERS,
    Muon,
    ScheduledOptimizer,
    make_optimizer,
    orthogonalised,
)
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, add_low_rank_adapters

Array = NDArray[np.float64]

SHAPES = [(12, 30), (30, 12), (8, 8), (10, 64)]


def matrix(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Muon ---


def orthogonalised_by_svd(values: Array) -> Array:
    """The iteration acts on singular values alone: five times the polynomial, singular vectors as they were."""
    left, singular, right = np.linalg.svd(values / np.linalg.norm(values), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        singular = a * singular + b * singular**3 + c * singular**5
    result: Array = left * singular @ right
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalisation_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    values = matrix(shape, 0)
    found = orthogonalised(values)
    np.testing.assert_allclose(found, orthogonalised_by_svd(values.double().numpy()), atol=1e-4)
    left, _, right = np.linalg.svd(values.numpy(), full_matrices=False)
    in_their_basis = left.T @ found.numpy() @ right.T
    np.testing.assert_allclose(in_their_basis, np.diag(np.diag(in_their_basis)), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_1_whatever_the_scale(scale: float) -> None:
    """Their range as documented; those below .0015 of the norm stay behind, by a factor of 3.4445^5 at most."""
    left, _, right = np.linalg.svd(matrix((60, 200), 0).double().numpy(), full_matrices=False)
    before = np.geomspace(1, 1e-5, 60)
    before /= np.linalg.norm(before)
    found = np.linalg.svd(orthogonalised(torch.tensor(scale * left * before @ right)).numpy(), compute_uv=False)
    large = before >= 0.0015
    assert 20 < large.sum() < 60
    # Sorted anew, since the iteration does not keep their order.
    assert np.sort(found)[-large.sum() :].min() > 0.68
    assert found.max() < 1.21
    assert np.sort(found)[0] == pytest.approx(before.min() * NEWTON_SCHULZ[0] ** 5, rel=1e-3)


def test_no_gradient_no_direction() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def steps_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> list[Tensor]:
    """The change of a matrix of each shape after some steps with random gradients."""
    weights = [nn.Parameter(matrix(shape, 1)) for shape in SHAPES]
    optimizer = make(weights)
    for step in range(steps):
        for weight in weights:
            weight.grad = matrix(tuple(weight.shape), 100 + step)
        optimizer.step()
    return [weight.detach() - matrix(shape, 1) for weight, shape in zip(weights, SHAPES, strict=True)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("steps", [1, 6])
def test_muon_is_torchs_muon_but_for_bfloat16(steps: int) -> None:
    ours = steps_of(lambda weights: Muon(weights, lr=0.02), steps)
    theirs = steps_of(lambda weights: torch.optim.Muon(weights, lr=0.02, weight_decay=0.0), steps)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 0.04 * b.norm()  # bfloat16 has three digits
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.01)


def test_muon_against_its_equations_in_numpy() -> None:
    found = steps_of(lambda weights: Muon(weights, lr=0.02, momentum=0.8), steps=4)
    for shape, change in zip(SHAPES, found, strict=True):
        momentum, expected = np.zeros(shape), np.zeros(shape)
        for step in range(4):
            gradient = matrix(shape, 100 + step).double().numpy()
            momentum = 0.8 * momentum + 0.2 * gradient
            expected -= (
                0.02 * max(1, shape[0] / shape[1]) ** 0.5 * orthogonalised_by_svd(0.2 * gradient + 0.8 * momentum)
            )
        np.testing.assert_allclose(change, expected, atol=1e-4)


def test_a_matrix_without_a_gradient_stays() -> None:
    idle, busy = nn.Parameter(matrix((3, 4), 0)), nn.Parameter(matrix((3, 4), 0))
    busy.grad = matrix((3, 4), 1)
    Muon([idle, busy], lr=0.1).step()
    assert torch.equal(idle, matrix((3, 4), 0))
    assert not torch.equal(busy, matrix((3, 4), 0))


# --- AdamW and SGD ---


def adam(gradients: Sequence[Array], lr: float) -> Array:
    """AdamW without weight decay is Adam (arXiv:1412.6980)."""
    mean = square = change = np.zeros_like(gradients[0])
    for t, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        change = change - lr * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    return change


def sgd(gradients: Sequence[Array], lr: float) -> Array:
    velocity = change = np.zeros_like(gradients[0])
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        change = change - lr * velocity
    return change


@pytest.fixture
def policy() -> DigitPolicy:
    return DigitPolicy()


def change_of(policy: DigitPolicy, optimizer: ScheduledOptimizer, steps: int) -> dict[str, Array]:
    before = copy.deepcopy(policy.state_dict())
    for step in range(steps):
        for weight in policy.parameters():
            weight.grad = matrix(tuple(weight.shape), 100 + step)
        optimizer.step()
    return {name: (weight - before[name]).double().numpy() for name, weight in policy.state_dict().items()}


@pytest.mark.parametrize(("name", "equations"), [("adamw", adam), ("sgd", sgd)])
def test_adamw_and_sgd_against_their_equations(
    policy: DigitPolicy, name: str, equations: Callable[[Sequence[Array], float], Array]
) -> None:
    changes = change_of(policy, make_optimizer(name, policy, lr=0.01), steps=3)
    for change in changes.values():
        gradients = [matrix(change.shape, 100 + step).double().numpy() for step in range(3)]
        np.testing.assert_allclose(change, equations(gradients, 0.01), atol=1e-6)


def test_muon_takes_the_matrices_and_leaves_the_biases_to_adamw_at_a_tenth(policy: DigitPolicy) -> None:
    changes = change_of(policy, make_optimizer("muon", policy, lr=0.01), steps=2)
    for weight, change in changes.items():
        gradients = [matrix(change.shape, 100 + step).double().numpy() for step in range(2)]
        if weight.endswith("bias"):
            np.testing.assert_allclose(change, adam(gradients, 0.001), atol=1e-6)
        else:  # two orthogonal updates, each of norm sqrt(rank) times the spread of the singular values
            norm = np.linalg.norm(change) / np.sqrt(min(change.shape))
            assert 0.01 * 0.68 < norm < 2 * 0.01 * 1.21


# --- What all share ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_schedule_is_a_factor_of_every_peak(policy: DigitPolicy, name: str) -> None:
    optimizer = make_optimizer(name, policy, lr=0.3)

    def lrs() -> list[float]:
        return [group["lr"] for part in optimizer.optimizers for group in part.param_groups]

    peaks = lrs()
    assert peaks == ([0.3, pytest.approx(0.03)] if name == "muon" else [0.3])
    for factor in (0.5, 0.1, 1.0):  # of the peak, not of the last one
        optimizer.set_lr_factor(factor)
        assert lrs() == pytest.approx([peak * factor for peak in peaks])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_a_factor_of_0_nothing_moves(policy: DigitPolicy, name: str) -> None:
    optimizer = make_optimizer(name, policy, lr=0.3)
    optimizer.set_lr_factor(0)
    assert all((change == 0).all() for change in change_of(policy, optimizer, steps=1).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_weight_moves_and_gradients_can_be_dropped(policy: DigitPolicy, name: str) -> None:
    optimizer = make_optimizer(name, policy, lr=0.3)
    assert all((change != 0).all() for change in change_of(policy, optimizer, steps=1).values())
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in policy.parameters())


def test_frozen_weights_are_left_out(policy: DigitPolicy) -> None:
    add_low_rank_adapters(policy, 2, torch.Generator().manual_seed(0))
    (adamw,) = make_optimizer("adamw", policy, lr=0.1).optimizers
    trained = {id(weight) for group in adamw.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in policy.parameters() if weight.requires_grad}
    assert len(trained) == 6
