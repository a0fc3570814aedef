"""How far a policy moved from its base: on its outputs, in its weights, in its representations."""

from rlrazor.drift.distribution import (
    DISTRIBUTION_MEASURES,
    forward_kl,
    hellinger,
    jensen_shannon,
    measure,
    output_l2,
    reverse_kl,
    total_variation,
    wasserstein_1,
)
from rlrazor.drift.representation import Representation, activation_l1, activation_l2, cka, cknna
from rlrazor.drift.weights import WEIGHT_MEASURES, measure_weights, singular_values

__all__ = [
    "DISTRIBUTION_MEASURES",
    "WEIGHT_MEASURES",
    "Representation",
    "activation_l1",
    "activation_l2",
    "cka",
    "cknna",
    "forward_kl",
    "hellinger",
    "jensen_shannon",
    "measure",
    "measure_weights",
    "output_l2",
    "reverse_kl",
    "singular_values",
    "total_variation",
    "wasserstein_1",
]
