"""Pink noise: its spectrum by numpy, its range, its randomness."""

import numpy as np
import pytest
import torch

from rlrazor.experiments.parity_mnist.synthetic import pink_noise


def test_images_are_bytes_that_use_the_whole_range() -> None:
    images = pink_noise(50, seed=0)
    assert images.shape == (50, 28, 28)
    assert images.dtype == torch.uint8
    assert images.amin(dim=(1, 2)).tolist() == [0] * 50
    assert images.amax(dim=(1, 2)).tolist() == [255] * 50


def test_the_same_seed_gives_the_same_images_and_another_one_others() -> None:
    images = pink_noise(20, seed=3)
    assert torch.equal(images, pink_noise(20, seed=3))
    assert not torch.equal(images, pink_noise(20, seed=4))
    before = torch.get_rng_state()
    pink_noise(1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_amplitude_falls_as_1_over_the_frequency() -> None:
    """A line through log amplitude against log frequency, over all 783 waves of 400 images."""
    images = pink_noise(400, seed=0).numpy().astype(float)
    amplitude = np.abs(np.fft.fft2(images)).mean(axis=0)
    cycles = np.minimum(np.arange(28), 28 - np.arange(28))
    frequency = np.hypot(cycles[:, None], cycles[None, :])
    varying = frequency > 0
    slope, _ = np.polyfit(np.log(frequency[varying]), np.log(amplitude[varying]), 1)
    assert slope == pytest.approx(-1, abs=0.03)
    white = np.abs(np.fft.fft2(np.random.default_rng(0).integers(0, 256, (400, 28, 28)))).mean(axis=0)
    assert np.polyfit(np.log(frequency[varying]), np.log(white[varying]), 1)[0] == pytest.approx(0, abs=0.03)


def test_images_differ_from_one_another() -> None:
    """Pixels of two images are hardly correlated, if anything at all more than chance has it."""
    correlations = np.corrcoef(pink_noise(100, seed=0).numpy().reshape(100, -1).astype(float))
    between = correlations[np.triu_indices(100, k=1)]
    assert np.abs(between).max() < 0.9
    assert between.mean() == pytest.approx(0, abs=0.02)
