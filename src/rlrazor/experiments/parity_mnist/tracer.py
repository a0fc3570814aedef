"""A closer look at every step of a run: where it points, and what it does to the KL."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrazor import drift
from rlrazor.experiments.parity_mnist.evaluate import Base, accuracy
from rlrazor.experiments.parity_mnist.methods import correct_outcomes, is_correct
from rlrazor.experiments.parity_mnist.policy import PRIOR_TASK, DigitPolicy, as_inputs, log_probs, weights_of
from rlrazor.experiments.parity_mnist.task import FASHION, Task
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.sweep import DivergedError

TRACED = 500  # images a task that a traced run looks at after every step; all 60,000 would take seconds a step


class Tracer:
    """Looks at every step of a run: where it points, and what it does to the KL (RL's Razor, Fig. 10).

    Gradients are at the policy before the step, over `TRACED` training images a task: of the prior task's
    cross-entropy, and of the new task's expected error 1 - E[R]. A positive cosine means that the step raises the loss:
    for the prior task, that it forgets. Scores and drift are over as many test images.
    """

    def __init__(self, spec: RunSpec, task: Task, base: Base) -> None:
        self.spec = spec
        self.prior = as_inputs(task.prior_train_images[:TRACED], PRIOR_TASK), task.prior_train_labels[:TRACED]
        self.new = task.new_train[:TRACED], correct_outcomes(task.new_train_digits[:TRACED])
        self.new_test, self.new_digits = task.new_test[:TRACED], task.new_test_digits[:TRACED]
        self.prior_test = task.prior_test[:TRACED], task.prior_test_labels[:TRACED]
        self.before = copy.deepcopy(base.policy)
        self.base_logp = base.reference.new.logp[:TRACED]
        self.logp = self.base_logp

    def record(self, step: int, epoch: float, policy: DigitPolicy) -> Record:
        """The step that has just turned the policy of the last call into this one."""
        logp = log_probs(policy, self.new_test)
        if not logp.isfinite().all():
            raise DivergedError(step, epoch)
        before, after = (
            torch.cat([weight.flatten() for weight in weights_of(moment).values()]) for moment in (self.before, policy)
        )
        update = after - before
        kl_before, kl_after = (drift.forward_kl(self.base_logp, seen).mean().item() for seen in (self.logp, logp))
        metrics = {
            "cos_prior_gradient": _cosine(update, self._gradient(self._prior_loss)),
            "cos_new_gradient": _cosine(update, self._gradient(self._new_error)),
            "kl_change": kl_after - kl_before,
            "kl_of_step": drift.forward_kl(self.logp, logp).mean().item(),
            "update_norm": update.norm().item(),
        }
        self.before.load_state_dict(weights_of(policy))
        self.logp = logp
        return Record(
            run_id=self.spec.run_id,
            step=step,
            epoch=epoch,
            new=is_correct(self.new_digits, logp.argmax(dim=1)).double().mean().item(),
            prior={FASHION: accuracy(log_probs(policy, self.prior_test[0]), self.prior_test[1])},
            drift=drift.measure(self.base_logp, logp),
            metrics=metrics,
        )

    def _prior_loss(self) -> Tensor:
        return F.cross_entropy(self.before(self.prior[0]), self.prior[1])

    def _new_error(self) -> Tensor:
        probs: Tensor = self.before(self.new[0]).softmax(dim=1)
        return 1 - (probs * self.new[1]).sum(dim=1).mean()

    def _gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss(), list(self.before.parameters()))])


def _cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of them is: a step that moves nothing points nowhere."""
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0
