"""Distances between the base's and the tuned policy's output distributions, exact over the outcomes.

A measure is a function of two tensors of log-probabilities, base first, shape (B, V): B inputs, V outcomes, natural
logarithm. It returns one value per input, shape (B,). An outcome of probability 0 has log-probability -inf.
A new measure is one function and one line in `DISTRIBUTION_MEASURES`.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]


def forward_kl(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """KL(pi0 || pi) in nats: the base's surprise at the tuned policy, the paper's predictor of forgetting."""
    base_BV = base_logp_BV.exp()
    return (base_BV * (base_logp_BV - logp_BV)).masked_fill(base_BV == 0, 0.0).sum(dim=-1)


def reverse_kl(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """KL(pi || pi0) in nats: what KL-regularised RL penalises."""
    return forward_kl(logp_BV, base_logp_BV)


def total_variation(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """Half the L1 distance between the two distributions: a fraction of 1."""
    return (base_logp_BV.exp() - logp_BV.exp()).abs().sum(dim=-1) / 2


DISTRIBUTION_MEASURES: Mapping[str, Measure] = {
    "kl_forward": forward_kl,
    "kl_reverse": reverse_kl,
    "total_variation": total_variation,
}


def measure(base_logp_BV: Tensor, logp_BV: Tensor) -> dict[str, float]:
    """Every distribution measure, averaged over the B inputs, summed in float64."""
    base, tuned = base_logp_BV.double(), logp_BV.double()
    return {name: distance(base, tuned).mean().item() for name, distance in DISTRIBUTION_MEASURES.items()}
