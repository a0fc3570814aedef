"""Random streams, and draws of labels: what a run learns from, step by step."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rlrazor.experiments.parity_mnist.methods import PARITY, RULES, Method, Rule
from rlrazor.experiments.parity_mnist.policy import DigitPolicy, log_probs
from rlrazor.runs.records import RunSpec
from rlrazor.seeding import seed_of


def generator(seed: int, purpose: str) -> Generator:
    """A random stream of its own for each purpose, so that methods share data order and labels at equal seed."""
    return Generator().manual_seed(seed_of(seed, purpose))


def sample(probs_NV: Tensor, group_size: int, rng: Generator) -> Tensor:
    """Draw `group_size` outcomes per row, with replacement: (N, G) int64."""
    return torch.multinomial(probs_NV, group_size, replacement=True, generator=rng)


def offline_labels(spec: RunSpec, method: Method, correct_NV: Tensor, source_NV: Tensor) -> Tensor:
    """The labels (N, G) of an offline method, drawn once from what the base, or the teacher, thinks."""
    rng, each = generator(spec.seed, "labels"), spec.params.get("labels_per_image", 1)
    return torch.cat([sample(target(correct_NV, source_NV), each, rng) for target in method.targets], dim=1)


@dataclass(frozen=True)
class TrainingInputs:
    """What a run learns from: inputs, and of each, by the rule's names, which outcomes are `correct` (N, V).

    `base_logp` (N, V) is what the policy that the run starts from thinks of the inputs, `anchor_logp` what the policy
    does that a KL penalty holds it to, and `offline` (N, G) the labels of an offline method.
    """

    inputs: Tensor
    correct: Tensor
    base_logp: Tensor
    anchor_logp: Tensor
    offline: Tensor | None = None
    rule: Rule = RULES[PARITY]


class Labels:
    """The outputs that a run learns from, step by step: an annotator's, or samples of the policy at some age.

    `staleness` k: the samples of step t come from the policy as it was k updates before, the base for t < k. They are
    drawn ahead, since the batches are known: at step t, for the images of step t + k. No old weights are kept.
    """

    def __init__(self, spec: RunSpec, given: TrainingInputs, batches: Sequence[Tensor]) -> None:
        self.given, self.batches = given, batches
        self.staleness = spec.params.get("staleness", 0)
        self.group_size = spec.params["group_size"]
        self.rng = generator(spec.seed, "sampling")
        self.ahead: deque[tuple[Tensor, Tensor]] = deque()

    def of_step(self, step: int, policy: DigitPolicy, logp_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, G) for a step's batch, and their log-probabilities when they were drawn if a policy drew them.

        `logp_BV` is the present policy's on this batch.
        """
        if self.given.offline is not None:
            return self.given.offline[self.batches[step]], None
        if self.staleness == 0:
            return self._drawn_from(logp_BV)
        later = step + self.staleness
        if later < len(self.batches):
            ahead = self.given.rule.reorder(log_probs(policy, self.given.inputs[self.batches[later]]))
            self.ahead.append(self._drawn_from(ahead))
        if step < self.staleness:
            return self._drawn_from(self.given.base_logp[self.batches[step]])
        return self.ahead.popleft()

    def _drawn_from(self, logp_BV: Tensor) -> tuple[Tensor, Tensor]:
        actions_BG = sample(logp_BV.exp(), self.group_size, self.rng)
        return actions_BG, logp_BV.gather(1, actions_BG)
