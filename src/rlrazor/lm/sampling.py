"""Completions of a causal LM: sampled or greedy, stopped at a task's stop string, a group sharing its prompt's prefill.

Why not `generate`: it repeats a prompt's prefill for every sample of a group, has no way to draw from a generator of
its own, and takes stop strings only together with a tokenizer. Left out: everything but temperature; a truncated
distribution (top-k, top-p) is not the policy whose KL and gradient are computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlrazor.lm import compute


class NotFiniteError(ArithmeticError):
    """The policy's outputs are no longer numbers: training has diverged."""


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    greedy: bool = False,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
    chunk: int = 256,
    within: tuple[int, int] | None = None,
) -> list[list[int]]:
    """Complete each prompt (token ids) `samples` times; returns len(prompts) * samples completions, prompt by prompt.

    A completion ends with the first of `stop_ids`, which it includes, or after `max_new_tokens`. `chunk` bounds how
    many sequences are decoded at a time, though a prompt's samples stay together. The modules' train/eval modes are
    restored. `rng`, on the model's device, draws; None: torch's global generator. `within`: (first, of) where these are
    the completions from `first` on of a batch of so many, to draw what the whole batch would. Raises NotFiniteError.
    """
    step = max(1, chunk // samples)
    completions: list[list[int]] = []
    with compute.eval_mode(model):
        for start in range(0, len(prompts), step):
            completions += _decode(
                model, prompts[start : start + step], samples, max_new_tokens, stop_ids, pad_id,
                None if greedy else temperature, rng, within,
            )  # fmt: skip
    return completions


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def prefill(model: Any, ids_BT: Tensor, mask_BT: Tensor, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """Read left-padded prompts once, each for `repeats` continuations.

    Returns the logits of their first tokens, (B * repeats, V), and the cache as the keyword argument that takes it.
    """
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    out = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in out else "past_key_values"  # renamed in transformers 5.24
    out[name].batch_repeat_interleave(repeats)
    return out.logits[:, -1].repeat_interleave(repeats, dim=0), {name: out[name]}


def draw(probs_NV: Tensor, rng: torch.Generator | None = None, within: tuple[int, int] | None = None) -> Tensor:
    """A token of each row, as `torch.multinomial` draws it where the rows are those from `first` on of so many."""
    if within is None:
        return torch.multinomial(probs_NV, 1, generator=rng)[:, 0]
    first, of = within
    # What multinomial does for one sample: the largest p / q, where q is Exp(1).
    noise = probs_NV.new_empty(of, probs_NV.shape[1]).exponential_(generator=rng)
    return (probs_NV / noise[first : first + len(probs_NV)]).argmax(dim=-1)


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float | None,
    rng: torch.Generator | None,
    within: tuple[int, int] | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    ids_BT, mask_BT = left_padded(prompts, pad_id, device)
    logits_NV, cache = prefill(model, ids_BT, mask_BT, samples)
    mask_NT = mask_BT.repeat_interleave(samples, dim=0)
    position_N = mask_NT.sum(dim=1)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    finished_N = torch.zeros(len(logits_NV), dtype=torch.bool, device=device)
    drawn: list[Tensor] = []
    for index in range(max_new_tokens):
        if not logits_NV.isfinite().all():
            raise NotFiniteError("logits are not finite")
        if temperature is None:
            token_N = logits_NV.argmax(dim=-1)
        else:
            probs_NV = (logits_NV.float() / temperature).softmax(dim=-1)
            token_N = draw(probs_NV, rng, within)
        drawn.append(torch.where(finished_N, pad_id, token_N))
        finished_N = finished_N | torch.isin(token_N, stops)
        if index + 1 == max_new_tokens or bool(finished_N.all()):
            break
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], dim=1)
        out = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NT,
            position_ids=position_N[:, None],
            use_cache=True,
            **cache,
        )
        position_N = position_N + 1
        logits_NV = out.logits[:, -1]
    tokens_NT = torch.stack(drawn, dim=1)
    is_stop_NT = torch.isin(tokens_NT, stops)
    # A sequence that never stops counts whole.
    length_N = torch.where(is_stop_NT.any(dim=1), is_stop_NT.int().argmax(dim=1) + 1, tokens_NT.shape[1])
    rows, lengths = tokens_NT.tolist(), length_N.tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
