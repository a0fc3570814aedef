"""How far the parameters moved. All need both sets of weights, which a policy behind an API does not show."""

from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""Name -> parameter; matrices (out, in) and biases (out,)."""

WEIGHT_MEASURES = (
    "weight_l1",
    "weight_l2",
    "weight_fisher_l2",
    "weight_spectral",
    "weight_sparsity",
    "weight_rank",
)


def measure_weights(
    base: Weights, tuned: Weights, fisher: Weights | None = None, *, spectra: bool = True
) -> dict[str, float]:
    """Every weight measure of the update `tuned - base`, taken as one block-diagonal matrix with a block a layer.

    Without `fisher`, all but the measure that needs it; without `spectra`, all but the two that need singular values,
    which take longest: minutes for billions of parameters.

    `weight_l1` and `weight_l2` are the norms of all parameters' changes; `weight_fisher_l2` is the square root of the
    sum of F (change)^2, with `fisher` the diagonal of the base's Fisher information. `weight_spectral` is the largest
    singular value of any matrix's update, `weight_rank` the numerical rank as a fraction of full (singular values above
    max(out, in) * the dtype's epsilon * the matrix's largest, numpy's rule), `weight_sparsity` the fraction of
    parameters exactly unchanged.
    """
    l1 = squares = fisher_squares = largest = 0.0
    unchanged = parameters = rank = full_rank = 0
    for name, before in base.items():
        change = tuned[name].float() - before.float()
        l1 += change.abs().sum().item()
        squares += change.square().sum().item()
        if fisher is not None:
            fisher_squares += (fisher[name] * change.square()).sum().item()
        unchanged += int((change == 0).sum())
        parameters += change.numel()
        if spectra and change.ndim == 2:
            singular = singular_values(change)
            largest = max(largest, singular[0].item())
            tolerance = max(change.shape) * torch.finfo(torch.float32).eps * singular[0]
            rank += int((singular > tolerance).sum())
            full_rank += min(change.shape)
    measures = {"weight_l1": l1, "weight_l2": squares**0.5, "weight_sparsity": unchanged / parameters}
    if fisher is not None:
        measures["weight_fisher_l2"] = fisher_squares**0.5
    if spectra:
        measures |= {"weight_spectral": largest, "weight_rank": rank / full_rank}
    return {name: measures[name] for name in WEIGHT_MEASURES if name in measures}


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values (min(m, n),), descending, float64, from the Gram matrix: three times as fast as an SVD.

    Squaring halves the digits: values below 3e-8 of the largest are noise, a thousandth of the smallest that counts in
    the rank of a float32 matrix.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.clamp(min=0).sqrt().flip(0)
