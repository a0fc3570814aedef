"""How far the inside of a policy moved: its hidden activations on a set of inputs, before and after.

Activations are matrices (N, D): N inputs, D units. The base's side is prepared once, in a `Representation`, since every
checkpoint is compared with the same base.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10  # as in Huh et al. 2024


def activation_l1(base_ND: Tensor, tuned_ND: Tensor) -> float:
    """The change of an input's activations, summed over units, averaged over inputs."""
    return (tuned_ND - base_ND).abs().sum(dim=1).mean().item()


def activation_l2(base_ND: Tensor, tuned_ND: Tensor) -> float:
    """The Euclidean length of the change of an input's activations, averaged over inputs."""
    lengths_N: Tensor = torch.linalg.vector_norm(tuned_ND - base_ND, dim=1)
    return lengths_N.mean().item()


class Representation:
    """Activations (N, D) of N inputs, with what comparing them to others needs, computed once when first asked for."""

    def __init__(self, activations_ND: Tensor, neighbours: int = NEIGHBOURS) -> None:
        inputs = len(activations_ND)
        if not (2 <= neighbours < inputs and inputs >= 4):  # the unbiased HSIC divides by N - 3
            raise ValueError(
                "CKNNA needs 4 inputs or more, and at least 2 neighbours but fewer than inputs: "
                f"not {neighbours} neighbours among {inputs} inputs"
            )
        self.activations = activations_ND
        self.neighbours = neighbours

    @cached_property
    def centred(self) -> Tensor:
        """The activations (N, D) minus their mean."""
        return self.activations - self.activations.mean(dim=0)

    @cached_property
    def covariance_norm(self) -> Tensor:
        """The Frobenius norm of the units' covariance (times N)."""
        norm: Tensor = torch.linalg.matrix_norm(self.centred.T @ self.centred)
        return norm

    @cached_property
    def kernel(self) -> Tensor:
        """Cosines between inputs (N, N), 0 on the diagonal."""
        unit_ND = F.normalize(self.activations, dim=1)
        return (unit_ND @ unit_ND.T).fill_diagonal_(0.0)

    @cached_property
    def nearest(self) -> Tensor:
        """(N, N), a row per input: 1 at its nearest `neighbours`, itself not among them."""
        others_NN = self.kernel.clone().fill_diagonal_(-torch.inf)
        nearest = others_NN.topk(self.neighbours, dim=1, sorted=False).indices
        return torch.zeros_like(others_NN).scatter_(1, nearest, 1.0)

    @cached_property
    def self_alignment(self) -> Tensor:
        """HSIC of the kernel with itself, over its own nearest neighbours."""
        kernel_NN = self.kernel * self.nearest
        return _unbiased_hsic(kernel_NN, kernel_NN)


def cka(a: Representation, b: Representation) -> float:
    """Linear centred kernel alignment: 1 for activations equal up to rotation and scale (Kornblith et al. 2019)."""
    shared = torch.linalg.matrix_norm(a.centred.T @ b.centred).square()
    return _share(shared, a.covariance_norm * b.covariance_norm)


def cknna(a: Representation, b: Representation) -> float:
    """CKA over mutual nearest neighbours: does an input keep its neighbours? (Huh et al. 2024.) 1 if all cosines stay.

    As in the authors' code: cosine kernels, each restricted to the pairs that are among the `neighbours` nearest in
    both representations, compared by the unbiased HSIC of Song et al. 2012. Where neighbours tie, which of them count
    is arbitrary, but the same each time.
    """
    mutual_NN = a.nearest * b.nearest
    shared = _unbiased_hsic(a.kernel * mutual_NN, b.kernel * mutual_NN)
    return _share(shared, (a.self_alignment * b.self_alignment).clamp(min=0).sqrt())


def _share(part: Tensor, whole: Tensor) -> float:
    """0 where there is nothing to share: units that are dead on all inputs resemble nothing."""
    return (part / whole).item() if whole > 0 else 0.0


def _unbiased_hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5; both kernels with a diagonal of 0. Sums in float64: they nearly cancel."""
    n = len(k_NN)
    trace = (k_NN * l_NN.T).sum(dtype=torch.float64)
    totals = k_NN.sum(dtype=torch.float64) * l_NN.sum(dtype=torch.float64) / ((n - 1) * (n - 2))
    crossed = k_NN.sum(dim=0, dtype=torch.float64) @ l_NN.sum(dim=1, dtype=torch.float64)
    return (trace + totals - 2 * crossed / (n - 2)) / (n * (n - 3))
