"""TRL's losses against `rlrazor.objectives` on the same batch, and the wrapper's promises: no trace, resume, seeds."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from trainer_settings import changed

from rlrazor import objectives
from rlrazor.errors import RazorError
from rlrazor.experiments.language import trainers
from rlrazor.experiments.language.methods import METHODS, find_method
from rlrazor.experiments.language.trainers import Example, Job, Samples, Settings, Updates, offline
from rlrazor.lm import compute
from rlrazor.lm.models import add_lora
from rlrazor.runs.sweep import DivergedError
from tiny_models import char_tokenizer, tiny_llama

LENGTH = 3  # of every completion: then a mean over tokens is a mean over sequences, up to this factor
PROMPTS, GROUP = 4, 4
TOKENIZER = char_tokenizer()
SETTINGS = Settings(
    Updates(lr=1e-2, schedule="constant", steps=3, warmup_steps=0, batch_size=PROMPTS, kl_coef=0.0, seed=5),
    Samples(GROUP, LENGTH, stop_ids=[]),
)


pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's advice to its callers, which `train` silences


@pytest.fixture(autouse=True)
def one_thread() -> None:
    compute.prepare_process()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


# Prompts of different lengths: padding must not matter.
EXAMPLES = [
    Example(ids(f"{'x' * n}{letter}="), ids(f"{letter}b;"), ids(f"z{letter};"), f"{letter}=", f"{letter}b")
    for n, letter in enumerate("acde")
]


def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float | None]:
    """Right where the first token's id is even: about half of the samples of an untrained model."""
    return [float(completion[0] % 2 == 0) for completion in completions]


def policies() -> tuple[Any, Any]:
    """A policy and a base that it has already moved from."""
    base = tiny_llama(seed=1, scale=0.1).requires_grad_(False)
    return tiny_llama(seed=1, scale=0.1, hidden=16).requires_grad_(True), base


def moved(model: Any) -> Any:
    with torch.no_grad():
        torch.manual_seed(3)
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return model


def trainer_of(name: str, settings: Settings, model: Any, base: Any) -> Any:
    method, penalised = find_method(name)
    settings = changed(settings, kl_coef=0.1 if penalised else 0.0)
    job = Job(method, settings, model, TOKENIZER, EXAMPLES, base, reward)
    trainer = trainers.BUILDERS[method.trainer](job)
    trainer.measured = {}
    return trainer


def log_probs(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """log pi(y|x) with its gradient, a sequence at a time, without padding."""
    totals = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        totals.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(totals)


def gradient(model: Any, loss: Tensor) -> Tensor:
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    weights = model.parameters()
    return torch.cat(
        [(torch.zeros_like(w) if s is None else s).flatten() for w, s in zip(weights, slopes, strict=True)]
    )


def batch_of(trainer: Any) -> Mapping[str, Tensor]:
    batch: Mapping[str, Tensor] = next(iter(trainer.get_train_dataloader()))
    return batch


def same(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> None:
    assert b.abs().max() > 1e-4  # there is a gradient to compare
    np.testing.assert_allclose(a, b, atol=tolerance * b.abs().max().item())


# The losses


def test_sft_is_the_objective_over_tokens() -> None:
    model, base = policies()
    trainer = trainer_of("sft", SETTINGS, model, base)
    loss = trainer.compute_loss(model, batch_of(trainer))
    logp = log_probs(model, [e.prompt for e in EXAMPLES], [e.completion for e in EXAMPLES])
    ours = objectives.sft(logp[:, None], torch.ones(4, 1), logp[:, None]) / LENGTH
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)
    same(gradient(model, loss), gradient(model, ours))


def test_simpo_is_the_objective_on_mean_log_probabilities() -> None:
    model, base = policies()
    trainer = trainer_of("simpo", SETTINGS, model, base)
    loss = trainer.compute_loss(model, batch_of(trainer))
    prompts = [e.prompt for e in EXAMPLES]
    pairs = [log_probs(model, prompts, [getattr(e, side) for e in EXAMPLES]) for side in ("completion", "rejected")]
    ours = objectives.simpo(torch.stack(pairs, dim=1) / LENGTH, torch.ones(4, 2), torch.zeros(4, 2), margin=1.0)
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)
    same(gradient(model, loss), gradient(model, ours))


def truncated_dpg(logp: Tensor, rewards: Tensor, base_logp: Tensor) -> Tensor:
    weights = objectives.dpg_weights(logp, rewards, base_logp, truncate=True)
    return -(weights * logp).sum(dim=1).mean()


ON_POLICY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grpo": objectives.grpo,
    "dr-grpo": objectives.dr_grpo,
    "reinforce": objectives.reinforce,
    "kl-dpg": lambda logp, rewards, base: (
        -((objectives.dpg_weights(logp, rewards, base, truncate=True) * logp).sum(dim=1).mean())
    ),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_gradients_are_the_objectives(name: str) -> None:
    model, base = policies()
    moved(model)
    trainer = trainer_of(name, SETTINGS, model, base)
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions(
        [{"prompt": str(position)} for position in range(PROMPTS) for _ in range(GROUP)]
    )
    theirs = gradient(model, trainer.compute_loss(model, output))
    prompts = [example.prompt for example in EXAMPLES for _ in range(GROUP)]
    completions = output["completion_ids"].tolist()
    logp_BG, base_logp_BG = (log_probs(p, prompts, completions).view(PROMPTS, GROUP) for p in (model, base))
    rewards_BG = torch.tensor(reward(range(0), completions)).view(PROMPTS, GROUP)
    assert 0 < rewards_BG.mean() < 1
    ours = gradient(model, ON_POLICY[name](logp_BG, rewards_BG, base_logp_BG) / LENGTH)
    same(theirs, ours, tolerance=1e-3)  # TRL divides by std + 1e-4, ours by std + 1e-6


def test_kl_dpg_measures_its_effective_sample_size() -> None:
    model, base = policies()
    trainer = trainer_of("kl-dpg", SETTINGS, model, base)  # still the base: all right samples weigh the same
    rows = [{"prompt": str(position)} for position in range(PROMPTS) for _ in range(GROUP)]
    output = trainer._generate_and_score_completions(rows)
    rewards_BG = torch.tensor(reward(range(0), output["completion_ids"].tolist())).view(PROMPTS, GROUP)
    solved_B = rewards_BG.sum(dim=1)[rewards_BG.sum(dim=1) > 0]
    assert trainer.measured["effective_sample_size"] == pytest.approx(solved_B.mean().item() / GROUP, rel=1e-4)
    assert trainer.measured["reward"] == pytest.approx(rewards_BG.mean().item())


@pytest.mark.parametrize("name", ["dr-grpo", "dr-grpo+kl"])
def test_grpo_penalises_the_distance_from_the_given_base(name: str) -> None:
    """TRL's k3 estimate on the samples, exp(d) - d - 1 with d = log pi0 - log pi, only where it is asked for."""
    model, base = policies()
    moved(model)
    trainer = trainer_of(name, SETTINGS, model, base)
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": str(position)} for position in range(PROMPTS) for _ in range(GROUP)]
    output = trainer._generate_and_score_completions(rows)
    output["advantages"] = torch.zeros(len(rows))
    loss = trainer.compute_loss(model, output).item()
    expected = 0.0
    for row, completion in enumerate(output["completion_ids"].tolist()):
        prompt = EXAMPLES[row // GROUP].prompt
        gap = [
            p(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for p in (base, model)
        ]
        d = (gap[0] - gap[1]).gather(1, torch.tensor(completion)[:, None])
        expected += (d.exp() - d - 1).sum().item() / (len(rows) * LENGTH)
    assert loss == pytest.approx(0.1 * expected if name.endswith("+kl") else 0.0, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["sft", "simpo"])
def test_offline_methods_take_the_exact_penalty(name: str) -> None:
    model, base = policies()
    moved(model)
    losses = []
    for suffix in ("", "+kl"):
        trainer = trainer_of(name + suffix, SETTINGS, model, base)
        losses.append(trainer.compute_loss(model, batch_of(trainer)))
    kl = torch.zeros(())
    for example in EXAMPLES:
        whole = torch.tensor([[*example.prompt, *example.completion]])
        logp, base_logp = (
            p(input_ids=whole).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1) for p in (model, base)
        )
        kl = kl + (logp.exp() * (logp - base_logp)).sum() / (LENGTH * len(EXAMPLES))
    assert (losses[1] - losses[0]).item() == pytest.approx(0.1 * kl.item(), rel=1e-3)
    same(gradient(model, losses[1] - losses[0]), gradient(model, 0.1 * kl), tolerance=1e-3)


def test_without_its_adapter_a_lora_policy_is_its_own_base() -> None:
    base = tiny_llama(seed=2).requires_grad_(False)
    model = add_lora(copy.deepcopy(base), 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    whole = torch.tensor([[*EXAMPLES[0].prompt, *EXAMPLES[0].completion]])
    labels = torch.tensor([[-100] * len(EXAMPLES[0].prompt) + list(EXAMPLES[0].completion)])
    both = [offline.penalty(model, of, whole, torch.ones_like(whole), labels).item() for of in (base, None)]
    assert both[0] > 1e-3
    assert both[0] == pytest.approx(both[1], rel=1e-5)


# The wrapper


def trained(name: str, settings: Settings = SETTINGS, at_step: Any = None, **options: Any) -> Any:
    model, base = policies()
    method, penalised = find_method(name)
    settings = changed(settings, kl_coef=0.1 if penalised else 0.0)
    job = Job(method, settings, model, TOKENIZER, EXAMPLES, base, reward)
    trainers.train(job, at_step or (lambda *_: None), **options)
    return model


def weights(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("name", [*METHODS, "sft+kl", "grpo+kl"])
def test_every_method_moves_the_policy_the_same_way_twice(name: str) -> None:
    once, again = weights(trained(name)), weights(trained(name))
    assert torch.equal(once, again)
    assert not torch.equal(once, weights(policies()[0]))


def test_what_is_done_at_a_step_leaves_no_trace() -> None:
    seen = []

    def at_step(step: int, model: Any, measured: Mapping[str, float]) -> None:
        seen.append((step, model.training, set(measured)))
        model.eval()
        torch.rand(step)
        np.random.rand(step)

    assert torch.equal(weights(trained("grpo")), weights(trained("grpo", at_step=at_step)))
    assert seen == [(step, True, {"reward", "loss"}) for step in (1, 2, 3)]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_an_interrupted_run_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    settings = changed(SETTINGS, steps=4, batch_size=1, at={2}, folder=tmp_path)  # one epoch
    steps: list[int] = []

    def killed(step: int, model: Any, measured: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(name, settings, killed)
    resumed = trained(name, settings, lambda step, *_: steps.append(step), resume=tmp_path / "checkpoint-2")
    assert steps == [3, 4]
    assert torch.equal(weights(resumed), weights(trained(name, changed(settings, at=()))))


@pytest.mark.parametrize(
    "error", [SafetensorError("No space left on device (os error 28)"), OSError(28, "No space left on device")]
)
def test_a_disk_that_does_not_take_a_state_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", full)
    settings = changed(SETTINGS, steps=4, batch_size=1, at={2}, folder=tmp_path)
    with pytest.raises(RazorError, match=r"cannot be written to .*No space left.*--save-every 0"):
        trained("sft", settings)


def test_micro_batches_do_not_change_the_step() -> None:
    for name, whole in (("sft", PROMPTS), ("grpo", PROMPTS * GROUP)):
        settings = changed(SETTINGS, steps=1)
        one, four = weights(trained(name, settings)), weights(trained(name, changed(settings, micro_batch=whole // 4)))
        start = weights(policies()[0])
        np.testing.assert_allclose(four - start, one - start, atol=2e-4)  # Adam's first step is lr = 1e-2 everywhere


def test_a_micro_batch_has_to_divide_the_step() -> None:
    with pytest.raises(RazorError, match="divisor"):
        trained("sft", changed(SETTINGS, micro_batch=3))


def test_the_base_and_its_copies_still_compute_their_own_outputs() -> None:
    """TRL replaces the forward of a reference policy by a closure, which a deep copy would share with it."""
    model, base = policies()
    trainers.train(Job(METHODS["kl-dpg"], SETTINGS, model, TOKENIZER, EXAMPLES, base, reward), lambda *_: None)
    for policy in (model, base):
        copied = copy.deepcopy(policy)
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        assert copied(input_ids=torch.tensor([[3, 4]])).logits.abs().max() == 0
        assert policy(input_ids=torch.tensor([[3, 4]])).logits.abs().max() > 0


def test_an_unverified_completion_is_no_gain_and_no_loss() -> None:
    """None from the verifier: TRL sets its advantage to 0, and REINFORCE and DPG count it as wrong."""
    for name in ("dr-grpo", "reinforce", "kl-dpg"):
        model, base = policies()
        trainer = trainer_of(name, SETTINGS, model, base)
        trainer.reward_funcs[0] = lambda completion_ids, **_: [None, 1.0, 0.0, 1.0] * PROMPTS
        output = trainer._generate_and_score_completions(
            [{"prompt": str(p)} for p in range(PROMPTS) for _ in range(GROUP)]
        )
        assert output["advantages"].view(PROMPTS, GROUP)[:, 0].tolist() == [0.0] * PROMPTS
        assert torch.isfinite(output["advantages"]).all()


def test_sampling_and_losses_that_are_not_finite_are_divergence() -> None:
    for name in ("sft", "grpo"):
        with pytest.raises(DivergedError):
            trained(name, changed(SETTINGS, lr=float("inf")))


def test_memory_that_runs_out_is_one_sentence() -> None:
    def at_step(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    with pytest.raises(RazorError, match="micro-batch"):
        trained("sft", at_step=at_step)


def test_nothing_to_train_on_is_said() -> None:
    model, base = policies()
    with pytest.raises(RazorError, match="nothing to train on"):
        trainers.train(Job(METHODS["sft"], SETTINGS, model, TOKENIZER, [], base), lambda *_: None)
