"""Distances between the base's and the tuned policy's output distributions, exact over the outcomes.

A measure is a function of two tensors of log-probabilities, base first, shape (B, V): B inputs, V outcomes, natural
logarithm. It returns one value per input, shape (B,). An outcome of probability 0 has log-probability -inf.
A new measure is one function and one line in `DISTRIBUTION_MEASURES`.
"""

import math
from collections.abc import Callable, Mapping

import torch
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


def output_l2(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """Euclidean distance between the two vectors of probabilities, at most sqrt(2)."""
    distance_B: Tensor = torch.linalg.vector_norm(base_logp_BV.exp() - logp_BV.exp(), dim=-1)
    return distance_B


def jensen_shannon(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats: the mean KL of the two to their mixture, at most log 2 (Lin 1991)."""
    mixture_BV = torch.logaddexp(base_logp_BV, logp_BV) - math.log(2)
    return (forward_kl(base_logp_BV, mixture_BV) + forward_kl(logp_BV, mixture_BV)) / 2


def hellinger(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """Hellinger distance: the Euclidean one between square roots of probabilities, over sqrt(2). A fraction of 1."""
    distance_B: Tensor = torch.linalg.vector_norm((base_logp_BV / 2).exp() - (logp_BV / 2).exp(), dim=-1)
    return distance_B / math.sqrt(2)


def wasserstein_1(base_logp_BV: Tensor, logp_BV: Tensor) -> Tensor:
    """1-Wasserstein distance with outcome v at the number v on a line, in steps of one outcome.

    Needs outcomes that are ordered, as digits are. Where every two outcomes are equally far apart, as classes without
    an order are, the 1-Wasserstein distance is the total variation.
    """
    return (base_logp_BV.exp() - logp_BV.exp()).cumsum(dim=-1)[..., :-1].abs().sum(dim=-1)


DISTRIBUTION_MEASURES: Mapping[str, Measure] = {
    "kl_forward": forward_kl,
    "kl_reverse": reverse_kl,
    "total_variation": total_variation,
    "output_l2": output_l2,
    "jensen_shannon": jensen_shannon,
    "hellinger": hellinger,
    "wasserstein_1": wasserstein_1,
}


def measure(base_logp_BV: Tensor, logp_BV: Tensor) -> dict[str, float]:
    """Every distribution measure, averaged over the B inputs, summed in float64."""
    base, tuned = base_logp_BV.double(), logp_BV.double()
    return {name: distance(base, tuned).mean().item() for name, distance in DISTRIBUTION_MEASURES.items()}
