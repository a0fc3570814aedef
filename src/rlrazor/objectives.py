"""Training objectives: a method is a loss on log-probabilities and rewards, whatever the policy behind them.

Every objective has the same signature, so that one training loop serves them all and a new one is one function:

    loss(logp_BG, rewards_BG, base_logp_BG) -> scalar

    logp_BG       log pi(y|x) of G outputs y for each of B prompts x, in nats, carrying gradient
    rewards_BG    their rewards; here 1 for a correct output and 0 for a wrong one
    base_logp_BG  log pi0(y|x) of the same outputs under the base policy, without gradient

Where the outputs come from (an annotator, the policy itself, a pair of labellers) is the caller's affair; it is what
separates offline from on-policy methods: `sft` on the policy's own correct samples is `reinforce`. A sequence model
passes the sum of its token log-probabilities.

Samples are taken to be fresh: with one gradient step per batch the importance ratio pi / mu to the policy mu that drew
them is 1. Where they are stale, `importance_weighted` supplies it. Left out: PPO's clip. On fresh samples it is
inactive; on stale ones it would add a bias of its own to the effect of staleness.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

_STD_EPSILON = 1e-6  # a group whose rewards are all equal has advantage 0, not 0/0
NATURAL_WEIGHT_CAP = 100.0
"""The largest 1/pi in `natural_pg`: an outcome rarer than 1/100 is missing from most groups of the usual size 64, and
unclipped a chance draw of it outweighs all the others. Below that probability it moves as under plain policy gradient.
"""


def sft(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """Supervised fine-tuning: -log pi(y|x) of the annotator's outputs; rewards are not looked at."""
    return -logp_BG.mean()


def dft(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """Dynamic Fine-Tuning: -sg(pi(y|x)) log pi(y|x) of the annotator's outputs, sg = no gradient (arXiv:2508.05629).

    Its gradient is that of -pi(y|x): policy gradient with the label as the only rewarded output, so that labels the
    policy finds unlikely pull little. The weight is one per token in the paper: of a sequence, pass its tokens. With
    the penalty KL(pi || pi0) it is ASFT as its paper has it (arXiv:2509.23753, section 5.3); the authors' code
    penalises KL(pi0 || pi), by default with weight 0.1.
    """
    return -(logp_BG.detach().exp() * logp_BG).mean()


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
    return -(dpg_weights(logp_BG, rewards_BG, base_logp_BG) * logp_BG).sum(dim=1).mean()


def dpg_weights(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor, *, truncate: bool = False) -> Tensor:
    """The weights of `kl_dpg`, (B, G): w proportional to R pi0 / pi, of sum 1 over a group, 0 where none is correct.

    Whole sequences make them heavy-tailed. With `truncate` a weight is at most sqrt(G) times the group's mean, and the
    rest share what it had: less variance for a bias that vanishes as G grows (Ionides 2008, truncated importance
    sampling). The effective sample size of a group is 1 / sum of w squared.
    """
    log_weights_BG = _log_target_weights(logp_BG, rewards_BG, base_logp_BG)
    solved_B1 = (rewards_BG > 0).any(dim=1, keepdim=True)
    weights_BG = torch.where(solved_B1, log_weights_BG, 0.0).softmax(dim=1) * solved_B1
    if truncate:
        weights_BG = weights_BG.clamp(max=weights_BG.shape[1] ** -0.5)
        weights_BG = weights_BG / weights_BG.sum(dim=1, keepdim=True).where(solved_B1, 1.0)
    return weights_BG


def js_dpg(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """f-DPG aimed at q* by the Jensen-Shannon divergence KL(pi || m) + KL(q* || m), m their mean (arXiv:2302.08215).

    f'(t) = log(2t / (1 + t)), at most log 2. See `_f_dpg`.
    """
    return _f_dpg(lambda log_t_BG: math.log(2) - F.softplus(-log_t_BG), logp_BG, rewards_BG, base_logp_BG)


def tv_dpg(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """f-DPG aimed at q* by the total variation, half the L1 distance of pi and q* (arXiv:2302.08215).

    f'(t) = sign(t - 1) / 2: a sample counts by whether the policy gives it too much or too little, not by how much.
    See `_f_dpg`.
    """
    return _f_dpg(lambda log_t_BG: log_t_BG.sign() / 2, logp_BG, rewards_BG, base_logp_BG)


def _f_dpg(f_prime: Callable[[Tensor], Tensor], logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """f-DPG: descend D_f(pi || q*) = E_q*[f(pi / q*)], q*(y|x) = R(y) pi0(y|x) / Z(x), from the policy's own samples.

    The gradient is E_pi[f'(t) grad log pi] with t = pi / q*: policy gradient with the pseudo-reward -f'(t), here less
    its mean over the group (the paper's baseline is a running mean). Z, the base's probability of being correct, is the
    group's mean of R pi0 / pi. A wrong sample has t = inf whatever Z is; in a group without a correct one the
    pseudo-rewards are equal, and the gradient is 0. `f_prime` is a function of log t.

    Hence only divergences with finite f'(inf). Left out is KL(pi || q*), f' = log t + 1: it is infinite as long as one
    wrong output has any probability, RL with a hard constraint. KL(q* || pi) has a better estimator in `kl_dpg`.
    """
    log_weights_BG = _log_target_weights(logp_BG, rewards_BG, base_logp_BG)
    log_z_B1 = log_weights_BG.logsumexp(dim=1, keepdim=True) - math.log(logp_BG.shape[1])
    log_t_BG = torch.where(log_weights_BG.isneginf(), torch.inf, log_z_B1 - log_weights_BG)
    pseudo_rewards_BG = -f_prime(log_t_BG)
    return -((pseudo_rewards_BG - pseudo_rewards_BG.mean(dim=1, keepdim=True)) * logp_BG).mean()


def _log_target_weights(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """log(R pi0 / pi): importance weights of the policy's samples for q* = R pi0 / Z, up to log Z; -inf where R = 0."""
    return torch.where(rewards_BG > 0, rewards_BG.log() + base_logp_BG - logp_BG.detach(), -torch.inf)


def natural_pg(logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """Natural policy gradient in logit space, for few outcomes: -sum_g w_g (R_g - b) log pi(y_g|x), b = sum_g w_g R_g.

    The weights w are sg(1 / pi), capped at `NATURAL_WEIGHT_CAP` and normalised to sum 1 over the group. With the logits
    of a softmax as parameters, inverse Fisher times policy gradient is R less a constant (Kakade 2001;
    arXiv:1908.00261): all correct outputs gain alike and keep their ratios, where plain policy gradient favours the
    likelier. Estimated from samples, that takes 1 / pi; the group's mean of 1 / pi estimates the number of outcomes V,
    so the normalised weights turn the sum over the group into a mean over the outcomes. Uncapped, the expected gradient
    on the logits tends to -(R - mean of R) / V as G grows. At a uniform policy this is the gradient of `dr_grpo`, up to
    its factor 1 - 1/G: learning rates are comparable. Capping biases towards plain policy gradient. In a network, whose
    parameters serve all prompts, it is not the natural gradient of those parameters.
    """
    weights_BG = (-logp_BG.detach()).clamp(max=math.log(NATURAL_WEIGHT_CAP)).softmax(dim=1)
    advantages_BG = rewards_BG - (weights_BG * rewards_BG).sum(dim=1, keepdim=True)
    return -(weights_BG * advantages_BG * logp_BG).sum(dim=1).mean()


def importance_weighted(logp_BG: Tensor, behaviour_logp_BG: Tensor) -> Tensor:
    """sg(pi / mu) log pi of samples from another policy mu, to be passed to an objective in place of log pi.

    Right for objectives that are linear in log pi, with weights that depend on the rewards alone: `reinforce`,
    `dr_grpo`, `grpo`. The first two then have the same expected gradient as on the policy's own samples; `grpo` still
    divides by the std of mu's groups. Wrong for objectives that compute with the value of log pi: `dft`, `simpo`, the
    DPGs, `natural_pg`. The ratio is not clipped: no bias, at the price of variance. `behaviour_logp_BG` is log mu(y|x),
    without gradient.
    """
    return (logp_BG.detach() - behaviour_logp_BG).exp() * logp_BG


def kl_to_base(logp_BV: Tensor, base_logp_BV: Tensor) -> Tensor:
    """The regulariser KL(pi || pi0), exact over V outcomes and averaged over B prompts, in nats."""
    return F.kl_div(base_logp_BV, logp_BV, reduction="batchmean", log_target=True)
