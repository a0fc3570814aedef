"""Completions of a causal LM: sampled or greedy, stopped at a task's stop string, a group sharing its prompt's prefill.

Why not `generate`: it repeats a prompt's prefill for every sample of a group, has no way to draw from a generator of
its own, and takes stop strings only together with a tokenizer. Left out: everything but temperature; a truncated
distribution (top-k, top-p) is not the policy whose KL and gradient are computed.

Prompts of similar length are read together, and step by step beside those of other lengths; sequences that have
stopped leave their batch. What is drawn depends on neither: a step's random numbers are those of the whole chunk.

Not every architecture can share a prefill, sees padding as padding, or continues from its cache as it says. So what
was drawn is checked: one sequence of each batch, the one with the most padding, is read once more, alone and without
a cache. Where its logits are others, or the model cannot do it, the chunk is drawn again in the next of `_WAYS`, the
last of which is plain reading. No architecture is known by name here.
"""

import inspect
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import compute
from rlrazor.lm.adapters import without_wrapper

CHECKED = 16  # positions of the sequence that is read again, evenly spread
TOLERANCE, HALF_TOLERANCE = 3e-3, 0.1  # of the logits' spread: rounding is below it, a token or position amiss above
SIMILAR = 1.25  # lengths of prompts that are read together, where there are enough of them
ENOUGH, ENOUGH_ON_GPU = 64, 256  # sequences: fewer at a time take longer each
STAYING = 0.75  # of a batch: where no more are unfinished, the others leave it
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
    told: Callable[[float], None] | None = None,
) -> list[list[int]]:
    """Complete each prompt (token ids) `samples` times; returns len(prompts) * samples completions, prompt by prompt.

    A completion ends with the first of `stop_ids`, which it includes, or after `max_new_tokens`. `chunk` bounds how
    many sequences are decoded at a time, though a prompt's samples stay together. The modules' train/eval modes are
    restored. `rng`, on the model's device, draws; None: torch's global generator. `within`: (first, of) where these are
    the completions from `first` on of a batch of so many, to draw what the whole batch would. Any token does for
    `pad_id`, which is never attended to. `told` hears how much is done, a fraction of 1. Raises NotFiniteError, and
    RazorError for a model that does not run on token ids alone.
    """
    step = max(1, chunk // samples)
    draw = _Draw(samples, max_new_tokens, stop_ids, None if greedy else temperature, rng, within)
    if pad_id is None or pad_id >= (embedding_rows(model) or pad_id + 1):
        pad_id = 0
    completions: list[list[int]] = []
    with compute.eval_mode(model):
        for start in range(0, len(prompts), step):
            here = prompts[start : start + step]

            def told_of_all(done: float, start: int = start, count: int = len(here)) -> None:
                if told is not None:
                    told((start + done * count) / len(prompts))

            completions += _complete(model, here, pad_id, draw, told_of_all)
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

    def noise(self, logits_NV: Tensor, sequences: int) -> Tensor | None:
        """The random numbers of a step, for all sequences of the chunk (S, V); None: greedy."""
        if self.temperature is None:
            return None
        of = sequences if self.within is None else self.within[1]
        # In what probabilities are computed in.
        noise_SV = torch.empty(of, logits_NV.shape[1], dtype=torch.float32, device=logits_NV.device)
        return noise_SV.exponential_(generator=self.rng)

    def tokens(self, logits_NV: Tensor, rows: Sequence[int], noise_SV: Tensor | None) -> Tensor:
        """The next token of each sequence (N,); `rows` are their places in the chunk."""
        if self.temperature is None or noise_SV is None:
            return logits_NV.argmax(dim=-1)
        first = 0 if self.within is None else self.within[0]
        probs_NV = (logits_NV.float() / self.temperature).softmax(dim=-1)
        return draw_some(probs_NV, [first + row for row in rows], noise_SV)


def draw_some(probs_NV: Tensor, rows: Sequence[int], noise_SV: Tensor) -> Tensor:
    """A token for each of some rows, as `torch.multinomial` would draw them all (N,), by its noise: Exp(1), (S, V)."""
    # What multinomial does for one sample: the largest p / q.
    if len(rows) == len(noise_SV) and list(rows) == list(range(len(rows))):
        return (probs_NV / noise_SV).argmax(dim=-1)
    return (probs_NV / noise_SV[list(rows)]).argmax(dim=-1)


class _Reading(Protocol):
    """What reads prompts (B) for so many samples of each. `logits` (N, V), N = B * samples, are of the next token."""

    logits: Tensor

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only; False where that cannot be."""


class _Padded:
    """On the left, as the mask and the positions say. `shared`: a prompt is read once for all its samples."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int, *, shared: bool
    ) -> None:
        ids_BT, mask_BT = left_padded(prompts, pad_id, device_of(model))
        self.model, self.mask_NT = model, mask_BT.repeat_interleave(samples, dim=0)
        if shared:
            self.logits, self.cache = prefill(model, ids_BT, mask_BT, samples)
        else:
            self.logits, self.cache = prefill(model, ids_BT.repeat_interleave(samples, dim=0), self.mask_NT, 1)
        self.position_N = self.mask_NT.sum(dim=1)

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.mask_NT = torch.cat([self.mask_NT, self.mask_NT.new_ones(len(self.mask_NT), 1)], dim=1)
        out = self.model(
            input_ids=token_N[:, None],
            attention_mask=self.mask_NT,
            position_ids=self.position_N[:, None],
            use_cache=True,
            **self.cache,
        )
        self.position_N, self.cache, self.logits = self.position_N + 1, _cache_of(out), out.logits[:, -1]

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only; False where the cache does not allow it."""
        if not _keep(self.cache, rows_M):
            return False
        self.mask_NT, self.position_N, self.logits = self.mask_NT[rows_M], self.position_N[rows_M], self.logits[rows_M]
        return True


class _Cached:
    """Of equal length, so that there is nothing to say but tokens; then a token at a time with what the model keeps."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self.model = model
        self.out = model(
            input_ids=_repeated(model, prompts, samples), use_cache=True, **_accepted(model, logits_to_keep=1)
        )
        self.logits = self.out.logits[:, -1]

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.out = self.model(input_ids=token_N[:, None], use_cache=True, **_cache_of(self.out))
        self.logits = self.out.logits[:, -1]

    def keep(self, rows_M: Tensor) -> bool:
        """Never: what the model keeps may have any shape."""
        return False


class _Plain:
    """Of equal length, and for each token all of it once more."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self.model, self.ids_NT = model, _repeated(model, prompts, samples)
        self.logits = plain_logits(model, self.ids_NT, 1)[:, 0]

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.ids_NT = torch.cat([self.ids_NT, token_N[:, None]], dim=1)
        self.logits = plain_logits(self.model, self.ids_NT, 1)[:, 0]

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only."""
        self.ids_NT, self.logits = self.ids_NT[rows_M], self.logits[rows_M]
        return True


def _repeated(model: Any, prompts: Sequence[Sequence[int]], samples: int) -> Tensor:
    ids_BT = torch.tensor([list(prompt) for prompt in prompts], dtype=torch.long, device=device_of(model))
    return ids_BT.repeat_interleave(samples, dim=0)


# The fastest first. With one sample the second is the first; the last two want prompts of equal length.
_WAYS: Sequence[Callable[..., _Reading]] = (
    partial(_Padded, shared=True),
    partial(_Padded, shared=False),
    _Cached,
    _Plain,
)


def _complete(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, draw: _Draw, told: Callable[[float], None]
) -> list[list[int]]:
    """In the first way whose logits are right: tried anew for each chunk, so that no draw depends on earlier ones."""
    state = None if draw.rng is None else draw.rng.get_state()
    failure: Exception | None = None
    for way in _WAYS if draw.samples > 1 else _WAYS[1:]:
        if draw.rng is not None and state is not None:
            draw.rng.set_state(state)  # what is drawn does not depend on what was tried before
        try:
            batches = [
                _Batch(model, way, prompts, places, draw, pad_id)
                for places in (_equal(prompts) if way in (_Cached, _Plain) else _similar(prompts, draw.samples, model))
            ]
            _decode(batches, draw, len(prompts) * draw.samples, told)
            if way is not _Plain:
                for batch in batches:
                    batch.check()
        except Exception as error:  # an architecture's own, of any type
            if compute.is_out_of_memory(error):
                raise
            failure = error
        else:
            completed = {row: tokens for batch in batches for row, tokens in batch.completions.items()}
            return [completed[row] for row in range(len(completed))]
    if isinstance(failure, NotFiniteError):
        raise failure
    assert failure is not None
    raise RazorError(
        f"{type(model).__name__} cannot be sampled from with token ids alone: {cause_of(failure)}"
    ) from failure


def _equal(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of prompts of one length each."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    return list(by_length.values())


def _similar(prompts: Sequence[Sequence[int]], samples: int, model: Any) -> list[list[int]]:
    """Places of prompts of similar length, the shortest first; not so few that their steps take longer."""
    enough = ENOUGH if device_of(model).type == "cpu" else ENOUGH_ON_GPU
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        if not batches or (
            len(batches[-1]) * samples >= enough and len(prompts[place]) > SIMILAR * len(prompts[batches[-1][0]])
        ):
            batches.append([])
        batches[-1].append(place)
    return batches


class _Batch:
    """Prompts that are read together, the shortest of which is watched, and their completions by place in the chunk."""

    def __init__(
        self,
        model: Any,
        way: Callable[..., _Reading],
        prompts: Sequence[Sequence[int]],
        places: Sequence[int],
        draw: _Draw,
        pad_id: int,
    ) -> None:
        self.model, self.draw = model, draw
        self.reading = way(model, [prompts[place] for place in places], draw.samples, pad_id)
        self.rows = [place * draw.samples + sample for place in places for sample in range(draw.samples)]
        self.completions: dict[int, list[int]] = {row: [] for row in self.rows}
        self.unfinished = set(self.rows)
        shortest = min(range(len(places)), key=lambda at: len(prompts[places[at]]))
        self.watched = self.rows[(shortest + 1) * draw.samples - 1]  # its last sample
        self.read = list(prompts[places[shortest]])  # what the watched one has been given
        self.seen: list[Tensor] = []
        self.steps: list[int] = []

    def step(self, index: int, noise_SV: Tensor | None, stops: AbstractSet[int]) -> None:
        """Draw a token of each."""
        logits_NV = self.reading.logits
        if not logits_NV.isfinite().all():
            raise NotFiniteError("logits are not finite")
        at = self.rows.index(self.watched)
        if index % -(-self.draw.max_new_tokens // CHECKED) == 0:
            self.seen.append(logits_NV[at].clone())
            self.steps.append(index)
        self.token_N = self.draw.tokens(logits_NV, self.rows, noise_SV)
        drawn = self.token_N.tolist()
        self.read.append(drawn[at])
        self.drawn = index + 1
        for row, token in zip(self.rows, drawn, strict=True):
            if row in self.unfinished:
                self.completions[row].append(token)
                if token in stops:
                    self.unfinished.discard(row)

    def go_on(self) -> None:
        """Read what was drawn, without the sequences that have stopped where they are many."""
        staying = [at for at, row in enumerate(self.rows) if row in self.unfinished or row == self.watched]
        if len(staying) <= STAYING * len(self.rows):
            kept_M = torch.tensor(staying, device=self.token_N.device)
            if self.reading.keep(kept_M):
                self.rows, self.token_N = [self.rows[at] for at in staying], self.token_N[kept_M]
        self.reading.follow(self.token_N)

    def check(self) -> None:
        """Raise _OtherLogitsError where the watched sequence alone has other logits."""
        _check(self.model, self.read[:-1], torch.stack(self.seen), self.steps, self.drawn)


def _decode(batches: Sequence[_Batch], draw: _Draw, sequences: int, told: Callable[[float], None]) -> None:
    """A token at a time, all batches side by side, until all have stopped."""
    stops = frozenset(draw.stop_ids)
    going = list(batches)
    for index in range(draw.max_new_tokens):
        noise_SV = draw.noise(going[0].reading.logits, sequences)
        for batch in going:
            batch.step(index, noise_SV, stops)
        going = [batch for batch in going if batch.unfinished]
        left = sum(len(batch.unfinished) for batch in going) * (1 - (index + 1) / draw.max_new_tokens)
        told(1 - left / sequences)
        if not going or index + 1 == draw.max_new_tokens:
            break
        for batch in going:
            batch.go_on()


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


def _keep(cache: dict[str, Any], rows_M: Tensor) -> bool:
    """Leave only some sequences in a cache; False, and nothing done, where more than keys and values would have to."""
    (held,) = cache.values()
    layers = getattr(held, "layers", None)
    if not layers or not hasattr(held, "batch_select_indices"):
        return False
    if not all(
        hasattr(layer, "batch_select_indices") and _of_sequences(layer) <= {"keys", "values"} for layer in layers
    ):
        return False
    held.batch_select_indices(rows_M)
    return True


def _of_sequences(layer: Any) -> set[str]:
    """What a layer keeps that may have a row for each sequence."""
    return {
        name
        for name, value in vars(layer).items()
        if isinstance(value, list | tuple | dict) or (isinstance(value, Tensor) and value.dim() > 1)
    }


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those that the model's forward names, under an adapter too, or a wrapper of it that names nothing.

    `use_cache` also where it takes others unnamed, since some classes hand it on so.
    """
    named = inspect.signature(without_wrapper(model).forward).parameters
    kinds = {parameter.kind for parameter in named.values()}
    wrapped = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    unnamed = set(options) if wrapped else {"use_cache"} if inspect.Parameter.VAR_KEYWORD in kinds else set()
    return {name: value for name, value in options.items() if name in named or name in unnamed}
