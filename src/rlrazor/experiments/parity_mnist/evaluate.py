"""A checkpoint's scores and drift. What is the base's side of a comparison is computed once, in a `Reference`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from rlrazor import drift
from rlrazor.drift import DISTRIBUTION_MEASURES, WEIGHT_MEASURES, Representation
from rlrazor.experiments.parity_mnist.methods import PARITY, RULES, correct_outcomes, is_correct
from rlrazor.experiments.parity_mnist.policy import (
    CHUNK,
    DigitPolicy,
    diagonal_fisher,
    log_probs,
    look_inside,
    weights_of,
)
from rlrazor.experiments.parity_mnist.task import DOTS, FASHION, Task, load_dots, load_probe
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.sweep import DivergedError

COMPARED = 1_000  # inputs on which representations are compared: CKNNA's kernels grow with the square
FISHER_INPUTS = 1_000

REPRESENTATION_MEASURES = ("activation_l1", "activation_l2", "cka", "cknna")
ON_PRIOR = "_on_prior"
ON_PROBE = "_on_probe"
DRIFT = (
    *DISTRIBUTION_MEASURES,
    *REPRESENTATION_MEASURES,
    *(name + ON_PRIOR for name in (*DISTRIBUTION_MEASURES, *REPRESENTATION_MEASURES)),
    *WEIGHT_MEASURES,
    *(name + ON_PROBE for name in ("cka", "cknna")),
)
"""The columns of drift that `evaluate` measures."""


@dataclass(frozen=True)
class Outputs:
    """What a policy does with N inputs: log-probabilities (N, V) and hidden activations, a tensor per layer and chunk.

    `representation` is the last hidden layer's on the first `COMPARED` inputs.
    """

    logp: Tensor
    hidden: list[list[Tensor]]

    @classmethod
    def of(cls, policy: DigitPolicy, inputs: Tensor) -> Self:
        """Run the policy on inputs (N, 785)."""
        logp, hidden = zip(*(look_inside(policy, part) for part in torch.split(inputs, CHUNK)), strict=True)
        return cls(torch.cat(logp), list(hidden))

    @cached_property
    def activations(self) -> list[Tensor]:
        """All hidden units of a chunk side by side: (chunk, 768)."""
        return [torch.cat(layers, dim=1) for layers in self.hidden]

    @cached_property
    def representation(self) -> Representation:
        """The last hidden layer on the first inputs."""
        chunks = -(-COMPARED // CHUNK)
        activations = torch.cat([layers[-1] for layers in self.hidden[:chunks]])[:COMPARED]
        return Representation(activations)


@dataclass(frozen=True)
class Reference:
    """A base policy as every checkpoint is compared with it."""

    weights: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    new: Outputs
    prior: Outputs
    probe: Representation

    @classmethod
    def of(cls, policy: DigitPolicy, task: Task) -> Self:
        """Measure the base. The Fisher information is over prior-task inputs, as in RL's Razor's Table 1."""
        return cls(
            weights={name: weight.clone() for name, weight in weights_of(policy).items()},
            fisher=diagonal_fisher(policy, task.prior_test[:FISHER_INPUTS]),
            new=Outputs.of(policy, task.new_test),
            prior=Outputs.of(policy, task.prior_test),
            probe=Outputs.of(policy, load_probe()).representation,
        )


@dataclass(frozen=True)
class Base:
    """A base policy with what every run on it needs, computed once; `train_logp` (N, V) on the training images."""

    policy: DigitPolicy
    train_logp: Tensor
    reference: Reference


def evaluate(
    spec: RunSpec, step: int, epoch: float, policy: DigitPolicy, task: Task, reference: Reference | None = None
) -> Record:
    """Greedy accuracy on the test sets, and every measure of drift from the base; without `reference` this is the base.

    Drift is measured on the new task's 10,000 test images, which is the paper's claim, and beside it on the prior
    task's; similarity of representations also on a probe that belongs to neither. Raises DivergedError when an output
    or a measure is not finite: squares of activations overflow before outputs do.
    """
    new, prior = Outputs.of(policy, task.new_test), Outputs.of(policy, task.prior_test)
    if not (new.logp.isfinite().all() and prior.logp.isfinite().all()):
        raise DivergedError(step, epoch)
    if reference is None:
        reference = Reference.of(policy, task)
    probe = Outputs.of(policy, load_probe()).representation
    scores = {FASHION: accuracy(prior.logp, task.prior_test_labels)}
    if spec.settings.get(DOTS):
        dots = load_dots()
        scores[DOTS] = accuracy(log_probs(policy, dots.test), dots.test_labels)
    drifted = {
        **_drift(reference.new, new),
        **{name + ON_PRIOR: value for name, value in _drift(reference.prior, prior).items()},
        **drift.measure_weights(reference.weights, weights_of(policy), reference.fisher),
        "cka" + ON_PROBE: drift.cka(reference.probe, probe),
        "cknna" + ON_PROBE: drift.cknna(reference.probe, probe),
    }
    if not all(map(math.isfinite, drifted.values())):
        raise DivergedError(step, epoch)
    rule = RULES[spec.settings.get("rule", PARITY)]
    digits, seen, before = rule.rename(task.new_test_digits), rule.reorder(new.logp), rule.reorder(reference.new.logp)
    return Record(
        run_id=spec.run_id,
        step=step,
        epoch=epoch,
        new=is_correct(digits, seen.argmax(dim=1)).double().mean().item(),
        prior=scores,
        drift=drifted,
        metrics=_optimality(before, seen, correct_outcomes(digits)),
    )


def accuracy(logp_NV: Tensor, labels_N: Tensor) -> float:
    """The share of inputs whose most likely outcome is the label."""
    return (logp_NV.argmax(dim=1) == labels_N).double().mean().item()


def _drift(base: Outputs, tuned: Outputs) -> dict[str, float]:
    l1 = l2 = 0.0
    for before, after in zip(base.activations, tuned.activations, strict=True):
        l1 += len(after) * drift.activation_l1(before, after)
        l2 += len(after) * drift.activation_l2(before, after)
    return {
        **drift.measure(base.logp, tuned.logp),
        "activation_l1": l1 / len(base.logp),
        "activation_l2": l2 / len(base.logp),
        "cka": drift.cka(base.representation, tuned.representation),
        "cknna": drift.cknna(base.representation, tuned.representation),
    }


def _optimality(base_logp_NV: Tensor, logp_NV: Tensor, correct_NV: Tensor) -> dict[str, float]:
    """How good a policy that samples would be, and how its distribution over correct labels differs from the base's.

    `new_expected` is the mean probability of a correct label. By the chain rule a KL is that of the split into correct
    and wrong, plus those within the two parts. `kl_reverse_within_correct`, pi(correct) KL(pi(.|correct) ||
    pi0(.|correct)), is what KL(pi || pi0) has beyond that of the KL-minimal policy of the same accuracy, but for the
    wrong part; `kl_forward_within_correct` is pi0(correct) KL(pi0(.|correct) || pi(.|correct)). `relative_ess` is the
    effective sample size, as a share of the samples, of importance weights q*/pi towards the KL-minimal correct policy
    q*: 1 / (1 + their variance), the mean over inputs.
    """
    base, tuned = base_logp_NV.double(), logp_NV.double()
    base_correct, tuned_correct = (logp.masked_fill(~correct_NV, -torch.inf) for logp in (base, tuned))
    base_mass, tuned_mass = base_correct.logsumexp(dim=1, keepdim=True), tuned_correct.logsumexp(dim=1, keepdim=True)
    optimum, answer = base_correct - base_mass, tuned_correct - tuned_mass
    # Log of q*^2 / pi, whose sum is E_pi[(q*/pi)^2]. Clamped: -inf - -inf, of a wrong label, is not a number.
    weights = 2 * optimum - tuned.clamp(min=-700)
    return {
        "new_expected": tuned_mass.exp().mean().item(),
        "kl_forward_within_correct": (base_mass.exp()[:, 0] * _kl_within(optimum, answer)).mean().item(),
        "kl_reverse_within_correct": (tuned_mass.exp()[:, 0] * _kl_within(answer, optimum)).mean().item(),
        "relative_ess": (-weights.logsumexp(dim=1)).exp().mean().item(),
    }


def _kl_within(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) over the outcomes that are possible at all (log-probabilities above -inf in both)."""
    possible = p_NV.isfinite() & q_NV.isfinite()
    return (p_NV.exp() * (p_NV - q_NV)).masked_fill(~possible, 0.0).sum(dim=1)
