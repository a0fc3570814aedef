"""Pre-training and fine-tuning on small images: targets, schedules, prefixes, evaluation."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from idx_files import write_dataset
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import sampling
from rlrazor.experiments.parity_mnist import train as training
from rlrazor.experiments.parity_mnist.config import Config
from rlrazor.experiments.parity_mnist.evaluate import Reference, evaluate
from rlrazor.experiments.parity_mnist.experiment import ParityMnist
from rlrazor.experiments.parity_mnist.methods import (
    METHODS,
    RULES,
    correct_outcomes,
    find_method,
    label_of,
    oracle,
    sft_1,
    sft_2,
    wrong,
)
from rlrazor.experiments.parity_mnist.policy import (
    NEW_TASK,
    PRIOR_TASK,
    DigitPolicy,
    as_inputs,
    load_weights,
    log_probs,
)
from rlrazor.experiments.parity_mnist.task import load_task
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.settings import checkpoint_steps, lr_factor
from rlrazor.runs.store import Checkpoint, Keep, RunStore
from rlrazor.runs.sweep import DivergedError

CONFIG = Config(
    methods=("sft-1",),
    lrs=(1e-3,),
    schedules=("constant",),
    epochs=(1,),
    batch_size=32,
    group_size=8,
    checkpoints_per_epoch=2,
    pretrain_epochs=5,
    pretrain_size=100,
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> ParityMnist:
    return ParityMnist(write_dataset(tmp_path_factory.mktemp("data"), train=600, test=200))


def run(trainer: ParityMnist, store: RunStore, spec: RunSpec) -> list[Checkpoint]:
    """All checkpoints, their weights as they were at the time."""
    found = []
    for checkpoint in trainer.train(spec, store):
        weights = {name: tensor.clone() for name, tensor in checkpoint.weights().items()}
        found.append(Checkpoint(checkpoint.record, partial(dict, weights)))
    return found


def stored(trainer: ParityMnist, store: RunStore, spec: RunSpec) -> RunSpec:
    """The spec, once its run is in the store with all its weights."""
    store.keep(spec, Keep(all=True))
    if not store.is_finished(spec):
        store.write(spec, run(trainer, store, spec), seconds=0)
    return spec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, trainer: ParityMnist) -> RunStore:
    """A store that holds the base run of seed 0."""
    store = RunStore(tmp_path_factory.mktemp("out"))
    stored(trainer, store, CONFIG.base_specs("test")[0])
    return store


def finetuned(trainer: ParityMnist, store: RunStore, config: Config) -> list[Checkpoint]:
    (spec,) = config.specs("test", config.methods)
    return run(trainer, store, spec)


def taught(trainer: ParityMnist, store: RunStore) -> dict[int, Ancestor]:
    """A teacher for seed 0: the end of a GRPO run, which is put into the store."""
    (teacher,) = CONFIG.specs("test", ("grpo",))
    step = store.read(stored(trainer, store, teacher)).records[-1].step
    return {0: Ancestor(teacher, step)}


def test_another_rule_splits_the_digits_another_way(trainer: ParityMnist, store: RunStore) -> None:
    """SFT-1 under `halves` labels digits below 5 with 0, the rest with what counts as 1; the score is by halves."""
    config = replace(CONFIG, methods=("sft-1",))
    (spec,) = config.specs("test", config.methods, variant={"rule": "halves"})
    base = stored(trainer, store, spec.root)
    (untuned,) = store.read(base).records
    *_, last = run(trainer, store, spec)
    task = load_task(trainer.data_dir)
    for record, weights in ((untuned, store.load_weights(base, 0)), (last.record, last.weights())):
        logp = log_probs(load_weights(weights), task.new_test)
        below = task.new_test_digits < 5
        assert record.new == pytest.approx(float(((logp.argmax(dim=1) < 5) == below).double().mean()))
        mass = logp.exp()[:, :5].sum(dim=1)
        expected = torch.where(below, mass, 1 - mass).double().mean()
        assert record.metrics["new_expected"] == pytest.approx(float(expected), rel=1e-5)
    assert last.record.new > untuned.new + 0.2
    answers = log_probs(load_weights(last.weights()), task.new_test).argmax(dim=1)
    assert set(answers.tolist()) == {0, 5}  # what counts as 0 and as 1


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_parity_by_other_names(name: str) -> None:
    rule, digits = RULES[name], torch.arange(10)
    assert sorted(rule.stands_for) == list(range(10))
    logp = torch.randn(3, 10)
    # Outcome d stands in the column that it counts as.
    assert torch.equal(rule.reorder(logp)[:, rule.rename(digits)], logp)
    split = {frozenset(digits[rule.rename(digits) % 2 == parity].tolist()) for parity in (0, 1)}
    of_name = {"parity": {0, 2, 4, 6, 8}, "halves": {0, 1, 2, 3, 4}, "middle": {0, 1, 2, 8, 9}}[name]
    assert frozenset(of_name) in split


def test_the_oracle_is_the_kl_minimal_correct_distribution() -> None:
    """Against a numerical minimiser of KL(q || pi0) over distributions on the correct labels."""
    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.ones(10), size=3)
    digits = torch.tensor([4, 7, 0])
    closed_form = oracle(correct_outcomes(digits), torch.tensor(base).log()).numpy()
    for row, digit in enumerate(digits.tolist()):
        correct = np.arange(digit % 2, 10, 2)
        found = minimize(
            lambda q, p=base[row, correct]: float(np.sum(q * np.log(q / p))),
            np.full(5, 0.2),
            bounds=[(1e-12, 1)] * 5,
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
            tol=1e-14,
        )
        np.testing.assert_allclose(closed_form[row, correct], found.x, atol=1e-5)
        assert closed_form[row].sum() == pytest.approx(1)
        assert closed_form[row, correct].sum() == pytest.approx(1)


def test_annotators_label_as_the_paper_says() -> None:
    correct = correct_outcomes(torch.arange(10))
    ignored = torch.zeros(10, 10)
    assert sft_1(correct, ignored).argmax(dim=1).tolist() == [0, 1] * 5
    twos = sft_2(correct, ignored)
    assert twos[6].nonzero().flatten().tolist() == [0, 4]
    assert twos[3].nonzero().flatten().tolist() == [1, 5]
    assert twos.sum(dim=1).tolist() == [1.0] * 10
    assert twos.max().item() == 0.5
    negatives = wrong(correct, ignored)
    assert negatives[2].nonzero().flatten().tolist() == [1, 3, 5, 7, 9]
    assert negatives.sum(dim=1).tolist() == pytest.approx([1.0] * 10)


def test_inputs_carry_pixels_in_the_unit_interval_and_the_task() -> None:
    images = torch.tensor([[[0, 255] * 14] * 28], dtype=torch.uint8)
    new, prior = as_inputs(images, NEW_TASK), as_inputs(images, PRIOR_TASK)
    assert new.shape == (1, 785)
    assert new[0, :2].tolist() == [0.0, 1.0]
    assert (new[0, -1].item(), prior[0, -1].item()) == (1.0, -1.0)


def test_policy_has_the_papers_shape_and_chunks_do_not_matter() -> None:
    policy = DigitPolicy()
    assert [tuple(weight.shape) for weight in policy.parameters()] == [
        (512, 785), (512,), (256, 512), (256,), (10, 256), (10,),
    ]  # fmt: skip
    inputs = torch.rand(70, 785)
    torch.testing.assert_close(log_probs(policy, inputs, chunk=7), log_probs(policy, inputs))
    torch.testing.assert_close(log_probs(policy, inputs).exp().sum(dim=1), torch.ones(70))


def test_pretraining_learns_both_tasks_and_spreads_over_the_correct_labels(
    trainer: ParityMnist, store: RunStore
) -> None:
    (base,) = replace(CONFIG, pretrain_epochs=40).base_specs("test")
    (checkpoint,) = run(trainer, store, base)
    record = checkpoint.record
    assert record.new > 0.9
    assert record.prior["fashion_mnist"] > 0.9
    assert {record.drift[name] for name in ("kl_forward", "weight_l2", "activation_l1_on_prior")} == {0}
    assert {record.drift[name] for name in ("cka", "cknna_on_probe", "weight_sparsity")} == {1}
    assert trainer.data_dir is not None
    task = load_task(trainer.data_dir)
    policy = DigitPolicy()
    policy.load_state_dict(dict(checkpoint.weights()))
    probs = log_probs(policy, task.new_test).exp()
    entropy = -(probs * probs.log()).sum(dim=1).mean().item()
    assert math.log(4) < entropy < math.log(7)  # uniform over five is log 5


@pytest.mark.parametrize("method", [*METHODS, "grpo+kl", "dft+kl"])
def test_every_method_learns_the_new_task(trainer: ParityMnist, store: RunStore, method: str) -> None:
    config = replace(CONFIG, methods=("grpo", method) if method != "grpo" else ("grpo",))
    if method == "lora":
        config = replace(config, lrs=(5e-3,))  # what low-rank updates need
    teachers = taught(trainer, store) if find_method(method)[0].from_teacher else None
    (spec,) = config.specs("test", (method,), teachers)
    (base,) = CONFIG.base_specs("test")
    before = store.read(base).records[0]
    checkpoints = run(trainer, store, spec)
    after = checkpoints[-1].record
    assert [c.record.step for c in checkpoints] == [10, 19]  # 600 images in batches of 32: 19 steps
    assert after.metrics["new_expected"] > before.metrics["new_expected"] + 0.02
    assert after.drift["kl_forward"] > 0
    assert after.run_id == spec.run_id


def labels_of(trainer: ParityMnist, store: RunStore, spec: RunSpec) -> Tensor:
    """What an offline run learns from: (N, G)."""
    task = load_task(trainer.data_dir)
    method, base = find_method(spec.method)[0], training.load_base(Ancestor(spec.root, 0), store, task)
    source = base.train_logp if spec.teacher is None else training.teacher_log_probs(spec.teacher, task, store)
    return sampling.offline_labels(spec, method, correct_outcomes(task.new_train_digits), source)


def test_students_learn_from_samples_of_their_teacher(trainer: ParityMnist, store: RunStore) -> None:
    """As many to an image as asked for, in the teacher's proportions; `correct`, in those of its correct labels."""
    teachers = taught(trainer, store)
    task = load_task(trainer.data_dir)
    probs = training.teacher_log_probs(teachers[0], task, store).exp().double()
    config, many = replace(CONFIG, methods=("grpo", "rl-distilled")), {"labels_per_image": 256}
    parity = task.new_train_digits[:, None] % 2 == torch.arange(10) % 2
    for method, expected in (
        ("rl-distilled", probs),
        ("rl-distilled-correct", (probs * parity) / (probs * parity).sum(dim=1, keepdim=True)),
    ):
        (one,), (more,) = (config.specs("test", (method,), teachers, variant) for variant in ({}, many))
        assert labels_of(trainer, store, one).shape == (600, 1)
        seen = labels_of(trainer, store, more)
        assert seen.shape == (600, 256)
        shares = torch.nn.functional.one_hot(seen, 10).double().mean(dim=1)
        # Squared errors of shares sum to sum p(1 - p) / 256 in the mean.
        squares = ((shares - expected) ** 2).sum().item()
        assert squares == pytest.approx((expected * (1 - expected)).sum().item() / 256, rel=0.1)
        assert shares[expected == 0].sum() == 0


def test_one_label_an_image_is_what_there_was_before(trainer: ParityMnist, store: RunStore) -> None:
    """The bits of a run do not depend on whether the number is named."""
    plain, named = (
        CONFIG.specs("test", ("rl-distilled",), taught(trainer, store), variant)[0]
        for variant in ({}, {"labels_per_image": 1})
    )
    assert plain.run_id != named.run_id
    first, second = (run(trainer, store, spec)[-1] for spec in (plain, named))
    assert all(torch.equal(first.weights()[name], second.weights()[name]) for name in first.weights())


def test_the_same_spec_gives_the_same_bits_and_another_seed_other_ones(trainer: ParityMnist, store: RunStore) -> None:
    config = replace(CONFIG, methods=("grpo",))
    first, again = finetuned(trainer, store, config), finetuned(trainer, store, config)
    assert [c.record for c in first] == [c.record for c in again]
    assert all(torch.equal(first[-1].weights()[name], again[-1].weights()[name]) for name in first[-1].weights())
    other = replace(config, seeds=(1,))
    (base,) = other.base_specs("test")
    stored(trainer, store, base)
    assert finetuned(trainer, store, other)[0].record.drift != first[0].record.drift


def test_a_constant_run_is_a_prefix_of_the_longer_and_a_cosine_run_is_not(
    trainer: ParityMnist, store: RunStore
) -> None:
    def drifts(schedule: str, epochs: int) -> list[float]:
        config = replace(CONFIG, schedules=(schedule,), epochs=(epochs,))
        return [checkpoint.record.drift["kl_forward"] for checkpoint in finetuned(trainer, store, config)]

    assert len(drifts("constant", 2)) == 4
    assert drifts("constant", 1) == drifts("constant", 2)[:2]
    assert drifts("cosine", 1) != drifts("cosine", 2)[:2]


def test_the_kl_penalty_keeps_the_policy_nearer(trainer: ParityMnist, store: RunStore) -> None:
    plain = finetuned(trainer, store, replace(CONFIG, methods=("grpo",)))[-1].record
    tied = finetuned(trainer, store, replace(CONFIG, methods=("grpo+kl",), kl_coef=1.0))[-1].record
    assert tied.drift["kl_reverse"] < plain.drift["kl_reverse"] / 2


def variant_of(config: Config, **variant: Any) -> RunSpec:
    (spec,) = config.specs("test", config.methods, variant=variant)
    return spec


@pytest.mark.parametrize("age", [3, 100])
def test_stale_samples_come_from_the_policy_of_that_many_updates_ago(
    trainer: ParityMnist, store: RunStore, age: int
) -> None:
    """Checked against the log-probabilities of weights that are kept after every step."""
    config = replace(CONFIG, methods=("reinforce",), checkpoints_per_epoch=19)
    spec = variant_of(config, staleness=age, importance=False)
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    of_step = sampling.Labels.of_step

    def spy(labels: sampling.Labels, step: int, policy: DigitPolicy, logp: Tensor) -> Any:
        actions, behaviour = of_step(labels, step, policy, logp)
        assert behaviour is not None
        drawn.append((labels.batches[step], actions, behaviour))
        return actions, behaviour

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.Labels, "of_step", spy)
        checkpoints = run(trainer, store, spec)
    task = load_task(trainer.data_dir)
    (base,) = CONFIG.base_specs("test")
    policies = [store.load_weights(base, 0), *(c.weights() for c in checkpoints)]
    assert len(policies) == len(drawn) + 1
    for step, (rows, actions, behaviour) in enumerate(drawn):
        old = load_weights(policies[max(0, step - age)])
        expected = log_probs(old, task.new_train[rows]).gather(1, actions)
        torch.testing.assert_close(behaviour, expected, rtol=1e-4, atol=1e-5)


def test_age_zero_is_on_policy_and_weights_change_only_stale_runs(trainer: ParityMnist, store: RunStore) -> None:
    config = replace(CONFIG, methods=("reinforce",))

    def drift(**variant: Any) -> float:
        return run(trainer, store, variant_of(config, **variant))[-1].record.drift["kl_forward"]

    assert drift(staleness=0) == drift()
    assert drift(staleness=0, importance=True) == pytest.approx(drift(), rel=1e-4)  # every ratio is 1
    assert drift(staleness=5, importance=True) != drift(staleness=5, importance=False)


def test_bfloat16_weights_are_rounded_after_each_step_and_leave_small_updates_out(
    trainer: ParityMnist, store: RunStore
) -> None:
    config = replace(CONFIG, methods=("grpo",), lrs=(3e-5,))
    dense = run(trainer, store, variant_of(config))[-1]
    spec = variant_of(config, precision="bfloat16")
    stored(trainer, store, spec.root)
    sparse = run(trainer, store, spec)[-1]
    for weight in sparse.weights().values():
        assert torch.equal(weight, weight.bfloat16().float())
    assert sparse.record.drift["weight_sparsity"] > 0.5
    assert dense.record.drift["weight_sparsity"] < 0.2


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("muon", 5e-3)])
def test_other_optimizers_learn_too(trainer: ParityMnist, store: RunStore, optimizer: str, lr: float) -> None:
    (base,) = CONFIG.base_specs("test")
    before = store.read(base).records[0].metrics["new_expected"]
    spec = variant_of(replace(CONFIG, lrs=(lr,)), optimizer=optimizer)
    assert run(trainer, store, spec)[-1].record.metrics["new_expected"] > before + 0.02


def test_a_base_can_be_bad_at_the_new_task_or_know_a_further_prior_one(trainer: ParityMnist, store: RunStore) -> None:
    config = replace(CONFIG, pretrain_epochs=20)
    (bad,) = config.base_specs("test", {"pretrain_accuracy": 0.0})
    assert run(trainer, store, bad)[0].record.metrics["new_expected"] < 0.1
    (counting,) = config.base_specs("test", {"dots": 500})
    record = run(trainer, store, counting)[0].record
    assert set(record.prior) == {"fashion_mnist", "dots"}
    assert record.prior["dots"] > 0.3  # of ten counts
    assert record.prior["fashion_mnist"] > 0.9


def test_a_traced_run_tells_of_every_step(trainer: ParityMnist, store: RunStore) -> None:
    """Its cosines against gradients by autograd at the weights of an untraced run, its KL against that run's."""
    config = replace(CONFIG, checkpoints_per_epoch=19)
    traced = run(trainer, store, variant_of(config, traced=True))
    plain = run(trainer, store, variant_of(config))
    assert [c.record.step for c in traced] == list(range(1, 20))
    kls = [c.record.drift["kl_forward"] for c in traced]
    np.testing.assert_allclose(kls, [c.record.drift["kl_forward"] for c in plain], rtol=1e-4)
    changes = [c.record.metrics["kl_change"] for c in traced]
    np.testing.assert_allclose(np.cumsum(changes), kls, rtol=1e-4, atol=1e-6)

    task = load_task(trainer.data_dir)
    inputs = as_inputs(task.prior_train_images[:500], PRIOR_TASK)
    before, after = plain[7].weights(), plain[8].weights()
    policy = load_weights(before)
    torch.nn.functional.cross_entropy(policy(inputs), task.prior_train_labels[:500]).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])
    update = torch.cat([(after[name] - before[name]).flatten() for name in before])
    expected = torch.nn.functional.cosine_similarity(update, gradient, dim=0).item()
    assert traced[8].record.metrics["cos_prior_gradient"] == pytest.approx(expected, abs=1e-4)
    assert min(c.record.metrics["cos_new_gradient"] for c in traced[:5]) < 0  # it learns: down its own gradient


def test_evaluate_against_a_loop(trainer: ParityMnist, store: RunStore) -> None:
    task = load_task(trainer.data_dir)
    policy, base = DigitPolicy(), DigitPolicy()
    base_logp = log_probs(base, task.new_test)
    record = evaluate(RunSpec("e", "m", {}, 0), 3, 0.5, policy, task, Reference.of(base, task))

    def predictions(inputs: Tensor) -> list[int]:
        with torch.no_grad():
            return [int(policy(row[None]).argmax()) for row in inputs]

    right = [
        guess % 2 == digit % 2 for guess, digit in zip(predictions(task.new_test), task.new_test_digits, strict=True)
    ]
    assert record.new == pytest.approx(float(sum(right)) / len(right))
    prior = zip(predictions(task.prior_test), task.prior_test_labels, strict=True)
    assert record.prior["fashion_mnist"] == sum(int(guess == label) for guess, label in prior) / len(task.prior_test)
    kl = torch.nn.functional.kl_div(log_probs(policy, task.new_test), base_logp, log_target=True, reduction="batchmean")
    assert record.drift["kl_forward"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["sft-1", "grpo"])
def test_a_learning_rate_that_destroys_the_policy_is_reported_as_divergence(
    trainer: ParityMnist, store: RunStore, method: str
) -> None:
    with pytest.raises(DivergedError) as caught:
        finetuned(trainer, store, replace(CONFIG, methods=(method,), lrs=(1e38,)))
    assert 1 <= caught.value.step <= 10


@pytest.mark.parametrize(("steps", "epochs", "per_epoch"), [(938, 2, 5), (469, 1, 6), (3, 2, 5), (1, 1, 1)])
def test_checkpoints_are_evenly_spaced_and_end_each_epoch(steps: int, epochs: int, per_epoch: int) -> None:
    due = sorted(checkpoint_steps(steps, epochs, per_epoch))
    assert {steps * epoch for epoch in range(1, epochs + 1)} <= set(due)
    gaps = np.diff([0, *due])
    assert gaps.max() - gaps.min() <= 1
    assert set(due) & set(range(steps + 1)) == checkpoint_steps(steps, 1, per_epoch)
    assert min(due) > 0


def test_learning_rate_schedules() -> None:
    constant = [lr_factor(step, 200, 100, "constant") for step in range(200)]
    assert constant[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert set(constant[5:]) == {1.0}
    cosine = [lr_factor(step, 200, 100, "cosine") for step in range(200)]
    assert cosine[:5] == constant[:5]
    assert cosine[5 + 195 // 2] == pytest.approx(0.5, abs=0.01)
    assert cosine[-1] == pytest.approx(0, abs=1e-3)
    assert cosine[5:] == sorted(cosine[5:], reverse=True)


def test_an_unknown_method_is_refused_with_the_valid_names() -> None:
    with pytest.raises(RazorError, match=r"Unknown method 'gpro'. Methods: sft-1, .*grpo, .*kl-dpg"):
        find_method("gpro")
    assert label_of("grpo+kl") == "GRPO + KL"
