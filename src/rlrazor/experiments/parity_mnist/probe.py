"""Images of neither task, on which to ask whether a policy still sees the world as its base did."""

import torch
from torch import Tensor

SIDE = 28


def pink_noise(count: int, seed: int) -> Tensor:
    """uint8 images (N, 28, 28) of random phases and amplitudes that fall as 1/f, each stretched to 0..255.

    The spectrum is that of natural images, so dense layers respond to them as they do to images; white noise averages
    out in a sum over 784 pixels and is nearly one and the same input. No pixel of either task is in them, as crops of
    their images would have.
    """
    rng = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.fft2(torch.randn(count, SIDE, SIDE, generator=rng, dtype=torch.float64))
    frequency = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    distance = torch.hypot(frequency[:, None], frequency[None, :])
    distance[0, 0] = torch.inf  # no constant part: the stretch below would undo it
    images: Tensor = torch.fft.ifft2(spectrum / distance).real.flatten(1)
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    return ((images - low) / (high - low) * 255).round().to(torch.uint8).reshape(count, SIDE, SIDE)
