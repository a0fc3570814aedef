"""Measures of the weights' update against loops and numpy.linalg."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag
from torch import Tensor

from rlrazor.drift import WEIGHT_MEASURES, measure_weights, singular_values

SHAPES = {"0.weight": (6, 9), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,), "4.weight": (7, 4)}


def random_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def base() -> dict[str, Tensor]:
    return random_weights(0)


@pytest.fixture
def tuned(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base with about half of its parameters moved."""
    moved = random_weights(1)
    return {name: torch.where(moved[name] > 0, before + moved[name], before) for name, before in base.items()}


@pytest.fixture
def fisher() -> dict[str, Tensor]:
    return {name: values.square() for name, values in random_weights(2).items()}


def update(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: tuned[name].numpy() - before.numpy() for name, before in base.items()}


def test_norms_and_sparsity_against_a_loop(
    base: dict[str, Tensor], tuned: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    l1 = squares = fisher_squares = 0.0
    unchanged = parameters = 0
    for name, before in base.items():
        triples = zip(before.flatten(), tuned[name].flatten(), fisher[name].flatten(), strict=True)
        for old, new, information in triples:
            change = float(new) - float(old)
            l1 += abs(change)
            squares += change**2
            fisher_squares += float(information) * change**2
            unchanged += float(new) == float(old)
            parameters += 1
    measured = measure_weights(base, tuned, fisher)
    assert tuple(measured) == WEIGHT_MEASURES
    assert measured["weight_l1"] == pytest.approx(l1)
    assert measured["weight_l2"] == pytest.approx(math.sqrt(squares))
    assert measured["weight_fisher_l2"] == pytest.approx(math.sqrt(fisher_squares))
    assert 0.3 < unchanged / parameters < 0.7
    assert measured["weight_sparsity"] == unchanged / parameters


def test_spectral_norm_and_rank_are_those_of_the_block_diagonal_update(
    base: dict[str, Tensor], tuned: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    matrices = [change for change in update(base, tuned).values() if change.ndim == 2]
    whole = block_diag(*matrices)
    measured = measure_weights(base, tuned, fisher)
    assert measured["weight_spectral"] == pytest.approx(np.linalg.norm(whole, ord=2))
    assert measured["weight_spectral"] == pytest.approx(max(np.linalg.norm(m, ord=2) for m in matrices))
    full = sum(min(matrix.shape) for matrix in matrices)
    assert measured["weight_rank"] == np.linalg.matrix_rank(whole) / full


@pytest.mark.parametrize("shape", [(10, 256), (256, 512), (512, 785), (40, 7)])
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_rank_is_numpys(shape: tuple[int, int], rank: int) -> None:
    """Float32 products of thin matrices: what rounding leaves in the other directions does not count."""
    generator = torch.Generator().manual_seed(rank)
    low = 1e-3 * torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    assert np.linalg.matrix_rank(low.numpy()) == rank
    zero, one = {"w": torch.zeros(shape)}, {"w": torch.ones(shape)}
    assert measure_weights(zero, {"w": low}, one)["weight_rank"] == rank / min(shape)


def test_full_rank_of_a_dense_update() -> None:
    dense = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert np.linalg.matrix_rank(dense.numpy()) == 256
    assert measure_weights({"w": torch.zeros(256, 512)}, {"w": dense}, {"w": dense.abs()})["weight_rank"] == 1


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_the_tolerance_of_the_rank_is_numpys(factor: float) -> None:
    """A second singular value on either side of max(m, n) * epsilon of the first."""
    tolerance = 300 * np.finfo(np.float32).eps
    matrix = np.zeros((200, 300), dtype=np.float32)
    matrix[0, 0], matrix[1, 1] = 1, factor * tolerance
    measured = measure_weights(
        {"w": torch.zeros(200, 300)}, {"w": torch.from_numpy(matrix)}, {"w": torch.ones(200, 300)}
    )
    assert measured["weight_rank"] * 200 == pytest.approx(np.linalg.matrix_rank(matrix))
    assert np.linalg.matrix_rank(matrix) == (2 if factor > 1 else 1)


def test_no_update_at_all(base: dict[str, Tensor], fisher: dict[str, Tensor]) -> None:
    measured = measure_weights(base, {name: weight.clone() for name, weight in base.items()}, fisher)
    assert measured == dict.fromkeys(WEIGHT_MEASURES, 0.0) | {"weight_sparsity": 1.0}


def test_bfloat16_weights_are_compared_in_float32(base: dict[str, Tensor], fisher: dict[str, Tensor]) -> None:
    rounded = {name: weight.bfloat16() for name, weight in base.items()}
    expected = sum(np.abs(weight.bfloat16().float().numpy() - weight.numpy()).sum() for weight in base.values())
    assert measure_weights(base, rounded, fisher)["weight_l1"] == pytest.approx(float(expected))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (10, 256), (300, 40), (64, 64)])
def test_singular_values_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-8)


def test_small_singular_values_are_exact_to_a_millionth_of_the_largest() -> None:
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.normal(size=(200, 7)))[0], np.linalg.qr(rng.normal(size=(300, 7)))[0]
    expected = np.logspace(0, -6, 7)
    found = singular_values(torch.tensor(left * expected @ right.T))
    np.testing.assert_allclose(found[:7], expected, rtol=1e-3)
    assert found[7:].max() < 1e-7
