"""Synthetic images: what their labels say, by scipy and numpy, and that the policy can learn them."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label  # type: ignore[attr-defined]  # scipy exports it dynamically
from torch.nn import functional as F

from rlrazor.experiments.parity_mnist.policy import PRIOR_TASK, DigitPolicy, as_inputs, log_probs
from rlrazor.experiments.parity_mnist.synthetic import dots


def test_dots_label_is_the_number_of_connected_bright_regions() -> None:
    """Counted by scipy: above the background by half a dot's least contrast, which noise does not reach."""
    images, labels = dots(500, seed=0)
    assert images.shape == (500, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    counted = [label(image > np.median(image) + 40)[1] for image in images.numpy()]
    assert counted == labels.tolist()
    assert set(counted) == set(range(10))


def test_dots_labels_are_equally_likely_and_positions_cover_the_grid() -> None:
    images, labels = dots(10_000, seed=0)
    assert labels.bincount().sub(1000).abs().max() < 4 * 30  # binomial standard deviation: 30
    full = images[labels == 9].float().mean(dim=0)
    centres = full[4::9, 4::9]  # a pixel that is in the disc wherever in its cell it lies
    corners = full[::9, ::9]
    assert (centres - corners.mean() - 100).abs().max() < 5  # the mean contrast of a dot, in all nine cells


def test_dots_brightness_does_not_give_the_count_away() -> None:
    images, labels = dots(10_000, seed=0)
    flat = images.flatten(start_dim=1).numpy()
    background, count = np.median(flat, axis=1), labels.numpy()
    assert np.corrcoef(flat.mean(axis=1), count)[0, 1] ** 2 < 0.001
    assert np.corrcoef(background, count)[0, 1] ** 2 == pytest.approx(0.13, abs=0.01)
    assert np.isin(flat, (0, 255)).mean() < 1e-3  # hardly a pixel is clipped, which would tie brightness to the count


def test_dots_can_be_learnt_by_the_policy() -> None:
    """From 500 images in 20 epochs of cross-entropy, as in pre-training, to half of unseen ones; chance is .1."""
    images, labels = dots(500, seed=1)
    unseen_images, unseen_labels = dots(2000, seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = DigitPolicy()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    inputs = as_inputs(images, PRIOR_TASK)
    for _ in range(20):
        for rows in torch.randperm(len(images), generator=rng).split(64):
            optimizer.zero_grad()
            F.cross_entropy(policy(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    guesses = log_probs(policy, as_inputs(unseen_images, PRIOR_TASK)).argmax(dim=1)
    assert (guesses == unseen_labels).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_images_depend_on_the_seed_alone() -> None:
    """And neither read nor move the global generator."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, labels = dots(20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, labels_again = dots(20, seed=3)
    assert torch.equal(first, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(first, dots(20, seed=4)[0])
