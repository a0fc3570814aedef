"""The digit policy: an MLP over images of both tasks, told by one input which task it is looking at."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PIXELS = 28 * 28
OUTCOMES = 10  # the labels that the policy chooses from, on both tasks
NEW_TASK, PRIOR_TASK = 1.0, -1.0  # the task indicator: ParityMNIST, FashionMNIST
NEITHER_TASK = 0.0

CHUNK = 500  # inputs at a time that fit the processor's cache, which is twice as fast


class DigitPolicy(nn.Sequential):
    """MLP 785-512-256-10 with ReLU; input (B, 785) from `as_inputs`, output logits (B, 10).

    Where tasks are told apart by more indicators than one, the input has as many more.
    """

    def __init__(self, indicators: int = 1) -> None:
        super().__init__(
            nn.Linear(PIXELS + indicators, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, OUTCOMES)
        )


def as_inputs(images: Tensor, *task: float) -> Tensor:
    """uint8 images (N, 28, 28) to float32 inputs (N, 785): pixels in [0, 1], then the task's indicators."""
    inputs = torch.empty(len(images), PIXELS + len(task))
    torch.div(images.reshape(len(images), PIXELS), 255, out=inputs[:, :PIXELS])
    inputs[:, PIXELS:] = torch.tensor(task)
    return inputs


@torch.no_grad()
def log_probs(policy: nn.Module, inputs: Tensor, chunk: int = CHUNK) -> Tensor:
    """Log-probabilities (N, 10) in nats."""
    return torch.cat([policy(part).log_softmax(dim=-1) for part in torch.split(inputs, chunk)])


@torch.no_grad()
def look_inside(policy: DigitPolicy, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities (N, 10), and the activations of the hidden layers, (N, 512) and (N, 256), for one chunk."""
    hidden, signal = [], inputs
    for layer in policy:
        signal = layer(signal)
        if isinstance(layer, nn.ReLU):
            hidden.append(signal)
    return signal.log_softmax(dim=-1), hidden


def weights_of(policy: DigitPolicy) -> dict[str, Tensor]:
    """Name -> parameter, detached, under a plain policy's names; an adapter's share is merged into the matrices."""
    return {
        f"{index}.{name}": getattr(layer, name).detach()
        for index, layer in enumerate(policy)
        if isinstance(layer, nn.Linear)
        for name in ("weight", "bias")
    }


@torch.no_grad()
def diagonal_fisher(policy: DigitPolicy, inputs: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, E_x E_{y~pi} (d log pi(y|x) / d theta)^2, named as `weights_of`.

    Exact over the outcomes. An input's gradient of a linear layer is an outer product, so the sum of its squares over
    the inputs is a product of two matrices: no gradient per input is ever formed.
    """
    layers = [(index, layer) for index, layer in enumerate(policy) if isinstance(layer, nn.Linear)]
    fisher = {name: torch.zeros_like(weight) for name, weight in weights_of(policy).items()}
    for part in torch.split(inputs, CHUNK):
        logp_NV, hidden = look_inside(policy, part)
        probs_NV = logp_NV.exp()
        signals = [part, *hidden]  # what goes into each linear layer
        for outcome in range(OUTCOMES):
            slope = -probs_NV  # d log pi(outcome) / d logits
            slope = slope.index_add(1, torch.tensor([outcome]), probs_NV.new_ones(len(part), 1))
            for (index, layer), signal in zip(reversed(layers), reversed(signals), strict=True):
                weighted = probs_NV[:, outcome, None] * slope.square()
                fisher[f"{index}.weight"] += weighted.T @ signal.square()
                fisher[f"{index}.bias"] += weighted.sum(dim=0)
                if index:  # what reaches the inputs is nobody's slope
                    slope = (slope @ layer.weight) * (signal > 0)
    return {name: total / len(inputs) for name, total in fisher.items()}


class _LowRank(nn.Module):
    """W + B A with A (rank, in) and B (out, rank), B starting at 0 (LoRA, arXiv:2106.09685)."""

    def __init__(self, out_features: int, in_features: int, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, in_features, generator=rng) / in_features**0.5)
        self.b = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_low_rank_adapters(policy: DigitPolicy, rank: int, rng: torch.Generator) -> None:
    """Freeze the policy and give every matrix a trainable update of that rank (at most its own full rank).

    PEFT does this for transformers; here it is one parametrization, not worth that dependency.
    """
    policy.requires_grad_(False)
    for layer in policy:
        if isinstance(layer, nn.Linear):
            update = _LowRank(layer.out_features, layer.in_features, min(rank, layer.out_features), rng)
            parametrize.register_parametrization(layer, "weight", update)


def load_weights(weights: Mapping[str, Tensor]) -> DigitPolicy:
    """A policy with these weights."""
    policy = DigitPolicy(weights["0.weight"].shape[1] - PIXELS)
    policy.load_state_dict(weights)
    return policy
