"""The digit policy: a look inside, its weights, its Fisher information, and LoRA."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrazor.experiments.parity_mnist import policy as policies
from rlrazor.experiments.parity_mnist.policy import (
    OUTCOMES,
    DigitPolicy,
    add_low_rank_adapters,
    diagonal_fisher,
    load_weights,
    log_probs,
    look_inside,
    weights_of,
)

MATRICES = ("0.weight", "2.weight", "4.weight")


@pytest.fixture
def policy() -> DigitPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitPolicy()


@pytest.fixture
def inputs() -> Tensor:
    return torch.rand(5, 785, generator=torch.Generator().manual_seed(1))


def adapted(policy: DigitPolicy, rank: int, steps: int = 0) -> DigitPolicy:
    """A copy of the policy with adapters, trained for some steps on labels of its inputs' choosing."""
    tuned = copy.deepcopy(policy)
    add_low_rank_adapters(tuned, rank, torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.01)
    inputs = torch.rand(64, 785, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(tuned(inputs), torch.arange(64) % OUTCOMES).backward()
        optimizer.step()
    return tuned


def test_looking_inside_sees_the_plain_forward_pass(policy: DigitPolicy, inputs: Tensor) -> None:
    logp, (first, second) = look_inside(policy, inputs)
    assert torch.equal(logp, log_probs(policy, inputs))
    weights = {name: weight.numpy() for name, weight in weights_of(policy).items()}
    by_numpy = np.maximum(inputs.numpy() @ weights["0.weight"].T + weights["0.bias"], 0)
    np.testing.assert_allclose(first, by_numpy, atol=1e-5)
    by_numpy = np.maximum(by_numpy @ weights["2.weight"].T + weights["2.bias"], 0)
    np.testing.assert_allclose(second, by_numpy, atol=1e-5)
    logits = by_numpy @ weights["4.weight"].T + weights["4.bias"]
    np.testing.assert_allclose(logp, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), atol=1e-5)


def test_weights_have_the_names_and_values_of_the_state(policy: DigitPolicy, inputs: Tensor) -> None:
    weights, state = weights_of(policy), policy.state_dict()
    assert list(weights) == list(state) == [name for name, _ in policy.named_parameters()]
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert not any(weight.requires_grad for weight in weights.values())
    assert torch.equal(load_weights(weights)(inputs), policy(inputs))


# --- Fisher information ---


def fisher_by_backpropagation(policy: DigitPolicy, inputs: Tensor) -> dict[str, Tensor]:
    """An input and an outcome at a time: pi(y|x) times the square of the gradient of log pi(y|x)."""
    fisher = {name: torch.zeros_like(weight) for name, weight in policy.named_parameters()}
    for row in inputs:
        logp = policy(row).log_softmax(dim=0)
        for outcome in range(OUTCOMES):
            gradients = torch.autograd.grad(logp[outcome], list(policy.parameters()), retain_graph=True)
            for name, gradient in zip(fisher, gradients, strict=True):
                fisher[name] += logp[outcome].exp().detach() * gradient.square() / len(inputs)
    return fisher


@pytest.mark.parametrize("sharpness", [1, 30])
def test_diagonal_fisher_against_backpropagation(
    policy: DigitPolicy, inputs: Tensor, sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three chunks, the last one short; sharp, so that the outcomes are far from equally likely."""
    monkeypatch.setattr(policies, "CHUNK", 2)
    last = policy[4]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(sharpness)
    expected, found = fisher_by_backpropagation(policy, inputs), diagonal_fisher(policy, inputs)
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6 * values.max().item())


def test_the_fisher_information_is_the_curvature_of_the_kl(policy: DigitPolicy, inputs: Tensor) -> None:
    """KL(pi0 || pi) of a small step in one bias is F step^2 / 2."""
    fisher = diagonal_fisher(policy.double(), inputs.double())
    base = log_probs(policy, inputs.double())
    for name, weight in policy.named_parameters():
        if name.endswith("bias"):
            place = int(fisher[name].argmax())
            moved = copy.deepcopy(policy)
            with torch.no_grad():
                moved.get_parameter(name)[place] += 1e-3
            kl = F.kl_div(log_probs(moved, inputs.double()), base, log_target=True, reduction="batchmean").item()
            assert kl == pytest.approx(fisher[name][place].item() * 1e-6 / 2, rel=1e-2), weight.shape


# --- LoRA ---


def test_adapters_start_as_the_base_exactly(policy: DigitPolicy, inputs: Tensor) -> None:
    tuned = adapted(policy, rank=4)
    assert torch.equal(tuned(inputs), policy(inputs))
    before = weights_of(policy)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(tuned).items())


def test_only_the_two_thin_matrices_of_each_layer_are_trained(policy: DigitPolicy) -> None:
    tuned = adapted(policy, rank=4, steps=5)
    trained = {name: tuple(weight.shape) for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert sorted(trained.values()) == sorted([(4, 785), (512, 4), (4, 512), (256, 4), (4, 256), (10, 4)])
    before, state = policy.state_dict(), tuned.state_dict()
    for layer in ("0", "2", "4"):
        assert torch.equal(state[f"{layer}.bias"], before[f"{layer}.bias"])
        assert torch.equal(state[f"{layer}.parametrizations.weight.original"], before[f"{layer}.weight"])


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_update_has_at_most_the_adapters_rank(policy: DigitPolicy, rank: int) -> None:
    tuned, before = weights_of(adapted(policy, rank, steps=5)), weights_of(policy)
    for name in MATRICES:
        update = (tuned[name] - before[name]).numpy()
        assert 1 <= np.linalg.matrix_rank(update) <= min(rank, *update.shape)
        # What rounding W + BA to float32 leaves is four digits below the update, not part of its rank.
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular[rank:].max(initial=0) < 1e-4 * singular[0]


def test_merged_weights_give_the_adapted_policys_outputs(policy: DigitPolicy, inputs: Tensor) -> None:
    tuned = adapted(policy, rank=4, steps=5)
    weights = weights_of(tuned)
    assert list(weights) == list(policy.state_dict())
    assert torch.equal(load_weights(weights)(inputs), tuned(inputs))
    assert (load_weights(weights)(inputs) - policy(inputs)).abs().max() > 0.1


def test_adapters_depend_on_their_generator_alone(policy: DigitPolicy) -> None:
    first, again = adapted(policy, rank=4, steps=2), adapted(policy, rank=4, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
