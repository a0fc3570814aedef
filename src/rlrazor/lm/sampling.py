"""Completions of a causal LM: sampled or greedy, stopped at a task's stop string, a group sharing its prompt's prefill.

Why not `generate`: it repeats a prompt's prefill for every sample of a group, has no way to draw from a generator of
its own, and takes stop strings only together with a tokenizer. Left out: temperature, top-k and top-p, whose
distribution is not the policy whose KL and gradient are computed.

Prompts of similar length are read together, and step by step beside those of other lengths; sequences that have
stopped leave their batch. What is drawn depends on neither: a step's random numbers are those of the whole chunk.

Not every architecture can share a prefill, sees padding as padding, or continues from its cache as it says. So what
was drawn is checked: one sequence of each batch, the one with the most padding, is read once more, alone and without
a cache. Where its logits are others, or the model cannot do it, the chunk is drawn again in the next of
`forward.WAYS`, the last of which is plain reading. No architecture is known by name here.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import compute, forward
from rlrazor.lm.forward import Cached, Plain, PromptReader, embedding_rows, read_alone
from rlrazor.lm.images import seen

CHECKED = 16  # positions of the sequence that is read again, evenly spread
TOLERANCE, HALF_TOLERANCE = 3e-3, 0.1  # of the logits' spread: rounding is below it, a token or position amiss above
SIMILAR = 1.25  # lengths of prompts that are read together, where there are enough of them
ENOUGH, ENOUGH_ON_GPU = 64, 256  # sequences: fewer at a time take longer each
STAYING = 0.75  # of a batch: where no more are unfinished, the others leave it

Told = Callable[[float], None]  # hears how much is done, a fraction of 1


def unheard(done: float) -> None:
    """Of what is told to nobody."""


class NotFiniteError(ArithmeticError):
    """The policy's outputs are no longer numbers: training has diverged."""


class _OtherLogitsError(ArithmeticError):
    """Logits of a sequence in its batch are not those that it has alone."""


@dataclass(frozen=True)
class Sampling:
    """How prompts are completed: `samples` times each.

    A completion ends with the first of `stop_ids`, which it includes, or after `max_new_tokens`. Any token does for
    `pad_id`, which is never attended to. `greedy`: always the likeliest token; else `rng` draws, on the model's device,
    or where it is None torch's global generator. `chunk` bounds how many sequences are decoded at a time, though a
    prompt's samples stay together. `within`: (first, of) where these are the completions from `first` on of a batch of
    so many, to draw what the whole batch would.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    pad_id: int | None
    samples: int = 1
    greedy: bool = False
    rng: torch.Generator | None = None
    chunk: int = 256
    within: tuple[int, int] | None = None

    def noise(self, logits_NV: Tensor, sequences: int) -> Tensor | None:
        """The random numbers of a step, for all sequences of the chunk (S, V); None: greedy."""
        if self.greedy:
            return None
        of = sequences if self.within is None else self.within[1]
        # In what probabilities are computed in.
        noise_SV = torch.empty(of, logits_NV.shape[1], dtype=torch.float32, device=logits_NV.device)
        return noise_SV.exponential_(generator=self.rng)

    def tokens(self, logits_NV: Tensor, rows: Sequence[int], noise_SV: Tensor | None) -> Tensor:
        """The next token of each sequence (N,); `rows` are their places in the chunk."""
        if noise_SV is None:
            return logits_NV.argmax(dim=-1)
        first = 0 if self.within is None else self.within[0]
        return draw_some(logits_NV.float().softmax(dim=-1), [first + row for row in rows], noise_SV)


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Sequence[int]], how: Sampling, told: Told = unheard) -> list[list[int]]:
    """Complete each prompt (token ids); returns len(prompts) * samples completions, prompt by prompt.

    The modules' train/eval modes are restored. `told` hears how much is done. Raises NotFiniteError, and RazorError for
    a model that does not run on token ids alone.
    """
    # Some models keep beside their cache where an image has moved positions to: of one prompt at a time.
    step = 1 if any(map(seen, prompts)) else max(1, how.chunk // how.samples)
    if how.pad_id is None or how.pad_id >= (embedding_rows(model) or how.pad_id + 1):
        how = replace(how, pad_id=0)
    completions: list[list[int]] = []
    with compute.eval_mode(model):
        for start in range(0, len(prompts), step):
            here = prompts[start : start + step]

            def told_of_all(done: float, start: int = start, count: int = len(here)) -> None:
                told((start + done * count) / len(prompts))

            completions += _complete(model, here, how, told_of_all)
    return completions


def relative_error(logits: Tensor, true: Tensor) -> float:
    """How far logits (..., V) are from the true ones, relative to the spread of those over the vocabulary: RMS."""
    difference, spread = (values - values.mean(dim=-1, keepdim=True) for values in (logits - true, true))
    return float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp(min=1e-30))


def draw_some(probs_NV: Tensor, rows: Sequence[int], noise_SV: Tensor) -> Tensor:
    """A token for each of some rows, as `torch.multinomial` would draw them all (N,), by its noise: Exp(1), (S, V)."""
    # What multinomial does for one sample: the largest p / q.
    if len(rows) == len(noise_SV) and list(rows) == list(range(len(rows))):
        return (probs_NV / noise_SV).argmax(dim=-1)
    return (probs_NV / noise_SV[list(rows)]).argmax(dim=-1)


def _complete(model: Any, prompts: Sequence[Sequence[int]], how: Sampling, told: Told) -> list[list[int]]:
    """In the first way whose logits are right: tried anew for each chunk, so that no draw depends on earlier ones."""
    state = None if how.rng is None else how.rng.get_state()
    failure: Exception | None = None
    for way in forward.WAYS[2 if seen(prompts[0]) else 0 if how.samples > 1 else 1 :]:
        if how.rng is not None and state is not None:
            how.rng.set_state(state)  # what is drawn does not depend on what was tried before
        try:
            batches = [
                _Batch(model, way, prompts, places, how)
                for places in (_equal(prompts) if way in (Cached, Plain) else _similar(prompts, how.samples, model))
            ]
            _decode(batches, how, len(prompts) * how.samples, told)
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
    enough = ENOUGH if compute.device_of(model).type == "cpu" else ENOUGH_ON_GPU
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
        way: Callable[..., PromptReader],
        prompts: Sequence[Sequence[int]],
        places: Sequence[int],
        how: Sampling,
    ) -> None:
        self.model, self.how = model, how
        self.reading = way(model, [prompts[place] for place in places], how.samples, how.pad_id)
        self.rows = [place * how.samples + sample for place in places for sample in range(how.samples)]
        self.completions: dict[int, list[int]] = {row: [] for row in self.rows}
        self.unfinished = set(self.rows)
        shortest = min(range(len(places)), key=lambda at: len(prompts[places[at]]))
        self.watched = self.rows[(shortest + 1) * how.samples - 1]  # its last sample
        self.prompt = seen(prompts[places[shortest]])
        self.read = list(prompts[places[shortest]])  # what the watched one has been given
        self.seen: list[Tensor] = []
        self.steps: list[int] = []

    def step(self, index: int, noise_SV: Tensor | None, stops: AbstractSet[int]) -> None:
        """Draw a token of each."""
        logits_NV = self.reading.logits
        if not compute.is_finite(logits_NV):
            raise NotFiniteError("logits are not finite")
        at = self.rows.index(self.watched)
        if index % -(-self.how.max_new_tokens // CHECKED) == 0:
            self.seen.append(logits_NV[at].clone())
            self.steps.append(index)
        self.token_N = self.how.tokens(logits_NV, self.rows, noise_SV)
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
        first = len(self.read) - 1 - self.drawn
        true_TV, half = read_alone(self.model, self.read[:-1], [first + step for step in self.steps], self.prompt)
        found = relative_error(torch.stack(self.seen).float(), true_TV)
        if not found < (HALF_TOLERANCE if half else TOLERANCE):
            raise _OtherLogitsError(f"its logits in a batch are not those of a sequence alone (apart by {found:.1%})")


def _decode(batches: Sequence[_Batch], how: Sampling, sequences: int, told: Told) -> None:
    """A token at a time, all batches side by side, until all have stopped."""
    stops = frozenset(how.stop_ids)
    going = list(batches)
    for index in range(how.max_new_tokens):
        noise_SV = how.noise(going[0].reading.logits, sequences)
        for batch in going:
            batch.step(index, noise_SV, stops)
        going = [batch for batch in going if batch.unfinished]
        left = sum(len(batch.unfinished) for batch in going) * (1 - (index + 1) / how.max_new_tokens)
        told(1 - left / sequences)
        if not going or index + 1 == how.max_new_tokens:
            break
        for batch in going:
            batch.go_on()
