"""The methods of this experiment: each is an objective and where the trajectories come from that it learns from.

A trajectory's log-probability is the sum over its actions' tokens. Adding a method takes this file alone: a loss (or
one from `rlrazor.objectives`) and a line in `METHODS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlrazor import objectives
from rlrazor.errors import RazorError
from rlrazor.experiments.robot.world import FIRST, SECOND
from rlrazor.objectives import Objective

KL_SUFFIX = "+kl"


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
    """`objectives.kl_dpg` with truncated weights: those of whole trajectories are heavy-tailed."""
    weights_BG = objectives.dpg_weights(logp_BG, rewards_BG, base_logp_BG, truncate=True)
    return -(weights_BG * logp_BG).sum(dim=1).mean()


METHODS: Mapping[str, Method] = {
    "sft": Method("SFT", objectives.sft, route=FIRST),
    "sft-second": Method("SFT, second expert", objectives.sft, route=SECOND),
    # Rejection sampling from the base: what comes closest to the oracle of the digits.
    "filtered": Method("SFT on own successes", objectives.sft, own=True),
    # The paper's for robots: (R - mean) / std over all trajectories of an iteration, no KL.
    "reinforce": Method("REINFORCE", objectives.grpo, pooled=True),
    # The same over the trajectories of one start.
    "grpo": Method("GRPO", objectives.grpo),
    "kl-dpg": Method("KL-DPG", kl_dpg, weighted=True),
}


def find_method(name: str) -> tuple[Method, bool]:
    """The method of that name and whether it is KL-regularised: `grpo+kl` is `grpo` plus kl_coef * KL(pi || pi0).

    Raises RazorError, listing the valid names, for an unknown one.
    """
    plain = name.removesuffix(KL_SUFFIX)
    if plain not in METHODS:
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {', '.join(METHODS)}; each also with '{KL_SUFFIX}' for a KL "
            "penalty to the base, as in grpo+kl."
        )
    return METHODS[plain], name.endswith(KL_SUFFIX)


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    method, regularised = find_method(name)
    return f"{method.label} + KL" if regularised else method.label
