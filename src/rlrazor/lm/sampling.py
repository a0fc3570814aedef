"""Completions of a causal LM: sampled or greedy, stopped at a task's stop string, a group sharing its prompt's prefill.

Why not `generate`: it repeats a prompt's prefill for every sample of a group, has no way to draw from a generator of
its own, and takes stop strings only together with a tokenizer. Left out: everything but temperature; a truncated
distribution (top-k, top-p) is not the policy whose KL and gradient are computed.

Not every architecture can share a prefill, sees padding as padding, or continues from its cache as it says. So what
was drawn is checked: one sequence of each batch, the one with the most padding, is read once more, alone and without
a cache. Where its logits are others, or the model cannot do it, the batch is drawn again in the next of `_WAYS`, the
last of which is plain reading. No architecture is known by name here.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import compute
from rlrazor.lm.adapters import without_wrapper

CHECKED = 16  # positions of the sequence that is read again, evenly spread
TOLERANCE, HALF_TOLERANCE = 3e-3, 0.1  # of the logits' spread: rounding is below it, a token or position amiss above
_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")  # renamed in transformers 5.24


class NotFiniteError(ArithmeticError):
    """The policy's outputs are no longer numbers: training has diverged."""


class _OtherLogitsError(ArithmeticError):
    """Logits of a sequence in its batch are not those that it has alone."""


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int | None,
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
    the completions from `first` on of a batch of so many, to draw what the whole batch would. Any token does for
    `pad_id`, which is never attended to. Raises NotFiniteError, and RazorError for a model that does not run on token
    ids alone.
    """
    step = max(1, chunk // samples)
    draw = _Draw(samples, max_new_tokens, stop_ids, None if greedy else temperature, rng, within)
    if pad_id is None or pad_id >= (embedding_rows(model) or pad_id + 1):
        pad_id = 0
    completions: list[list[int]] = []
    with compute.eval_mode(model):
        for start in range(0, len(prompts), step):
            completions += _complete(model, prompts[start : start + step], pad_id, draw)
    return completions


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T), padded on the left."""
    width = max(map(len, prompts))
    padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids_BT, mask_BT = (torch.tensor(rows, dtype=torch.long, device=device) for rows in (padded, masks))
    return ids_BT, mask_BT


def prefill(model: Any, ids_BT: Tensor, mask_BT: Tensor, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """Read left-padded prompts once, each for `repeats` continuations.

    Returns the logits of their first tokens, (B * repeats, V), and the cache as the keyword argument that takes it.
    """
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    last = _accepted(model, logits_to_keep=1)
    out = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True, **last)
    cache = _cache_of(out)
    if repeats > 1:
        next(iter(cache.values())).batch_repeat_interleave(repeats)
    return out.logits[:, -1].repeat_interleave(repeats, dim=0), cache


def plain_logits(model: Any, ids_BT: Tensor, last: int | None = None) -> Tensor:
    """Logits of the `last` positions, or of all, (B, T, V), read from token ids of equal length and nothing else."""
    options = _accepted(model, use_cache=False, **({} if last is None else {"logits_to_keep": last}))
    logits: Tensor = model(input_ids=ids_BT, **options).logits
    return logits if last is None else logits[:, -last:]


def read_alone(model: Any, ids: Sequence[int], last: int | None = None) -> tuple[Tensor, bool]:
    """Float32 logits (T, V) of one sequence, and whether they were computed in half precision.

    The LM head is asked for its dtype: accelerate's autocast hands half-precision logits out as float32.
    """
    dtypes: set[torch.dtype] = set()
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, logits: dtypes.add(logits.dtype)) if head is not None else None
    try:
        logits = plain_logits(model, torch.tensor([list(ids)], dtype=torch.long, device=device_of(model)), last)[0]
    finally:
        if hook is not None:
            hook.remove()
    return logits.float(), any(dtype.itemsize < 4 for dtype in dtypes | {logits.dtype})


def apart(logits: Tensor, true: Tensor) -> float:
    """How far logits (..., V) are from the true ones, relative to the spread of those over the vocabulary: RMS."""
    difference, spread = (values - values.mean(dim=-1, keepdim=True) for values in (logits - true, true))
    return float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp(min=1e-30))


def embedding_rows(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None where it does not say."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


@dataclass(frozen=True)
class _Draw:
    samples: int
    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float | None  # None: greedy
    rng: torch.Generator | None
    within: tuple[int, int] | None

    def tokens(self, logits_NV: Tensor, rows: Sequence[int]) -> Tensor:
        """The next token of each sequence (N,); `rows` are their places in what is drawn at a time."""
        if self.temperature is None:
            return logits_NV.argmax(dim=-1)
        probs_NV = (logits_NV.float() / self.temperature).softmax(dim=-1)
        if self.within is None:
            return torch.multinomial(probs_NV, 1, generator=self.rng)[:, 0]
        first, of = self.within
        return draw_some(probs_NV, [first + row for row in rows], of, self.rng)


def draw_some(probs_NV: Tensor, rows: Sequence[int], of: int, rng: torch.Generator | None) -> Tensor:
    """A token for each of some rows of `of`, as `torch.multinomial` would draw them all (N,)."""
    # What multinomial does for one sample: the largest p / q, where q is Exp(1).
    noise = probs_NV.new_empty(of, probs_NV.shape[1]).exponential_(generator=rng)
    return (probs_NV / noise[list(rows)]).argmax(dim=-1)


# What reads prompts (B) for so many samples of each: the logits of the first tokens, (N, V) with N = B * samples, and
# what makes those of the next from the tokens drawn.
_Reading = tuple[Tensor, Callable[[Tensor], Tensor]]


def _padded(model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int, *, shared: bool) -> _Reading:
    """Padded on the left, as the mask and the positions say. `shared`: a prompt is read once for all its samples."""
    ids_BT, mask_BT = left_padded(prompts, pad_id, device_of(model))
    mask_NT = mask_BT.repeat_interleave(samples, dim=0)
    if shared:
        logits_NV, cache = prefill(model, ids_BT, mask_BT, samples)
    else:
        logits_NV, cache = prefill(model, ids_BT.repeat_interleave(samples, dim=0), mask_NT, 1)
    position_N = mask_NT.sum(dim=1)

    def following(token_N: Tensor) -> Tensor:
        nonlocal mask_NT, position_N, cache
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], dim=1)
        out = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NT,
            position_ids=position_N[:, None],
            use_cache=True,
            **cache,
        )
        position_N, cache = position_N + 1, _cache_of(out)
        logits: Tensor = out.logits[:, -1]
        return logits

    return logits_NV, following


def _cached(model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> _Reading:
    """Of equal length, so that there is nothing to say but tokens; then a token at a time with what the model keeps."""
    ids_NT = torch.tensor([list(prompt) for prompt in prompts], dtype=torch.long, device=device_of(model))
    ids_NT = ids_NT.repeat_interleave(samples, dim=0)
    out = model(input_ids=ids_NT, use_cache=True, **_accepted(model, logits_to_keep=1))

    def following(token_N: Tensor) -> Tensor:
        nonlocal out
        out = model(input_ids=token_N[:, None], use_cache=True, **_cache_of(out))
        logits: Tensor = out.logits[:, -1]
        return logits

    return out.logits[:, -1], following


def _plain(model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> _Reading:
    """Of equal length, and for each token all of it once more."""
    ids_NT = torch.tensor([list(prompt) for prompt in prompts], dtype=torch.long, device=device_of(model))
    ids_NT = ids_NT.repeat_interleave(samples, dim=0)

    def following(token_N: Tensor) -> Tensor:
        nonlocal ids_NT
        ids_NT = torch.cat([ids_NT, token_N[:, None]], dim=1)
        return plain_logits(model, ids_NT, 1)[:, 0]

    return plain_logits(model, ids_NT, 1)[:, 0], following


# The fastest first. With one sample the second is the first; the last two want prompts of equal length.
_WAYS: Sequence[Callable[..., _Reading]] = (
    partial(_padded, shared=True),
    partial(_padded, shared=False),
    _cached,
    _plain,
)


def _complete(model: Any, prompts: Sequence[Sequence[int]], pad_id: int, draw: _Draw) -> list[list[int]]:
    """In the first way whose logits are right: tried anew for each batch, so that no draw depends on earlier ones."""
    state = None if draw.rng is None else draw.rng.get_state()
    failure: Exception | None = None
    for way in _WAYS if draw.samples > 1 else _WAYS[1:]:
        if draw.rng is not None and state is not None:
            draw.rng.set_state(state)  # what is drawn does not depend on what was tried before
        by_length: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt) if way in (_cached, _plain) else 0, []).append(place)
        completions: list[list[int]] = [[]] * (len(prompts) * draw.samples)
        try:
            for places in by_length.values():
                here = [prompts[place] for place in places]
                rows = [place * draw.samples + sample for place in places for sample in range(draw.samples)]
                reading = way(model, here, draw.samples, pad_id)
                for row, completion in zip(
                    rows, _decode(model, here, reading, draw, rows, check=way is not _plain), strict=True
                ):
                    completions[row] = completion
        except Exception as error:  # an architecture's own, of any type
            if compute.is_out_of_memory(error):
                raise
            failure = error
        else:
            return completions
    if isinstance(failure, NotFiniteError):
        raise failure
    assert failure is not None
    raise RazorError(
        f"{type(model).__name__} cannot be sampled from with token ids alone: {cause_of(failure)}"
    ) from failure


def _decode(
    model: Any, prompts: Sequence[Sequence[int]], reading: _Reading, draw: _Draw, rows: Sequence[int], *, check: bool
) -> list[list[int]]:
    """A token at a time, until all have stopped. Raises _OtherLogitsError."""
    logits_NV, following = reading
    stops = torch.tensor(list(draw.stop_ids), dtype=torch.long, device=logits_NV.device)
    finished_N = torch.zeros(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
    shortest = min(range(len(prompts)), key=lambda place: len(prompts[place]))
    row = (shortest + 1) * draw.samples - 1  # its last sample
    stride = -(-draw.max_new_tokens // CHECKED)
    seen: list[Tensor] = []
    drawn: list[Tensor] = []
    for index in range(draw.max_new_tokens):
        if not logits_NV.isfinite().all():
            raise NotFiniteError("logits are not finite")
        if index % stride == 0:
            seen.append(logits_NV[row].clone())
        token_N = draw.tokens(logits_NV, rows)
        drawn.append(token_N)
        finished_N = finished_N | torch.isin(token_N, stops)
        if index + 1 == draw.max_new_tokens or bool(finished_N.all()):
            break
        logits_NV = following(token_N)
    tokens_NT = torch.stack(drawn, dim=1)
    if check:
        fed = [*prompts[shortest], *tokens_NT[row, :-1].tolist()]
        _check(model, fed, torch.stack(seen), list(range(0, len(drawn), stride)), len(drawn))
    is_stop_NT = torch.isin(tokens_NT, stops)
    # A sequence that never stops counts whole.
    length_N = torch.where(is_stop_NT.any(dim=1), is_stop_NT.int().argmax(dim=1) + 1, tokens_NT.shape[1])
    pairs = zip(tokens_NT.tolist(), length_N.tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs]


def _check(model: Any, ids: list[int], seen_SV: Tensor, steps: list[int], last: int) -> None:
    """Raise _OtherLogitsError where the model, reading these tokens alone, has other logits at these steps."""
    true_TV, half = read_alone(model, ids, last)
    found = apart(seen_SV.float(), true_TV[steps])
    if not found < (HALF_TOLERANCE if half else TOLERANCE):
        raise _OtherLogitsError(f"its logits in a batch are not those of a sequence alone (apart by {found:.1%})")


def device_of(model: Any) -> torch.device:
    """Where its first parameter is."""
    device: torch.device = next(model.parameters()).device
    return device


def _cache_of(out: Any) -> dict[str, Any]:
    for name in _CACHES:
        if out.get(name) is not None:
            return {name: out[name]}
    raise AttributeError("it keeps no cache")


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those that the model's forward names, under an adapter too, or a wrapper of it that names nothing.

    `use_cache` also where it takes others unnamed, since some classes hand it on so.
    """
    named = inspect.signature(without_wrapper(model).forward).parameters
    kinds = {parameter.kind for parameter in named.values()}
    wrapped = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    unnamed = set(options) if wrapped else {"use_cache"} if inspect.Parameter.VAR_KEYWORD in kinds else set()
    return {name: value for name, value in options.items() if name in named or name in unnamed}
