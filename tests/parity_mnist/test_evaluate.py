"""A checkpoint's scores, drift and metrics on a few random images, against loops, numpy and scipy."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from idx_files import write_dataset
from rlrazor import drift
from rlrazor.drift import DISTRIBUTION_MEASURES, Representation
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import evaluate as evaluation
from rlrazor.experiments.parity_mnist.evaluate import DRIFT, Outputs, Reference, evaluate
from rlrazor.experiments.parity_mnist.policy import (
    NEITHER_TASK,
    NEW_TASK,
    PRIOR_TASK,
    DigitPolicy,
    as_inputs,
    diagonal_fisher,
)
from rlrazor.experiments.parity_mnist.task import DOTS, FASHION, Dots, Task, load_task
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.sweep import DivergedError

Array = NDArray[np.float64]

SPEC = RunSpec("parity-mnist", "sft-1", {"lr": 1e-3}, 0)
METRICS = ("new_expected", "kl_forward_within_correct", "kl_reverse_within_correct", "relative_ess")


def inputs(count: int, indicator: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return as_inputs(torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8), indicator)


PROBE = inputs(20, NEITHER_TASK, 2)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "load_probe", lambda: PROBE)


def small_task(digits: Tensor) -> Task:
    none = torch.zeros(0)
    return Task(
        new_train=none,
        new_train_digits=none,
        new_test=inputs(len(digits), NEW_TASK, 0),
        new_test_digits=digits,
        prior_train_images=none,
        prior_train_labels=none,
        prior_test=inputs(30, PRIOR_TASK, 1),
        prior_test_labels=torch.arange(30) % 10,
    )


@pytest.fixture
def task() -> Task:
    return small_task(torch.arange(40) % 10)


@pytest.fixture
def base() -> DigitPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DigitPolicy()
    return sharpened(policy, 20)


def sharpened(policy: DigitPolicy, factor: float) -> DigitPolicy:
    """Multiply the logits' dependence on the image: an untrained policy is nearly uniform, and all inputs alike."""
    with torch.no_grad():
        policy.get_parameter("4.weight").mul_(factor)
    return policy


@pytest.fixture
def tuned(base: DigitPolicy) -> DigitPolicy:
    policy, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name != "2.bias":
                weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=generator))
    return policy


def logits_of(policy: nn.Module, images: Tensor) -> Array:
    with torch.no_grad():
        logits: Array = policy(images).double().numpy()
    return logits


def hidden_of(policy: DigitPolicy, images: Tensor) -> tuple[Array, Array]:
    weights = {name: weight.detach().double().numpy() for name, weight in policy.named_parameters()}
    first = np.maximum(images.double().numpy() @ weights["0.weight"].T + weights["0.bias"], 0)
    return first, np.maximum(first @ weights["2.weight"].T + weights["2.bias"], 0)


def measured(policy: DigitPolicy, task: Task, base: DigitPolicy) -> Record:
    return evaluate(SPEC, 7, 0.5, policy, task, Reference.of(base, task))


# --- Scores and drift ---


def test_every_measure_is_there_and_finite(tuned: DigitPolicy, task: Task, base: DigitPolicy) -> None:
    record = measured(tuned, task, base)
    assert set(record.drift) == set(DRIFT)
    assert len(DRIFT) == len(set(DRIFT)) == 30
    assert set(record.metrics) == set(METRICS)
    assert all(math.isfinite(value) for value in (*record.drift.values(), *record.metrics.values()))
    assert all(value > 0 for value in record.drift.values())
    assert (record.run_id, record.step, record.epoch) == (SPEC.run_id, 7, 0.5)
    assert set(record.prior) == {FASHION}


def test_the_base_has_not_drifted_from_itself(base: DigitPolicy, task: Task) -> None:
    record = measured(copy.deepcopy(base), task, base)
    alike = ("cka", "cknna", "weight_sparsity")
    assert record.drift == {name: float(name.startswith(alike)) for name in DRIFT}
    assert record.metrics["kl_forward_within_correct"] == record.metrics["kl_reverse_within_correct"] == 0
    # Of the base's samples, those of q* are the correct ones.
    assert record.metrics["relative_ess"] == pytest.approx(record.metrics["new_expected"])
    assert evaluate(SPEC, 7, 0.5, base, task) == record


def test_accuracies_against_a_loop(tuned: DigitPolicy, task: Task, base: DigitPolicy) -> None:
    record = measured(tuned, task, base)
    guesses = logits_of(tuned, task.new_test).argmax(axis=1)
    right = [guess % 2 == digit % 2 for guess, digit in zip(guesses, task.new_test_digits.tolist(), strict=True)]
    assert record.new == sum(right) / 40
    guesses = logits_of(tuned, task.prior_test).argmax(axis=1)
    same = [guess == label for guess, label in zip(guesses, task.prior_test_labels.tolist(), strict=True)]
    assert record.prior[FASHION] == sum(same) / 30


def test_dots_are_scored_where_the_base_was_trained_on_them(
    tuned: DigitPolicy, task: Task, base: DigitPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, test, labels = torch.zeros(0), inputs(25, NEITHER_TASK, 5), torch.arange(25) % 10
    monkeypatch.setattr(evaluation, "load_dots", lambda: Dots(none, none, test, labels))
    record = evaluate(RunSpec("parity-mnist", "sft-1", {DOTS: 100}, 0), 7, 0.5, tuned, task, Reference.of(base, task))
    assert record.prior == {
        FASHION: measured(tuned, task, base).prior[FASHION],
        DOTS: (logits_of(tuned, test).argmax(axis=1) == labels.numpy()).mean(),
    }


@pytest.mark.parametrize(("suffix", "images"), [("", "new_test"), ("_on_prior", "prior_test")])
@pytest.mark.parametrize("chunk", [500, 7])
def test_drift_of_outputs_and_activations(
    tuned: DigitPolicy,
    task: Task,
    base: DigitPolicy,
    suffix: str,
    images: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    record = measured(tuned, task, base)
    seen = getattr(task, images)
    p, q = softmax(logits_of(base, seen), axis=1), softmax(logits_of(tuned, seen), axis=1)
    assert record.drift["kl_forward" + suffix] == pytest.approx(rel_entr(p, q).sum(axis=1).mean(), rel=1e-4)
    assert record.drift["kl_reverse" + suffix] == pytest.approx(rel_entr(q, p).sum(axis=1).mean(), rel=1e-4)
    assert record.drift["total_variation" + suffix] == pytest.approx(abs(p - q).sum() / 2 / len(p), rel=1e-4)
    assert {name + suffix for name in DISTRIBUTION_MEASURES} <= set(record.drift)
    # The change of all 768 hidden units as one vector.
    change = np.hstack(hidden_of(tuned, seen)) - np.hstack(hidden_of(base, seen))
    assert change.shape == (len(seen), 512 + 256)
    assert record.drift["activation_l1" + suffix] == pytest.approx(abs(change).sum(axis=1).mean(), rel=1e-4)
    assert record.drift["activation_l2" + suffix] == pytest.approx(np.linalg.norm(change, axis=1).mean(), rel=1e-4)


@pytest.mark.parametrize(("suffix", "images"), [("", "new_test"), ("_on_prior", "prior_test"), ("_on_probe", "probe")])
@pytest.mark.parametrize(("compared", "chunk"), [(1000, 500), (16, 7), (16, 500), (14, 7)])
def test_representations_are_the_last_hidden_layer_on_the_first_inputs(
    tuned: DigitPolicy,
    task: Task,
    base: DigitPolicy,
    suffix: str,
    images: str,
    compared: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where there are fewer inputs than are compared at most, as here with 1,000: then on all."""
    monkeypatch.setattr(evaluation, "COMPARED", compared)
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    record = measured(tuned, task, base)
    seen = (PROBE if images == "probe" else getattr(task, images))[:compared]
    before, after = (Representation(torch.tensor(hidden_of(policy, seen)[1])) for policy in (base, tuned))
    assert record.drift["cka" + suffix] == pytest.approx(drift.cka(before, after), abs=1e-5)
    assert record.drift["cknna" + suffix] == pytest.approx(drift.cknna(before, after), abs=1e-5)


def test_too_few_inputs_to_compare_representations_on(base: DigitPolicy) -> None:
    with pytest.raises(ValueError, match="not 10 neighbours among 10 inputs"):
        evaluate(SPEC, 0, 0.0, base, small_task(torch.arange(10)))


def test_test_sets_too_small_for_that_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match=r"The test set of mnist has 10 images, .* give at least 11"):
        load_task(write_dataset(tmp_path / "small", train=20, test=10))
    assert len(load_task(write_dataset(tmp_path / "enough", train=20, test=11)).new_test) == 11


def test_activations_whose_squares_overflow_are_divergence(base: DigitPolicy, task: Task) -> None:
    """Their outputs are still finite."""
    broken = copy.deepcopy(base)
    with torch.no_grad():
        for weight in broken.parameters():
            weight.mul_(1e10)
    assert torch.isfinite(broken(task.new_test).log_softmax(dim=1)).all()
    with pytest.raises(DivergedError):
        measured(broken, task, base)


def test_drift_of_weights(tuned: DigitPolicy, task: Task, base: DigitPolicy) -> None:
    """The Fisher information is the base's, on the prior task."""
    record = measured(tuned, task, base)
    fisher = diagonal_fisher(base, task.prior_test)
    before = dict(base.named_parameters())
    changes = {name: weight.detach() - before[name].detach() for name, weight in tuned.named_parameters()}
    flat = np.concatenate([change.double().numpy().ravel() for change in changes.values()])
    assert record.drift["weight_l1"] == pytest.approx(np.abs(flat).sum(), rel=1e-5)
    assert record.drift["weight_l2"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    weighted = sum(float((fisher[name].double() * change.double().square()).sum()) for name, change in changes.items())
    assert record.drift["weight_fisher_l2"] == pytest.approx(math.sqrt(weighted), rel=1e-4)
    spectral = max(np.linalg.norm(change.numpy(), ord=2) for change in changes.values() if change.ndim == 2)
    assert record.drift["weight_spectral"] == pytest.approx(float(spectral), rel=1e-5)
    assert record.drift["weight_sparsity"] == pytest.approx(256 / len(flat), abs=1e-4)  # the second bias
    assert record.drift["weight_rank"] == 1


def test_the_reference_does_not_move_with_the_policy(tuned: DigitPolicy, task: Task, base: DigitPolicy) -> None:
    expected = measured(tuned, task, base)
    reference = Reference.of(base, task)
    with torch.no_grad():
        for weight in base.parameters():
            weight.zero_()
    assert evaluate(SPEC, 7, 0.5, tuned, task, reference) == expected


@pytest.mark.parametrize("indicator", [NEW_TASK, PRIOR_TASK])
def test_an_output_that_is_not_finite_on_either_task_is_divergence(
    base: DigitPolicy, task: Task, indicator: float
) -> None:
    """A unit that only one task's indicator lights overflows."""
    reference = Reference.of(base, task)
    with torch.no_grad():
        base.get_parameter("0.weight")[0] = torch.zeros(785).index_fill(0, torch.tensor([784]), indicator * 1e38)
        base.get_parameter("2.weight")[0, 0] = 1e38
        base.get_parameter("4.weight")[0, 0] = 1
    with pytest.raises(DivergedError) as caught:
        evaluate(SPEC, 7, 0.5, base, task, reference)
    assert caught.value.step == 7


# --- Optimality ---


def kl(p: Array, q: Array) -> float:
    return float(rel_entr(p, q).sum())


def by_loop(base: Array, tuned: Array, digits: list[int]) -> list[dict[str, float]]:
    """Per input, from probabilities (N, V): each part of both KLs, and the weights' moments, outcome by outcome."""
    rows = []
    for p, q, digit in zip(base, tuned, digits, strict=True):
        correct = [label for label in range(10) if label % 2 == digit % 2]
        wrong = [label for label in range(10) if label % 2 != digit % 2]
        p_correct, q_correct = sum(p[correct]), sum(q[correct])
        first = second = 0.0
        for label in correct:
            weight = (p[label] / p_correct) / q[label]
            first += q[label] * weight
            second += q[label] * weight**2
        p_split, q_split = np.array([p_correct, 1 - p_correct]), np.array([q_correct, 1 - q_correct])
        rows.append(
            {
                "new_expected": q_correct,
                "forward": kl(p, q),
                "forward_split": kl(p_split, q_split),
                "forward_correct": p_correct * kl(p[correct] / p_correct, q[correct] / q_correct),
                "forward_wrong": (1 - p_correct) * kl(p[wrong] / (1 - p_correct), q[wrong] / (1 - q_correct)),
                "reverse": kl(q, p),
                "reverse_split": kl(q_split, p_split),
                "reverse_correct": q_correct * kl(q[correct] / q_correct, p[correct] / p_correct),
                "reverse_wrong": (1 - q_correct) * kl(q[wrong] / (1 - q_correct), p[wrong] / (1 - p_correct)),
                "ess": first**2 / second,
                "chi_squared": second - 1,
            }
        )
    return rows


def mean(rows: list[dict[str, float]], value: Callable[[dict[str, float]], float]) -> float:
    return float(np.mean([value(row) for row in rows]))


def test_optimality_against_a_loop(tuned: DigitPolicy, task: Task, base: DigitPolicy) -> None:
    record = measured(tuned, task, base)
    p, q = softmax(logits_of(base, task.new_test), axis=1), softmax(logits_of(tuned, task.new_test), axis=1)
    rows = by_loop(p, q, task.new_test_digits.tolist())
    found = record.metrics
    assert found["new_expected"] == pytest.approx(mean(rows, lambda row: row["new_expected"]), rel=1e-5)
    for way in ("forward", "reverse"):
        within = found[f"kl_{way}_within_correct"]
        assert within == pytest.approx(mean(rows, lambda row, way=way: row[f"{way}_correct"]), rel=1e-3)  # type: ignore[misc]
        rest = mean(rows, lambda row, way=way: row[f"{way}_split"] + row[f"{way}_wrong"])  # type: ignore[misc]
        assert record.drift[f"kl_{way}"] == pytest.approx(within + rest, rel=1e-4)  # the chain rule
        assert 0 < within < record.drift[f"kl_{way}"]
    assert found["relative_ess"] == pytest.approx(mean(rows, lambda row: row["ess"]), rel=1e-4)
    assert found["relative_ess"] == pytest.approx(mean(rows, lambda row: 1 / (1 + row["chi_squared"])), rel=1e-4)
    assert 0 < found["relative_ess"] < 1


@pytest.mark.parametrize("shift", [-3.0, 0.5, 8.0])
def test_a_base_reweighted_between_correct_and_wrong_has_no_kl_within_correct(
    task: Task, base: DigitPolicy, shift: float
) -> None:
    """All digits even, so that a bias on the even labels does it: the KL-minimal policy of its accuracy."""
    task = small_task(torch.full((40,), 4))
    reweighted = copy.deepcopy(base)
    with torch.no_grad():
        reweighted.get_parameter("4.bias")[::2] += shift
    record = measured(reweighted, task, base)
    assert record.metrics["kl_forward_within_correct"] == pytest.approx(0, abs=1e-6)
    assert record.metrics["kl_reverse_within_correct"] == pytest.approx(0, abs=1e-6)
    p, q = softmax(logits_of(base, task.new_test), axis=1), softmax(logits_of(reweighted, task.new_test), axis=1)
    split = mean(by_loop(p, q, [4] * 40), lambda row: row["forward_split"])
    assert record.drift["kl_forward"] == pytest.approx(split, rel=1e-4)
    # Samples of such a policy that are correct are samples of q*.
    assert record.metrics["relative_ess"] == pytest.approx(record.metrics["new_expected"], rel=1e-5)


def test_a_correct_answer_given_up_ever_more_surely_is_told_in_logarithms(task: Task, base: DigitPolicy) -> None:
    """Log-probabilities of about -900, whose probabilities underflow even in float64."""
    sure = sharpened(copy.deepcopy(base), 1_000)
    record = measured(sure, task, base)
    p, log_q = softmax(logits_of(base, task.new_test), axis=1), log_softmax(logits_of(sure, task.new_test), axis=1)
    assert log_q.min() < -750
    expected = 0.0
    for row, log_row, digit in zip(p, log_q, task.new_test_digits.tolist(), strict=True):
        correct = np.arange(digit % 2, 10, 2)
        log_mass = np.logaddexp.reduce(log_row[correct])
        expected += float(
            (row[correct] * (np.log(row[correct] / row[correct].sum()) - log_row[correct] + log_mass)).sum()
        )
    assert record.metrics["kl_forward_within_correct"] == pytest.approx(expected / 40, rel=1e-5)
    assert 0 <= record.metrics["relative_ess"] < 1


# --- Outputs ---


def test_outputs_are_those_of_the_policy_whatever_the_chunks(
    tuned: DigitPolicy, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", 9)
    outputs = Outputs.of(tuned, task.new_test)
    np.testing.assert_allclose(outputs.logp, log_softmax(logits_of(tuned, task.new_test), axis=1), atol=1e-5)
    for layer, expected in enumerate(hidden_of(tuned, task.new_test)):
        found = torch.cat([layers[layer] for layers in outputs.hidden])
        np.testing.assert_allclose(found, expected, atol=1e-5)
