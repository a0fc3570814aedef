"""The optimisers that a run can use: AdamW unless it says otherwise."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from rlrazor.experiments.parity_mnist.policy import DigitPolicy

MOMENTUM = 0.9
MUON_MOMENTUM = 0.95  # as torch.optim.Muon's default, like the coefficients and the five iterations below
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum whose matrix updates are made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    Nesterov momentum, the update scaled by sqrt(max(1, out / in)), no weight decay. torch.optim.Muon does the
    same in bfloat16, which a processor without instructions for it takes 2.9 s a step for at this policy's size: 30
    times as long as float32.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = MUON_MOMENTUM) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search, no closures
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(momentum, group["momentum"]))
                weight.sub_(update, alpha=group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with the same singular vectors and singular values of about 1: five iterations.

    They end at .68 to 1.21 where they were at least .0015 of the Frobenius norm; smaller ones grow 485-fold at most.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class ScheduledOptimizer:
    """One or more optimisers that share a schedule, as a factor of each one's peak learning rate."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        """Set every learning rate to this share of its peak."""
        for group, peak in self.peaks:
            group["lr"] = peak * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update the weights."""
        for optimizer in self.optimizers:
            optimizer.step()


def _adamw(weights: Sequence[Tensor], lr: float) -> list[Optimizer]:
    return [AdamW(weights, lr=lr, weight_decay=0.0, fused=True)]


def _muon(weights: Sequence[Tensor], lr: float) -> list[Optimizer]:
    """Matrices by Muon, biases, which have no singular values, by AdamW at a tenth of its learning rate."""
    matrices, biases = [w for w in weights if w.ndim == 2], [w for w in weights if w.ndim != 2]
    return [Muon(matrices, lr=lr), *_adamw(biases, lr / 10)]


OPTIMIZERS: Mapping[str, Callable[[Sequence[Tensor], float], list[Optimizer]]] = {
    "adamw": _adamw,
    "sgd": lambda weights, lr: [SGD(weights, lr=lr, momentum=MOMENTUM, fused=True)],
    "muon": _muon,
}


def make_optimizer(name: str, policy: DigitPolicy, lr: float) -> ScheduledOptimizer:
    """The optimiser of that name over the policy's trainable weights."""
    return ScheduledOptimizer(OPTIMIZERS[name]([w for w in policy.parameters() if w.requires_grad], lr))
