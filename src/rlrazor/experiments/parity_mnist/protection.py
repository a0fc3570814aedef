"""What people use today against forgetting: a term that is added to a method's loss.

Each is a factory: given a base policy and the data it was pre-trained on, it returns `term(policy, inputs_BI)`, a
scalar for the new-task inputs (B, 785) of a batch. LoRA, which changes the policy and not the loss, is in `policy`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rlrazor.experiments.parity_mnist.policy import PRIOR_TASK, DigitPolicy, diagonal_fisher, weights_of

LWF_TEMPERATURE = 2.0  # of the paper

Term = Callable[[DigitPolicy, Tensor], Tensor]


@dataclass(frozen=True)
class Past:
    """What is still there of the past: the base policy, the prior-task images it was pre-trained on, and a stream.

    `prior_inputs` (N, 785) and `prior_labels` (N,); `strength` weighs the term.
    """

    base: DigitPolicy
    prior_inputs: Tensor
    prior_labels: Tensor
    strength: float
    rng: Generator


Protection = Callable[[Past], Term]


def elastic_weight_consolidation(past: Past) -> Term:
    """EWC: strength / 2 * sum F (theta - theta0)^2, F the base's diagonal Fisher on prior inputs (arXiv:1612.00796)."""
    fisher = diagonal_fisher(past.base, past.prior_inputs)
    anchor = {name: weight.clone() for name, weight in weights_of(past.base).items()}

    def term(policy: DigitPolicy, inputs_BI: Tensor) -> Tensor:
        moved = ((fisher[name] * (weight - anchor[name]).square()).sum() for name, weight in policy.named_parameters())
        return past.strength / 2 * torch.stack(list(moved)).sum()

    return term


def learning_without_forgetting(past: Past) -> Term:
    """LwF: keep what the base says of the new task's inputs *as the prior task* (arXiv:1606.09282).

    In LwF the old task's output layer answers new inputs. Here the task indicator plays the layers' part: new images
    with the prior task's indicator. strength * T^2 * KL(base || policy) at temperature T, averaged over the batch.
    """

    def term(policy: DigitPolicy, inputs_BI: Tensor) -> Tensor:
        asked_BI = inputs_BI.clone()
        asked_BI[:, -1] = PRIOR_TASK
        with torch.no_grad():
            base_logp_BV = (past.base(asked_BI) / LWF_TEMPERATURE).log_softmax(dim=1)
        logp_BV = (policy(asked_BI) / LWF_TEMPERATURE).log_softmax(dim=1)
        kl = F.kl_div(logp_BV, base_logp_BV, reduction="batchmean", log_target=True)
        return past.strength * LWF_TEMPERATURE**2 * kl

    return term


def replay(past: Past) -> Term:
    """Experience replay: a share `strength` of each batch is prior-task images of pre-training, with their labels."""

    def term(policy: DigitPolicy, inputs_BI: Tensor) -> Tensor:
        odds = past.strength / (1 - past.strength)
        count = max(1, round(odds * len(inputs_BI)))
        rows = torch.randint(len(past.prior_inputs), (count,), generator=past.rng)
        # The loss of the new images counts 1, so these count as much as their number says.
        return odds * F.cross_entropy(policy(past.prior_inputs[rows]), past.prior_labels[rows])

    return term
