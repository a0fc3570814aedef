"""Similarity of representations against definitions written out as loops."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrazor.drift import Representation, activation_l1, activation_l2, cka, cknna

Array = NDArray[np.float64]


def activations(n: int, d: int, seed: int) -> Tensor:
    """Like those of a ReLU layer: not negative, many exactly 0."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


def nearby(base: Tensor, noise: float, seed: int = 9) -> Tensor:
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=base.dtype)
    return (base + noise * change).relu()


# --- Linear CKA ---


def hsic_of_centred_grams(a: Array, b: Array) -> float:
    """tr(K H L H) with K = A A^T, L = B B^T: HSIC but for a factor (Kornblith et al. 2019, eq. 3)."""
    n = len(a)
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(a @ a.T @ h @ b @ b.T @ h))


@pytest.mark.parametrize(("d_a", "d_b"), [(5, 5), (8, 3), (40, 50)])
def test_cka_is_the_ratio_of_hsics(d_a: int, d_b: int) -> None:
    a, b = activations(20, d_a, 0), activations(20, d_b, 1)
    x, y = a.numpy(), b.numpy()
    expected = hsic_of_centred_grams(x, y) / math.sqrt(hsic_of_centred_grams(x, x) * hsic_of_centred_grams(y, y))
    assert cka(Representation(a), Representation(b)) == pytest.approx(expected)
    assert 0 < expected < 1


def test_cka_ignores_rotation_scale_and_shift_but_not_a_general_linear_map() -> None:
    a, b = activations(30, 6, 0), activations(30, 6, 1)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    assert cka(Representation(a), Representation(3 * a @ rotation + 7)) == pytest.approx(1)
    between = cka(Representation(a), Representation(b))
    assert cka(Representation(a), Representation(0.1 * b @ rotation - 2)) == pytest.approx(between)
    assert cka(Representation(b), Representation(a)) == pytest.approx(between)
    stretched = a * torch.tensor([10, 1, 1, 1, 1, 1])
    assert cka(Representation(a), Representation(stretched)) < 0.9


# --- CKNNA ---


Kernel = list[list[float]]


def cosine_kernel(rows: Array) -> Kernel:
    def cosine(x: Array, y: Array) -> float:
        norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
        return float(x @ y) / norms if norms else 0.0

    return [[cosine(x, y) for y in rows] for x in rows]


def neighbours_of(kernel: Kernel, k: int) -> list[set[int]]:
    """The k others that each row is most similar to."""
    return [
        {j for _, j in sorted((similarity, j) for j, similarity in enumerate(row) if j != i)[-k:]}
        for i, row in enumerate(kernel)
    ]


def masked(kernel: Kernel, near_in_one: list[set[int]], near_in_other: list[set[int]]) -> Kernel:
    """0 but for the pairs (i, j) where j is among i's neighbours in both representations."""
    n = range(len(kernel))
    return [[kernel[i][j] if j in near_in_one[i] & near_in_other[i] else 0.0 for j in n] for i in n]


def hsic_eq_5(k: Kernel, other: Kernel) -> float:
    """Song et al. 2012, eq. 5, for kernels whose diagonals are 0."""
    n = len(k)
    indices = range(n)
    trace = sum(k[i][j] * other[j][i] for i in indices for j in indices)
    totals = sum(k[i][j] * other[q][r] for i in indices for j in indices for q in indices for r in indices)
    chained = sum(k[i][j] * other[j][q] for i in indices for j in indices for q in indices)
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)) / (n * (n - 3))


def hsic_u_statistic(k: Kernel, other: Kernel) -> float:
    """What eq. 5 is for symmetric kernels: means over pairs, quadruples and triples of indices that all differ."""
    n = len(k)
    pairs = sum(k[i][j] * other[i][j] for i, j in itertools.permutations(range(n), 2)) / math.perm(n, 2)
    quadruples = sum(k[i][j] * other[q][r] for i, j, q, r in itertools.permutations(range(n), 4)) / math.perm(n, 4)
    triples = sum(k[i][j] * other[i][q] for i, j, q in itertools.permutations(range(n), 3)) / math.perm(n, 3)
    return pairs + quadruples - 2 * triples


def cknna_by_loops(a: Array, b: Array, k: int, hsic: Callable[[Kernel, Kernel], float]) -> float:
    """As the authors' code has it (Huh et al. 2024), but for the 1e-6 that it adds to the denominator."""
    kernel_a, kernel_b = cosine_kernel(a), cosine_kernel(b)
    near_a, near_b = neighbours_of(kernel_a, k), neighbours_of(kernel_b, k)
    shared = hsic(masked(kernel_a, near_a, near_b), masked(kernel_b, near_a, near_b))
    own_a = hsic(masked(kernel_a, near_a, near_a), masked(kernel_a, near_a, near_a))
    own_b = hsic(masked(kernel_b, near_b, near_b), masked(kernel_b, near_b, near_b))
    return shared / math.sqrt(own_a * own_b)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_cknna_against_loops(k: int, noise: float) -> None:
    a = activations(9, 30, 0)  # units enough that no two cosines are the same
    b = nearby(a, noise)
    expected = cknna_by_loops(a.numpy(), b.numpy(), k, hsic_eq_5)
    assert cknna(Representation(a, k), Representation(b, k)) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_with_everyone_a_neighbour_cknna_is_cka_by_a_u_statistic(noise: float) -> None:
    a = activations(7, 6, 0)
    b = nearby(a, noise)
    expected = cknna_by_loops(a.numpy(), b.numpy(), 6, hsic_u_statistic)
    assert cknna(Representation(a, 6), Representation(b, 6)) == pytest.approx(expected)


def test_cknna_falls_as_noise_grows_and_ignores_rotation_and_the_scale_of_each_input() -> None:
    a = activations(200, 30, 0)
    values = [cknna(Representation(a), Representation(nearby(a, noise))) for noise in (0.01, 0.1, 0.3, 1.0, 10.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.9
    assert abs(values[-1]) < 0.1
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    lengths = torch.rand(200, 1, generator=generator, dtype=torch.float64) + 0.1
    assert cknna(Representation(a), Representation(lengths * a @ rotation)) == pytest.approx(1)


def test_neighbours_are_k_others_even_where_inputs_tie() -> None:
    """Dead inputs are as near to anyone as to anyone else, duplicates as near to each other as to themselves."""
    a = activations(40, 5, 0)
    a[:12] = a[0]
    a[20:35] = 0
    representation = Representation(a, 10)
    assert representation.nearest.sum(dim=1).tolist() == [10] * 40
    assert representation.nearest.diagonal().tolist() == [0] * 40
    kernel = cosine_kernel(a.numpy())
    for i, row in enumerate(kernel):
        chosen = [similarity for j, similarity in enumerate(row) if representation.nearest[i, j]]
        best = sorted(similarity for j, similarity in enumerate(row) if j != i)[-10:]
        assert sorted(chosen) == pytest.approx(best)
    assert cknna(representation, Representation(a.clone(), 10)) == 1


# --- Both ---


@pytest.mark.parametrize("similarity", [cka, cknna])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_1_for_the_same_activations(
    similarity: Callable[[Representation, Representation], float], dtype: torch.dtype
) -> None:
    a = activations(300, 50, 0).to(dtype)
    assert similarity(Representation(a), Representation(a.clone())) == 1


@pytest.mark.parametrize("similarity", [cka, cknna])
def test_float32_is_precise_to_5_digits(similarity: Callable[[Representation, Representation], float]) -> None:
    """At the size of an evaluation: 1,000 inputs, 256 units."""
    a = activations(1000, 256, 0)
    b = nearby(a, 0.3)
    in_float32 = similarity(Representation(a.float()), Representation(b.float()))
    assert in_float32 == pytest.approx(similarity(Representation(a), Representation(b)), abs=1e-5)


@pytest.mark.parametrize("similarity", [cka, cknna])
def test_dead_units_resemble_nothing(similarity: Callable[[Representation, Representation], float]) -> None:
    alive, dead = Representation(activations(20, 5, 0)), Representation(torch.zeros(20, 5, dtype=torch.float64))
    assert similarity(alive, dead) == similarity(dead, alive) == similarity(dead, dead) == 0


@pytest.mark.parametrize(("inputs", "neighbours"), [(10, 10), (10, 1), (5, 9), (3, 2)])
def test_too_few_inputs_or_neighbours_are_refused(inputs: int, neighbours: int) -> None:
    with pytest.raises(ValueError, match=rf"not {neighbours} neighbours among {inputs} inputs"):
        Representation(activations(inputs, 4, 0), neighbours)


def test_the_fewest_inputs() -> None:
    a = activations(4, 30, 0)
    expected = cknna_by_loops(a.numpy(), nearby(a, 0.2).numpy(), 3, hsic_eq_5)
    assert cknna(Representation(a, 3), Representation(nearby(a, 0.2), 3)) == pytest.approx(expected)


# --- Change of activations ---


def test_activation_changes_against_a_loop() -> None:
    before, after = activations(6, 4, 0), activations(6, 4, 1)
    l1 = l2 = 0.0
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        changes = [y - x for x, y in zip(old, new, strict=True)]
        l1 += sum(abs(change) for change in changes) / 6
        l2 += math.sqrt(sum(change**2 for change in changes)) / 6
    assert activation_l1(before, after) == pytest.approx(l1)
    assert activation_l2(before, after) == pytest.approx(l2)
    assert activation_l1(before, before) == activation_l2(before, before) == 0
