import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from rlrazor.errors import RazorError
from rlrazor.lm import head, kl, sampling
from rlrazor.lm.models import add_lora
from rlrazor.lm.sampling import NotFiniteError
from tiny_models import tiny_llama

Floats = NDArray[np.float64]
VOCAB = 44


def sequences(vocab: int = VOCAB, seed: int = 0) -> kl.Sequences:
    """Four prompts with two completions each, one of which is empty; ids 0 (pad) and 1 (eos) occur everywhere."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab, n).tolist() for n in (3, 5, 1, 9)]
    completions = [rng.integers(0, vocab, n).tolist() for n in (3, 1, 7, 0, 4, 2, 5, 9)]
    completions[0][1], completions[2][2], completions[2][6] = 1, 0, 1
    return kl.Sequences.grouped(prompts, completions)


def logits_64(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """All logits of one sequence, the whole model in float64."""
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(model).double().eval()(input_ids=torch.tensor([ids])).logits[0]
    return logits.double()


def brute_force(p: Any, q: Any, probe: kl.Sequences) -> Floats:
    """KL(p || q) at every position from two full sets of logits, in float64, one sequence at a time."""
    values = []
    for prompt_of, completion in zip(probe.prompt_of, probe.completions, strict=True):
        prompt = probe.prompts[prompt_of]
        ids = [*prompt, *completion]
        logp, logq = (logits_64(model, ids).log_softmax(-1)[len(prompt) - 1 : len(ids) - 1] for model in (p, q))
        values += (logp.exp() * (logp - logq)).sum(-1).tolist()
    return np.array(values)


def changed(model: Any, size: float = 0.1, seed: int = 9) -> Any:
    """Change all parameters of a model in place."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=rng)
    return model


def with_lora(model: Any, seed: int = 0) -> Any:
    """A PEFT model whose adapter is not zero."""
    torch.manual_seed(seed)
    tuned = add_lora(model, rank=2)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return tuned


def gemma2() -> Any:
    """Softcapped logits (and attention), a tied head, logits large enough for the cap to bite."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0, initializer_range=0.5, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def granite() -> Any:
    """Logits divided by a constant."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return GraniteForCausalLM(config).eval()


def gpt2() -> Any:
    """Learned positions, LayerNorm with biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "untied": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "softcapped": gemma2,
    "scaled": granite,
    "gpt2": gpt2,
}


# --- the numbers


@pytest.mark.parametrize("name", MODELS)
def test_kl_matches_a_brute_force_sum_in_float64(name: str) -> None:
    base = MODELS[name]()
    tuned, probe = changed(copy.deepcopy(base)), sequences()
    forward = kl.forward_kl(kl.Probe(base, probe), tuned)
    reverse = kl.reverse_kl(tuned, probe, base)
    assert forward.sums.max() > 0.1
    np.testing.assert_allclose(forward.positions, brute_force(base, tuned, probe), atol=1e-5)
    np.testing.assert_allclose(reverse.positions, brute_force(tuned, base, probe), atol=1e-5)


def test_expected_sum_over_positions_is_the_kl_between_whole_completions() -> None:
    base, tuned = tiny_llama(vocab=3, seed=1, scale=0.5), tiny_llama(vocab=3, seed=2, scale=0.5)
    # All completions of a prompt that end with token 2 or after three tokens: a tree, so probabilities sum to 1.
    tree = [list(y) for n in (1, 2, 3) for y in itertools.product(range(3), repeat=n)]
    tree = [y for y in tree if 2 not in y[:-1] and (y[-1] == 2 or len(y) == 3)]
    everything = kl.Sequences([[0, 1]], tree, [0] * len(tree))
    logp, logq = kl.log_probs(base, everything), kl.log_probs(tuned, everything)
    for logs in (logp, logq):
        assert np.exp(logs).sum() == pytest.approx(1, abs=1e-6)
    forward = kl.forward_kl(kl.Probe(base, everything), tuned)
    reverse = kl.reverse_kl(tuned, everything, base)
    assert np.exp(logp) @ forward.sums == pytest.approx(np.exp(logp) @ (logp - logq), abs=1e-6)
    assert np.exp(logq) @ reverse.sums == pytest.approx(np.exp(logq) @ (logq - logp), abs=1e-6)
    assert np.exp(logp) @ (logp - logq) > 0.05


def test_a_policy_has_no_kl_to_itself() -> None:
    base, probe = tiny_llama(), sequences()
    assert kl.forward_kl(kl.Probe(base, probe), base).positions.max() < 1e-6
    assert kl.reverse_kl(copy.deepcopy(base), probe, base).positions.max() < 1e-6


def test_batches_and_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, probe = tiny_llama(seed=0), tiny_llama(seed=1), sequences()
    whole = kl.forward_kl(kl.Probe(base, probe), tuned).positions
    log_probs = kl.log_probs(tuned, probe)
    one_at_a_time = kl.forward_kl(kl.Probe(base, probe), tuned, token_budget=1).positions
    np.testing.assert_allclose(one_at_a_time, whole, atol=2e-6)
    monkeypatch.setattr(head, "TILE_ROWS", 3)
    monkeypatch.setattr(head, "TILE_COLUMNS", 7)  # 44 tokens: six whole tiles and a rest
    np.testing.assert_allclose(kl.forward_kl(kl.Probe(base, probe), tuned).positions, whole, atol=2e-6)
    np.testing.assert_allclose(kl.log_probs(tuned, probe), log_probs, atol=1e-5)


def test_lora_measures_against_itself_without_the_adapter() -> None:
    base, probe = tiny_llama(), sequences()
    tuned = with_lora(copy.deepcopy(base))
    merged = copy.deepcopy(tuned).merge_and_unload()
    before = kl.Probe(tuned, probe)
    assert before.head.weight.data_ptr() == tuned.get_output_embeddings().weight.data_ptr()  # shared: it is frozen
    expected = kl.forward_kl(kl.Probe(base, probe), merged).positions
    assert expected.max() > 0.1
    np.testing.assert_allclose(kl.forward_kl(before, tuned).positions, expected, atol=1e-5)
    np.testing.assert_allclose(kl.reverse_kl(tuned, probe).positions, brute_force(merged, base, probe), atol=1e-5)


def test_what_is_frozen_of_an_adapter_stays_frozen() -> None:
    """PEFT makes all of an adapter trainable whenever it puts it back."""
    tuned, probe = with_lora(tiny_llama()), sequences()
    for name, weight in tuned.named_parameters():
        weight.requires_grad_("lora_B" in name and "layers.0" in name)
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    kl.forward_kl(kl.Probe(tuned, probe), tuned)
    kl.reverse_kl(tuned, probe)
    assert trained == [name for name, weight in tuned.named_parameters() if weight.requires_grad] != []


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
def test_a_head_with_an_adapter_of_its_own_counts() -> None:
    from peft import LoraConfig, get_peft_model

    base, probe = tiny_llama(), sequences()
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.5)
    tuned = get_peft_model(copy.deepcopy(base), lora).train()
    merged = copy.deepcopy(tuned).merge_and_unload()
    np.testing.assert_allclose(
        kl.forward_kl(kl.Probe(tuned, probe), tuned).positions, brute_force(base, merged, probe), atol=1e-5
    )
    np.testing.assert_allclose(kl.reverse_kl(tuned, probe).positions, brute_force(merged, base, probe), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_trained_in_place_is_remembered(tied: bool) -> None:
    model, probe = tiny_llama(tie_word_embeddings=tied), sequences()
    base = copy.deepcopy(model)
    before = kl.Probe(model, probe)
    changed(model)
    np.testing.assert_allclose(kl.forward_kl(before, model).positions, brute_force(base, model, probe), atol=1e-5)


@contextmanager
def surroundings(how: str) -> Iterator[None]:
    """What a training run may leave around a measurement."""
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif how == "default dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    elif how == "default device":
        with torch.device("meta"):  # any tensor made without naming its device would be there
            yield
    else:
        torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the processor has them
        try:
            yield
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("how", ["autocast", "default dtype", "default device", "matmul precision"])
def test_kl_does_not_depend_on_what_surrounds_it(how: str) -> None:
    rng = np.random.default_rng(0)
    base = tiny_llama(6000, hidden=64, scale=1.0)  # wide enough that a maximum in bfloat16 shows
    tuned = changed(copy.deepcopy(base), 0.002)
    probe = kl.Sequences.grouped([[3, 4]] * 3, rng.integers(2, 6000, (3, 6)).tolist())
    seen: list[str] = []
    hook = base.lm_head.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))

    def measure() -> tuple[Any, ...]:
        before = kl.Probe(base, probe)
        forward, reverse = kl.forward_kl(before, tuned), kl.reverse_kl(tuned, probe, base)
        texts = [[*prompt, 5] for prompt in probe.prompts]
        return forward.positions, reverse.positions, kl.log_probs(base, probe), kl.token_loss(tuned, texts).mean

    plain = measure()
    with surroundings(how):
        inside = measure()
    hook.remove()
    for ours, expected in zip(inside, plain, strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(plain[0], brute_force(base, tuned, probe), atol=1e-4)
    assert set(seen) == {"highest"}


def test_half_precision_rounds_the_model_and_not_the_head() -> None:
    base, tuned, probe = tiny_llama(seed=0, scale=0.2), tiny_llama(seed=1, scale=0.2), sequences()
    exact = kl.forward_kl(kl.Probe(base, probe), tuned).per_token.mean
    rounded = kl.forward_kl(kl.Probe(base, probe, precision="bfloat16"), tuned).per_token.mean
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
    # Nothing has moved, so nothing is measured: both sides are rounded alike, whatever their weights are.
    half = copy.deepcopy(base).to(torch.bfloat16)
    for model in (base, half):
        assert kl.forward_kl(kl.Probe(model, probe, precision="bfloat16"), model).positions.max() < 1e-9
    assert kl.forward_kl(kl.Probe(half, probe), half).positions.max() < 1e-9
    # A base in float32 and a policy whose weights were rounded: what the rounding does would count as drift.
    with pytest.raises(RazorError, match="to be measured in float32, and the model's weights are bfloat16"):
        kl.forward_kl(kl.Probe(base, probe), half)


def test_what_accelerate_puts_around_a_model_is_not_measured() -> None:
    """Its autocast is inside of the model's forward, so that switching autocast off around it changes nothing."""
    from accelerate import Accelerator

    base, probe = tiny_llama(hidden=64), sequences()
    tuned = changed(copy.deepcopy(base))
    exact = kl.forward_kl(kl.Probe(base, probe), tuned)
    before = kl.Probe(base, probe)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    unmoved, prepared = accelerator.prepare_model(base), accelerator.prepare_model(tuned)
    autocast = prepared.forward
    np.testing.assert_array_equal(kl.forward_kl(before, prepared).positions, exact.positions)
    assert kl.forward_kl(before, unmoved).positions.max() < 1e-9
    assert prepared.forward == autocast


def with_bias(model: Any) -> Any:
    """The model, its head's bias drawn at random."""
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        model.lm_head.weight.copy_(old.weight)
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("thawed", ["head", "bias", "everything"])
def test_a_head_that_was_frozen_is_remembered_as_it_was(thawed: str) -> None:
    """Gradual unfreezing, BitFit: what is frozen as the base is measured may be trained later."""
    model, probe = with_bias(tiny_llama()).requires_grad_(False), sequences()
    base = copy.deepcopy(model)
    model.lm_head.bias.requires_grad_(thawed == "bias")
    before = kl.Probe(model, probe)
    parts = {"head": [model.lm_head.weight], "bias": [model.lm_head.bias], "everything": list(model.parameters())}
    for weight in parts[thawed]:
        weight.requires_grad_(True)
    with torch.no_grad():
        for weight in parts[thawed]:
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found = kl.forward_kl(before, model)
    np.testing.assert_allclose(found.positions, brute_force(base, model, probe), atol=1e-5)
    assert found.positions.max() > 1e-3
    reverse = kl.reverse_kl(model, probe, base)
    np.testing.assert_allclose(reverse.positions, brute_force(model, base, probe), atol=1e-5)


def test_a_head_shared_under_an_adapter_is_watched() -> None:
    tuned, probe = with_lora(tiny_llama()), sequences()
    before = kl.Probe(tuned, probe)
    assert before.head.weight.data_ptr() == tuned.get_output_embeddings().weight.data_ptr()  # memory of its own: none
    expected = kl.forward_kl(before, tuned).positions
    np.testing.assert_array_equal(kl.forward_kl(before, tuned).positions, expected)
    with torch.no_grad():
        tuned.get_output_embeddings().weight[3, 4] += 1e-3
    with pytest.raises(RazorError, match="LM head has changed, which was frozen"):
        kl.forward_kl(before, tuned)


def test_log_probs_are_sums_over_the_completion() -> None:
    model, probe = tiny_llama(), sequences()
    expected = []
    for prompt_of, completion in zip(probe.prompt_of, probe.completions, strict=True):
        prompt = probe.prompts[prompt_of]
        logp = logits_64(model, [*prompt, *completion]).log_softmax(-1)
        expected.append(sum(logp[len(prompt) - 1 + t, y].item() for t, y in enumerate(completion)))
    np.testing.assert_allclose(kl.log_probs(model, probe), expected, atol=1e-5)


def test_token_loss_is_transformers_own() -> None:
    model, text = tiny_llama(), [5, 9, 1, 0, 12, 40]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss.item()
    assert kl.token_loss(model, [text]).mean == pytest.approx(loss, abs=1e-5)
    # Two texts: tokens count alike, not texts.
    losses = [kl.token_loss(model, [t]).mean for t in (text, text[:2])]
    both = kl.token_loss(model, [text, text[:2]])
    assert both.mean == pytest.approx((5 * losses[0] + 1 * losses[1]) / 6, abs=1e-6)
    assert both.stderr > 0


# --- means and standard errors


def drift(sums: Sequence[float], lengths: Sequence[int], prompt_of: Sequence[int]) -> kl.Drift:
    positions = np.concatenate([np.full(n, s / n) for s, n in zip(sums, lengths, strict=True)])
    return kl.Drift(positions, np.array(lengths), np.array(prompt_of))


def test_means_and_errors_count_prompts_not_completions() -> None:
    measured = drift([1.0, 3.0, 5.0, 5.0, 0.0, 4.0], [2, 2, 4, 6, 1, 1], [0, 0, 1, 1, 2, 2])
    by_prompt, lengths = np.array([2.0, 5.0, 2.0]), np.array([2.0, 5.0, 1.0])
    assert (measured.n_prompts, len(measured.positions)) == (3, 16)
    assert measured.per_completion.mean == pytest.approx(3.0)
    assert measured.per_completion.stderr == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(3))
    assert measured.per_token.mean == pytest.approx(18 / 16)
    # The delta method agrees with the jackknife to first order; with three prompts, roughly.
    left_out = [np.delete(by_prompt, i).sum() / np.delete(lengths, i).sum() for i in range(3)]
    jackknife = math.sqrt(2 / 3 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert measured.per_token.stderr == pytest.approx(jackknife, rel=0.5)


def test_standard_errors_are_what_repetition_shows() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        lengths = rng.integers(1, 9, (40, 3))
        rates = rng.gamma(4.0, 0.1, (40, 1)) * rng.gamma(4.0, 0.25, (40, 3))  # completions of a prompt are alike
        measured = drift((rates * lengths).ravel().tolist(), lengths.ravel().tolist(), np.repeat(range(40), 3).tolist())
        means.append((measured.per_completion.mean, measured.per_token.mean))
        errors.append((measured.per_completion.stderr, measured.per_token.stderr))
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(means, axis=0), rtol=0.15)


def test_restricted_keeps_the_completions_asked_for() -> None:
    measured = drift([1.0, 3.0, 5.0], [2, 1, 4], [0, 0, 1])
    kept = measured.restricted([False, True, False])
    np.testing.assert_allclose(kept.sums, [3.0])
    assert (kept.n_prompts, len(kept.positions)) == (1, 1)
    assert math.isnan(kept.per_completion.stderr)  # one prompt shows no spread
    with pytest.raises(RazorError, match="solves none"):
        measured.restricted([False] * 3)


# --- what it leaves alone, and what it refuses


def test_mode_and_hooks_are_as_before() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    first, second = (kl.log_probs(model, sequences()) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout while measuring
    assert all(module.training for module in model.modules())
    model.model.layers[0].eval()  # what a user froze stays frozen
    modes = [module.training for module in model.modules()]
    kl.log_probs(model, sequences())
    sampling.sample(model, [[1, 2]], sampling.Sampling(max_new_tokens=2, stop_ids=[1], pad_id=0))
    assert [module.training for module in model.modules()] == modes
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCAB)


def test_bad_input_is_named() -> None:
    model, probe = tiny_llama(), sequences()
    with pytest.raises(RazorError, match="vocabularies of 44 and 45"):
        kl.forward_kl(kl.Probe(model, probe), tiny_llama(vocab=45))
    with pytest.raises(RazorError, match="needs the base model"):
        kl.reverse_kl(model, probe)
    with pytest.raises(RazorError, match="80 tokens, but the model's context holds 64"):
        kl.log_probs(model, kl.Sequences.grouped([[2] * 40], [[3] * 40]))
    with pytest.raises(RazorError, match="prompt is empty"):
        kl.Sequences.grouped([[]], [[1]])
    with pytest.raises(RazorError, match="no completions"):
        kl.Sequences.grouped([], [])
    with pytest.raises(RazorError, match="nothing to predict"):
        kl.token_loss(model, [[3], [4]])
    with pytest.raises(ValueError, match="do not divide"):
        kl.Sequences.grouped([[1], [2]], [[1], [2], [3]])
    with pytest.raises(RazorError, match="empty"):
        kl.forward_kl(kl.Probe(model, kl.Sequences.grouped([[1]], [[]])), model).per_token  # noqa: B018


def test_a_model_whose_logits_are_something_else_is_refused() -> None:
    class Shifted(nn.Module):
        """A model that does something to its logits that no config tells of."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config
            self.get_output_embeddings = self.inner.get_output_embeddings

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            out.logits = out.logits.sin()
            return out

    with pytest.raises(RazorError, match="not its final hidden states times its LM head"):
        kl.Probe(Shifted(), sequences())


def test_a_diverged_policy_is_told_apart() -> None:
    model, probe = tiny_llama(), sequences()
    before = kl.Probe(model, probe)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        kl.forward_kl(before, model)


def test_some_prompts_of_a_probe_and_parts_put_together() -> None:
    base, probe = tiny_llama(), sequences()
    tuned = changed(copy.deepcopy(base))
    whole = kl.Probe(base, probe)
    full = kl.forward_kl(whole, tuned)
    few = kl.forward_kl(whole.spread(2), tuned)  # prompts 0 and 2 of 4
    expected = full.restricted([prompt in (0, 2) for prompt in full.prompt_of])
    assert few.positions.tolist() == pytest.approx(expected.positions.tolist(), abs=1e-6)
    assert whole.spread(4) is whole
    parts = [kl.forward_kl(kl.Probe(base, probe.of_prompts(chosen)), tuned) for chosen in ([0, 2], [1, 3])]
    joined = kl.Drift.joined(parts)
    assert joined.per_completion == pytest.approx(full.per_completion)
    assert joined.per_token == pytest.approx(full.per_token)
    assert joined.n_prompts == 4
