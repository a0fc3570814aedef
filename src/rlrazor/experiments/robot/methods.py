"""The methods of this experiment: each is an objective and where the trajectories come from that it learns from.

A trajectory's log-probability is the sum over its actions' tokens. Adding a method takes this file alone: a loss (or
one from `rlrazor.objectives`) and a line in `METHODS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrazor import objectives
from rlrazor.experiments.robot.world import FIRST, SECOND
from rlrazor.objectives import Objective
from rlrazor.runs import method_names


@dataclass(frozen=True)
class Method:
    """How a policy is fine-tuned.

    `route`: of the expert whose demonstrations are learnt from; `own`: the base's own successes are. Without either the
    method is on-policy: at each update it learns from new trajectories of the policy, several of each start, which are
    the objective's groups; `pooled`: all of them are one group. `weighted`: the objective's weights depend on the
    trajectories' log-probabilities, not on rewards alone, so that these have to be known before.
    """

    label: str
    objective: Objective
    route: str | None = None
    own: bool = False
    pooled: bool = False
    weighted: bool = False

    @property
    def on_policy(self) -> bool:
        """Whether the trajectories are those of the policy being trained."""
        return self.route is None and not self.own


def kl_dpg(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """`objectives.kl_dpg` with truncated weights, since those of whole trajectories are heavy-tailed.

    No weight is above 1 / sqrt(G), or 1 / n where only n < sqrt(G) trajectories succeed; what is cut off is shared out
    among the other successes in proportion. `objectives.dpg_weights` scales all after the cut, so that a weight may be
    above the cap again, which of a few successes it mostly is.
    """
    weights_BG = capped(objectives.dpg_weights(logp_BG, rewards_BG, base_logp_BG), rewards_BG > 0)
    return -(weights_BG * logp_BG).sum(dim=1).mean()


def capped(weights_BG: Tensor, counted_BG: Tensor) -> Tensor:
    """Weights of sum 1 over a group's counted members, none above 1 / sqrt(G), or 1 / n where fewer than that count."""
    counts_B1 = counted_BG.sum(dim=1, keepdim=True)
    cap_B1 = torch.maximum(torch.full_like(weights_BG[:, :1], weights_BG.shape[1] ** -0.5), 1 / counts_B1.clamp(min=1))
    # What has weight 0 by underflow takes part in what is shared out.
    weights_BG = torch.where(counted_BG, weights_BG.clamp(min=torch.finfo(weights_BG.dtype).tiny), 0.0)
    full_BG = torch.zeros_like(counted_BG)
    while (over_BG := (weights_BG > cap_B1) & ~full_BG).any():
        full_BG |= over_BG
        free_BG = weights_BG.masked_fill(full_BG, 0.0)
        left_B1 = 1 - cap_B1 * full_BG.sum(dim=1, keepdim=True)
        shared_BG = free_BG / free_BG.sum(dim=1, keepdim=True).clamp(min=torch.finfo(free_BG.dtype).tiny) * left_B1
        weights_BG = torch.where(full_BG, cap_B1, torch.where(full_BG.any(dim=1, keepdim=True), shared_BG, weights_BG))
    return weights_BG


METHODS: Mapping[str, Method] = {
    "sft": Method("SFT", objectives.sft, route=FIRST),
    "sft-second": Method("SFT, second expert", objectives.sft, route=SECOND),
    # Rejection sampling from the base: what comes closest to the oracle of the digits.
    "filtered": Method("SFT on own successes", objectives.sft, own=True),
    # The paper's for robots: (R - mean) / std over all trajectories of an iteration, no KL.
    "reinforce": Method("REINFORCE", objectives.grpo, pooled=True),
    # The same over the trajectories of one start.
    "grpo": Method("GRPO", objectives.grpo),
    # Aimed at the base's successes, wherever they start; of one start there would mostly be one success, or none.
    "kl-dpg": Method("KL-DPG", kl_dpg, pooled=True, weighted=True),
}


def find_method(name: str) -> tuple[Method, bool]:
    """One of `METHODS`, and whether it is KL-regularised; see `method_names.find`."""
    return method_names.find(METHODS, name)


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    return method_names.label(METHODS, name)
