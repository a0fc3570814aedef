"""The digit policy: an MLP over images of both tasks, told by one input which task it is looking at."""

import torch
from torch import Tensor, nn

PIXELS = 28 * 28
OUTCOMES = 10  # the labels that the policy chooses from, on both tasks
NEW_TASK, PRIOR_TASK = 1.0, -1.0  # the task indicator: ParityMNIST, FashionMNIST


class DigitPolicy(nn.Sequential):
    """MLP 785-512-256-10 with ReLU; input (B, 785) from `as_inputs`, output logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(PIXELS + 1, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, OUTCOMES)
        )


def as_inputs(images: Tensor, task: float) -> Tensor:
    """uint8 images (N, 28, 28) to float32 inputs (N, 785): pixels in [0, 1], then the task indicator."""
    inputs = torch.empty(len(images), PIXELS + 1)
    torch.div(images.reshape(len(images), PIXELS), 255, out=inputs[:, :PIXELS])
    inputs[:, PIXELS] = task
    return inputs


@torch.no_grad()
def log_probs(policy: nn.Module, inputs: Tensor, chunk: int = 500) -> Tensor:
    """Log-probabilities (N, 10) in nats; in chunks that fit the processor's cache, which is twice as fast."""
    return torch.cat([policy(part).log_softmax(dim=-1) for part in torch.split(inputs, chunk)])
