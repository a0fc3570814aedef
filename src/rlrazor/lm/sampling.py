"""Completions of a causal LM: sampled or greedy, stopped at a task's stop string, a group sharing its prompt's prefill.

Why not `generate`: it repeats a prompt's prefill for every sample of a group, has no way to draw from a generator of
its own, and takes stop strings only together with a tokenizer. Left out: everything but temperature; a truncated
distribution (top-k, top-p) is not the policy whose KL and gradient are computed.

Prompts of similar length are read together, and step by step beside those of other lengths; sequences that have
stopped leave their batch. What is drawn depends on neither: a step's random numbers are those of the whole chunk.

Not every architecture can share a prefill, sees padding as padding, or continues from its cache as it says. So what
was drawn is checked: one sequence of each batch, the one with the most padding, is read once more, alone and without
a cache. Where its logits are others, or the model cannot do it, the chunk is drawn again in the next of
`forward.WAYS`, the last of which is plain reading. No architecture is known by name here.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import compute, forward
from rlrazor.lm.architecture import device_of, embedding_rows
from rlrazor.lm.forward import Cached, Plain, Reading, read_alone

CHECKED = 16  # positions of the sequence that is read again, evenly spread
TOLERANCE, HALF_TOLERANCE = 3e-3, 0.1  # of the logits' spread: rounding is below it, a token or position amiss above
SIMILAR = 1.25  # lengths of prompts that are read together, where there are enough of them
ENOUGH, ENOUGH_ON_GPU = 64, 256  # sequences: fewer at a time take longer each
STAYING = 0.75  # of a batch: where no more are unfinished, the others leave it


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


def apart(logits: Tensor, true: Tensor) -> float:
    """How far logits (..., V) are from the true ones, relative to the spread of those over the vocabulary: RMS."""
    difference, spread = (values - values.mean(dim=-1, keepdim=True) for values in (logits - true, true))
    return float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp(min=1e-30))


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


def _complete(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, draw: _Draw, told: Callable[[float], None]
) -> list[list[int]]:
    """In the first way whose logits are right: tried anew for each chunk, so that no draw depends on earlier ones."""
    state = None if draw.rng is None else draw.rng.get_state()
    failure: Exception | None = None
    for way in forward.WAYS if draw.samples > 1 else forward.WAYS[1:]:
        if draw.rng is not None and state is not None:
            draw.rng.set_state(state)  # what is drawn does not depend on what was tried before
        try:
            batches = [
                _Batch(model, way, prompts, places, draw, pad_id)
                for places in (_equal(prompts) if way in (Cached, Plain) else _similar(prompts, draw.samples, model))
            ]
            _decode(batches, draw, len(prompts) * draw.samples, told)
            if way is not Plain:
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
        way: Callable[..., Reading],
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
        if not compute.is_finite(logits_NV):
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
