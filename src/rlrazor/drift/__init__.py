"""How far a policy moved from its base: on its outputs (`distribution`), later in its weights and representations."""

from rlrazor.drift.distribution import DISTRIBUTION_MEASURES, forward_kl, measure, reverse_kl, total_variation

__all__ = ["DISTRIBUTION_MEASURES", "forward_kl", "measure", "reverse_kl", "total_variation"]
