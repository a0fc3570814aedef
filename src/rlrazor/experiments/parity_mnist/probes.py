"""KL to the base on inputs that stand for what must not change, none of them scored: which of them tells most?"""

import math
from collections.abc import Mapping
from typing import Self

from torch import Tensor

from rlrazor import drift
from rlrazor.experiments.parity_mnist import synthetic
from rlrazor.experiments.parity_mnist.policy import PIXELS, PRIOR_TASK, DigitPolicy, as_inputs, log_probs
from rlrazor.experiments.parity_mnist.task import PROBE_IMAGES, Task, load_dots
from rlrazor.runs.sweep import DivergedError

Inputs = Mapping[str, Tensor]
"""By the name of the probe: inputs (N, 785), asked as the prior task."""


def inputs_of(task: Task, unseen: Tensor) -> Inputs:
    """The `unseen` images of the prior task, and others: digits, dots and noise."""
    asked = {
        "unseen": as_inputs(unseen, PRIOR_TASK),
        "digits": task.new_test[:PROBE_IMAGES].clone(),
        "dots": load_dots().test[:PROBE_IMAGES].clone(),
        "noise": as_inputs(synthetic.pink_noise(PROBE_IMAGES, seed=0), PRIOR_TASK),
    }
    for inputs in asked.values():
        inputs[:, PIXELS:] = PRIOR_TASK
    return {name: inputs for name, inputs in asked.items() if len(inputs)}


class Probes:
    """The base's side: what it says to the inputs."""

    def __init__(self, inputs: Inputs, base: Mapping[str, Tensor]) -> None:
        self.inputs, self.base = inputs, base

    @classmethod
    def of(cls, base: DigitPolicy, inputs: Inputs) -> Self:
        """Ask the base."""
        return cls(inputs, {name: log_probs(base, asked) for name, asked in inputs.items()})

    def measure(self, policy: DigitPolicy, step: int, epoch: float) -> dict[str, float]:
        """Forward KL of the base to the policy on each, in nats: a column `kl_forward_on_NAME`.

        Raises DivergedError where one is not finite.
        """
        found = {
            f"kl_forward_on_{name}": drift.forward_kl(self.base[name], log_probs(policy, asked)).mean().item()
            for name, asked in self.inputs.items()
        }
        if not all(map(math.isfinite, found.values())):
            raise DivergedError(step, epoch)
        return found
