"""Training objectives: a method is a loss on log-probabilities and rewards, whatever the policy behind them.

Every objective has the same signature, so that one training loop serves them all and a new one is one function:

    loss(logp_BG, rewards_BG, base_logp_BG) -> scalar

    logp_BG       log pi(y|x) of G outputs y for each of B prompts x, in nats, carrying gradient
    rewards_BG    their rewards; here 1 for a correct output and 0 for a wrong one
    base_logp_BG  log pi0(y|x) of the same outputs under the base policy, without gradient

Where the outputs come from (an annotator, the policy itself, a pair of labellers) is the caller's affair; it is what
separates offline from on-policy methods: `sft` on the policy's own correct samples is `reinforce`. A sequence model
passes the sum of its token log-probabilities.

Left out: importance ratios and clipping. With one gradient step per batch of fresh samples the ratio is 1 and the clip
is inactive, so PPO-style terms would be dead code.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

_STD_EPSILON = 1e-6  # a group whose rewards are all equal has advantage 0, not 0/0


def sft(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """Supervised fine-tuning: -log pi(y|x) of the annotator's outputs; rewards are not looked at."""
    return -logp_BG.mean()


def reinforce(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """1-0 REINFORCE: -R log pi(y|x), no baseline, so that wrong outputs contribute nothing (arXiv:2509.04259)."""
    return -(rewards_BG * logp_BG).mean()


def dr_grpo(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """Dr. GRPO: A = R - mean of the group, with neither std nor length normalisation (arXiv:2503.20783).

    The baseline includes the output's own reward, so the expected gradient is (1 - 1/G) times the policy gradient.
    """
    advantages_BG = rewards_BG - rewards_BG.mean(dim=1, keepdim=True)
    return -(advantages_BG * logp_BG).mean()


def grpo(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """GRPO: A = (R - mean of the group) / std of the group (arXiv:2402.03300); std with G - 1, as in TRL."""
    centred_BG = rewards_BG - rewards_BG.mean(dim=1, keepdim=True)
    variance_B1 = centred_BG.square().sum(dim=1, keepdim=True) / max(rewards_BG.shape[1] - 1, 1)
    return -(centred_BG / (variance_B1.sqrt() + _STD_EPSILON) * logp_BG).mean()


def simpo(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor, margin: float = 1.0) -> Tensor:
    """SimPO as in RL's Razor: -log sigmoid(log pi(y_w|x) - log pi(y_l|x) - margin).

    The group is a pair, winner first. The SimPO paper (arXiv:2405.14734) divides by the length and has a scale beta.
    """
    if logp_BG.shape[1] != 2:
        raise ValueError(f"SimPO takes pairs (winner, loser): expected shape (B, 2), got {tuple(logp_BG.shape)}")
    return -F.logsigmoid(logp_BG[:, 0] - logp_BG[:, 1] - margin).mean()


def kl_dpg(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """KL-adaptive distributional policy gradient, aimed at q*(y|x), proportional to R(y) pi0(y|x) (arXiv:2012.11635).

    -w log pi(y|x) with w = R pi0 / pi normalised to sum 1 over the group (self-normalised importance sampling of
    E_q*[-log pi]); 0 where no sample is correct. Its fixed point is the KL-minimal correct policy.
    """
    log_weights_BG = torch.where(rewards_BG > 0, rewards_BG.log() + base_logp_BG - logp_BG.detach(), -torch.inf)
    solved_B1 = (rewards_BG > 0).any(dim=1, keepdim=True)
    weights_BG = torch.where(solved_B1, log_weights_BG, 0.0).softmax(dim=1) * solved_B1
    return -(weights_BG * logp_BG).sum(dim=1).mean()


def kl_to_base(logp_BV: Tensor, base_logp_BV: Tensor) -> Tensor:
    """The regulariser KL(pi || pi0), exact over V outcomes and averaged over B prompts, in nats."""
    return F.kl_div(base_logp_BV, logp_BV, reduction="batchmean", log_target=True)
