"""The methods of this experiment: each is an objective and where its outputs come from.

Adding one takes this file alone: a loss (or one from `rlrazor.objectives`), target distributions if it learns from
labels, and a line in `METHODS`. See CONTRIBUTING.md for an example.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrazor import objectives
from rlrazor.experiments.parity_mnist import protection
from rlrazor.experiments.parity_mnist.policy import OUTCOMES
from rlrazor.experiments.parity_mnist.protection import Protection
from rlrazor.objectives import Objective
from rlrazor.runs import method_names

Targets = Callable[[Tensor, Tensor], Tensor]
"""(mask (N, V) of the correct labels, logp_NV of the base or the teacher) -> distribution (N, V) of the labels."""


@dataclass(frozen=True)
class Method:
    """How a policy is fine-tuned.

    `targets`: the annotators, one label per image and annotator, drawn once (offline data); empty for an on-policy
    method, whose group of labels is sampled anew from the policy at each step. `from_teacher`: the targets see the
    teacher's log-probabilities instead of the base's. `protection`: a term against forgetting, added to the loss.
    `strength`: its weight, or the rank of LoRA's updates; None for a method that has neither.
    """

    label: str
    objective: Objective
    targets: tuple[Targets, ...] = ()
    from_teacher: bool = False
    protection: Protection | None = None
    adapters: bool = False
    strength: float | None = None

    @property
    def on_policy(self) -> bool:
        """Whether the labels are sampled from the policy being trained."""
        return not self.targets


@dataclass(frozen=True)
class Rule:
    """A new task that is ParityMNIST but for names: `stands_for[d]` is the digit, and the label, that d counts as.

    Any split of the ten digits into two fives is one. Methods see digits and labels under these names only, so that
    each has one definition for all such tasks, by parity.
    """

    stands_for: tuple[int, ...]

    def rename(self, digits: Tensor) -> Tensor:
        """Digits, or labels, by what they count as."""
        return torch.tensor(self.stands_for)[digits]

    def reorder(self, logp_NV: Tensor) -> Tensor:
        """Log-probabilities of outcomes in the order of what they count as."""
        return logp_NV.index_select(1, torch.tensor(self.stands_for).argsort())


PARITY = "parity"
RULES: Mapping[str, Rule] = {
    PARITY: Rule(tuple(range(OUTCOMES))),
    # A label is right when it is, like the digit, below 5 or not: a split across the one that the base has learned.
    "halves": Rule((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)),
    # ... like the digit, one of 3 to 7 or not.
    "middle": Rule((0, 2, 4, 1, 3, 5, 7, 9, 6, 8)),
}


def is_correct(digits: Tensor, labels: Tensor) -> Tensor:
    """The verifier of ParityMNIST: a label is correct when it has the digit's parity. Broadcasts; returns bool."""
    return digits % 2 == labels % 2


def correct_outcomes(digits: Tensor) -> Tensor:
    """Mask (N, V) of the five correct labels of each image."""
    return is_correct(digits[:, None], torch.arange(OUTCOMES))


def sft_1(correct_NV: Tensor, base_logp_NV: Tensor) -> Tensor:
    """The first correct label: even digits are labelled 0, odd ones 1."""
    return (correct_NV & (correct_NV.cumsum(dim=1) == 1)).float()


def sft_2(correct_NV: Tensor, base_logp_NV: Tensor) -> Tensor:
    """The first or the third correct label, at random: even digits are labelled 0 or 4, odd ones 1 or 5."""
    place_NV = correct_NV.cumsum(dim=1)
    return (correct_NV & ((place_NV == 1) | (place_NV == 3))).float() / 2


def oracle(correct_NV: Tensor, base_logp_NV: Tensor) -> Tensor:
    """The KL-minimal correct distribution: the base restricted to the correct labels and renormalised.

    It is argmin KL(q || pi0) over distributions q on correct labels (rejection sampling from the base: the
    I-projection, arXiv:2509.04259, appendix A).
    """
    return base_logp_NV.masked_fill(~correct_NV, -torch.inf).softmax(dim=1)


def wrong(correct_NV: Tensor, base_logp_NV: Tensor) -> Tensor:
    """The wrong answers of an external policy: uniform over the labels that are not correct."""
    return (~correct_NV).float() / (~correct_NV).sum(dim=1, keepdim=True)


def imitate(correct_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """The teacher's own distribution, its mistakes included."""
    return teacher_logp_NV.exp()


METHODS: Mapping[str, Method] = {
    "sft-1": Method("SFT-1", objectives.sft, (sft_1,)),
    "sft-2": Method("SFT-2", objectives.sft, (sft_2,)),
    "oracle": Method("oracle SFT", objectives.sft, (oracle,)),
    "rl-distilled": Method("RL-distilled SFT", objectives.sft, (imitate,), from_teacher=True),
    # The teacher's answers without its mistakes: what `oracle` does to the base.
    "rl-distilled-correct": Method("RL-distilled SFT, correct", objectives.sft, (oracle,), from_teacher=True),
    "simpo": Method("SimPO", objectives.simpo, (sft_2, wrong)),
    "reinforce": Method("1-0 REINFORCE", objectives.reinforce),
    "grpo": Method("GRPO", objectives.grpo),
    "dr-grpo": Method("Dr. GRPO", objectives.dr_grpo),
    "kl-dpg": Method("KL-DPG", objectives.kl_dpg),
    # On-policy, towards the KL-minimal correct policy by other ways.
    "js-dpg": Method("JS-DPG", objectives.js_dpg),
    "tv-dpg": Method("TV-DPG", objectives.tv_dpg),
    "natural-pg": Method("natural PG", objectives.natural_pg),
    # Against forgetting, as people do it today: all learn from the labels of sft-2.
    "ewc": Method("EWC", objectives.sft, (sft_2,), protection=protection.elastic_weight_consolidation, strength=1e3),
    "lwf": Method("LwF", objectives.sft, (sft_2,), protection=protection.learning_without_forgetting, strength=1.0),
    "replay": Method("replay 5 %", objectives.sft, (sft_2,), protection=protection.replay, strength=0.05),
    "lora": Method("LoRA", objectives.sft, (sft_2,), adapters=True, strength=8),
    "dft": Method("DFT", objectives.dft, (sft_2,)),
}


def find_method(name: str) -> tuple[Method, bool]:
    """One of `METHODS`, and whether it is KL-regularised; see `method_names.find`."""
    return method_names.find(METHODS, name)


def label_of(name: str) -> str:
    """The method's name for figures and tables."""
    return method_names.label(METHODS, name)
