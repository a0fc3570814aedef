from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rlrazor.lm import forward, sampling
from rlrazor.lm.sampling import NotFiniteError, Sampling, draw_some, sample
from tiny_models import tiny_llama

PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10], [11, 12]]


def generated(model: Any, prompt: list[int], tokens: int, stop: list[int]) -> list[int]:
    """Greedy decoding by transformers, one prompt at a time, without padding."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=stop
    )
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_greedy_is_what_generate_returns(seed: int, chunk: int) -> None:
    model = tiny_llama(seed=seed)
    stop = list(range(1, 44, 8))
    completions = sample(model, PROMPTS, Sampling(max_new_tokens=12, stop_ids=stop, pad_id=0, greedy=True, chunk=chunk))
    assert completions == [generated(model, prompt, 12, stop) for prompt in PROMPTS]


def test_greedy_samples_of_a_group_are_alike_and_come_prompt_by_prompt() -> None:
    model = tiny_llama()
    once = sample(model, PROMPTS, Sampling(max_new_tokens=6, stop_ids=[1], pad_id=0, greedy=True))
    thrice = sample(model, PROMPTS, Sampling(samples=3, max_new_tokens=6, stop_ids=[1], pad_id=0, greedy=True))
    assert thrice == [completion for completion in once for _ in range(3)]


def test_frequencies_are_the_policys_probabilities() -> None:
    model = tiny_llama(vocab=4, seed=3, scale=0.6)
    prompts = [[0, 2], [3, 0, 0, 2, 2]]  # the first is padded
    draws = 4000
    rng = torch.Generator().manual_seed(0)
    completions = sample(
        model,
        prompts,
        Sampling(samples=draws, max_new_tokens=2, stop_ids=[1], pad_id=0, rng=rng),
    )
    for index, prompt in enumerate(prompts):
        expected: dict[tuple[int, ...], float] = {}
        for first in range(4):
            with torch.no_grad():
                logits_TV = model(input_ids=torch.tensor([[*prompt, first]])).logits[0]
            here_V, next_V = logits_TV[-2:].softmax(-1).double()
            if first == 1:
                expected[(1,)] = here_V[1].item()
            else:
                expected |= {(first, second): (here_V[first] * next_V[second]).item() for second in range(4)}
        mine = [tuple(completion) for completion in completions[index * draws : (index + 1) * draws]]
        assert set(mine) <= set(expected)
        probabilities = np.array([*expected.values()])
        observed = [mine.count(outcome) for outcome in expected]
        assert stats.chisquare(observed, draws * probabilities / probabilities.sum()).pvalue > 0.001


def test_a_completion_keeps_its_stop_token_whatever_the_padding() -> None:
    model = tiny_llama(seed=1)
    rng = torch.Generator().manual_seed(0)
    stop = [1, 5, 6, 7, 8, 9, 10]
    for pad in (0, 1):  # 1: pad and eos are one token
        completions = sample(model, PROMPTS, Sampling(samples=50, max_new_tokens=5, stop_ids=stop, pad_id=pad, rng=rng))
        lengths = {len(completion) for completion in completions}
        assert lengths >= {1, 2, 5}
        for completion in completions:
            assert not set(completion[:-1]) & set(stop)
            assert len(completion) == 5 or completion[-1] in stop


def test_the_generator_decides_and_the_mode_stays() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    first, again, other = (
        sample(
            model,
            PROMPTS,
            Sampling(samples=4, max_new_tokens=5, stop_ids=[], pad_id=0, rng=torch.Generator().manual_seed(seed)),
        )
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert all(len(completion) == 5 for completion in first)
    assert model.training


def test_a_diverged_policy_is_told_apart() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3].fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        sample(model, PROMPTS, Sampling(max_new_tokens=2, stop_ids=[1], pad_id=0))


def test_a_share_draws_what_the_whole_batch_would() -> None:
    """One sample of `torch.multinomial` for each row, of which a part is there."""
    probs = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
    whole = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    noise = torch.empty(6, 50).exponential_(generator=torch.Generator().manual_seed(1))
    for rows in (range(6), range(2), range(2, 6), [0, 3, 5]):
        assert torch.equal(draw_some(probs[list(rows)], rows, noise), whole[list(rows)])


VARIED = [[2 + (at * length) % 40 for at in range(length)] for length in (1, 2, 2, 5, 9, 20, 3, 30)]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_drawn_depends_neither_on_who_is_beside_it_nor_on_who_has_left(
    samples: int, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All padded to the longest and read to the end, as by `torch.multinomial`, and apart by length, leaving."""
    model, read = tiny_llama(seed=2), 0

    def count(_: Any, __: Any, kwargs: Any) -> None:
        nonlocal read
        read += kwargs["input_ids"].numel()

    def draw() -> tuple[list[list[int]], int]:
        nonlocal read
        read = 0
        rng = torch.Generator().manual_seed(0)
        stops = list(range(1, 44, 6))
        return sample(
            model,
            VARIED,
            Sampling(samples=samples, max_new_tokens=12, stop_ids=stops, pad_id=0, greedy=greedy, rng=rng),
        ), read

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr(sampling, "ENOUGH", 4)
    drawn, few = draw()
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "ENOUGH", 256)
        patched.setattr(sampling, "STAYING", 0.0)
        together, many = draw()
    hook.remove()
    assert drawn == together
    assert few < 0.75 * many
    assert len({len(completion) for completion in drawn}) > 2
    # Which is one multinomial a step over all of them.
    rng = torch.Generator().manual_seed(0)
    read_so_far = [list(prompt) for prompt in VARIED for _ in range(samples)]
    for _ in range(12):
        with torch.no_grad():
            logits = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in read_so_far])
        tokens = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
        for row, token in zip(read_so_far, tokens.tolist(), strict=True):
            row.append(token)
    for row, found in zip(read_so_far, drawn, strict=True):
        assert found == row[-12 : len(row) - 12 + len(found)]


def test_a_cache_that_holds_more_than_keys_and_values_is_left_whole() -> None:
    class Layer:
        keys = values = None

        def __init__(self, **more: Any) -> None:
            self.keys, self.values = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
            self.kept: Any = None
            vars(self).update(more)

        def batch_select_indices(self, rows: torch.Tensor) -> None:
            self.kept = rows.tolist()

    class Cache:
        def __init__(self, layer: Any) -> None:
            self.layers = [layer]

        def batch_select_indices(self, rows: torch.Tensor) -> None:
            self.layers[0].batch_select_indices(rows)

    plain, recurrent = Layer(length=torch.tensor(2)), Layer(states=torch.zeros(3, 4))
    assert forward._keep({"past_key_values": Cache(plain)}, torch.tensor([0, 2]))
    assert plain.kept == [0, 2]
    assert not forward._keep({"past_key_values": Cache(recurrent)}, torch.tensor([0, 2]))
    assert recurrent.kept is None
    assert not forward._keep({"state": [torch.zeros(3, 4)]}, torch.tensor([0, 2]))


def test_it_says_how_much_is_done() -> None:
    said: list[float] = []
    sample(tiny_llama(), PROMPTS, Sampling(max_new_tokens=6, stop_ids=[], pad_id=0, chunk=2), told=said.append)
    assert said == pytest.approx([at / 12 for at in range(1, 13)])
