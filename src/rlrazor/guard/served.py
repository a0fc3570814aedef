"""KL where the base, the tuned model or both are behind a server, which tells their likeliest tokens alone.

What is measured is what `compare` measures: the base's completions of the new task's prompts and of the generic probe,
and the tuned model's own for the reverse. But every token of a completion has to be drawn from the model on the left of
the KL, as the estimate goes by what was drawn (`lm.served.known`): texts that are given, and turns that a conversation
already has, are refused. So are laws, which are fitted to exact KL of a base whose weights they know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.measuring import NO_MEMORY, NO_TOKENIZER
from rlrazor.guard.served_draws import KeptDraws
from rlrazor.lm import compute, own_texts
from rlrazor.lm.digests import DIGEST_VALUES, SERVED, fixed_tokens, tokenizer_digest
from rlrazor.lm.encoding import stop_ids
from rlrazor.lm.images import seen
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.models import load, tokenizer_at
from rlrazor.lm.probes import ProbeSettings, Prompt, probe_hash
from rlrazor.lm.prompts import encode
from rlrazor.lm.sampling import NotFiniteError, Told, unheard
from rlrazor.lm.served.known import Floats, Known, at_least, estimate
from rlrazor.lm.served.llama_file import LlamaFile
from rlrazor.lm.served.local import LocalModel
from rlrazor.lm.served.model import TOP, Served, opened
from rlrazor.lm.task_names import ALL
from rlrazor.lm.weight_files import is_adapter

AS_SERVED = (
    "Of a served model only the likeliest tokens are known: KLs are estimates without bias, beside what they are at "
    "least. No upper bound can be told."
)


@dataclass(frozen=True)
class Asking:
    """How models are asked: for the `top` likeliest tokens, 0: all. `tokenizer`: where that is, if no model is here."""

    top: int = TOP
    tokenizer: str | None = None


@dataclass(frozen=True)
class AddressedBase:
    """A base that is not here, and how it is asked."""

    address: str
    asking: Asking


EXACT = "Both models are in this process, with all of their distributions: KL is exact, and nothing is hidden."


class Side(Protocol):
    """One of the two models."""

    def read(self, sequences: Sequences, beside: Known | None = None, told: Told = unheard) -> Known:
        """What is known of it at every token of the completions."""
        ...


@dataclass(frozen=True, eq=False)
class ServedKL:
    """A KL at each position: its estimate, and what it is at least; `unknown`: the mean probability of each side's
    tokens that are not told, the left one's first.
    """

    estimate: Drift
    bound: Drift
    unknown: tuple[float, float]

    @property
    def gap(self) -> float:
        """By how much the estimate is above what is certain, in nats per completion."""
        return self.estimate.per_completion.mean - self.bound.per_completion.mean


def between(p: Side, q: Side, sequences: Sequences, known: Known | None = None, told: Told = unheard) -> ServedKL:
    """KL(p || q) on completions drawn from p. `known`: what is known of p, where it has been asked already.

    Whichever is here is read on the tokens that are known of the other. Raises RazorError for an infinite one.
    """
    if isinstance(p, LocalModel | LlamaFile) and isinstance(q, LocalModel | LlamaFile):
        return exact(p, q, sequences)
    if known is None and isinstance(p, LocalModel):
        theirs = q.read(sequences, None, told)
        known = p.read(sequences, theirs)
    else:
        known = p.read(sequences, None, told) if known is None else known
        theirs = q.read(sequences, known, told)
    tokens = np.array([token for completion in sequences.completions for token in completion], np.int64)
    positions, bound = estimate(known, theirs, tokens), np.minimum(at_least(known, theirs, tokens), 1e6)
    unknown = float(known.rests.mean()), float(theirs.rests.mean())
    return _checked(positions, bound, sequences, unknown)


def exact(p: LocalModel | LlamaFile, q: LocalModel | LlamaFile, sequences: Sequences) -> ServedKL:
    """KL(p || q) of two models in this process, over the whole vocabulary: the estimate and the bound are one."""
    found = []
    for mine, yours in zip(p.whole(sequences), q.whole(sequences), strict=True):
        if mine.shape != yours.shape:
            raise RazorError(
                f"The two models have vocabularies of {mine.shape[1]} and {yours.shape[1]} tokens: KL between them is "
                "not defined. Compare a model with the base it was fine-tuned from."
            )
        found.append((np.exp(mine) * (mine - yours)).sum(axis=1))
    positions = np.concatenate(found)
    return _checked(positions, np.maximum(positions, 0.0), sequences, (0.0, 0.0))


def _checked(positions: Floats, bound: Floats, sequences: Sequences, unknown: tuple[float, float]) -> ServedKL:
    if not np.isfinite(positions).all():
        raise RazorError(
            "KL is infinite: one model gives no probability at all to a token that the other draws. They are not a "
            "model and its base, or one masks tokens."
        )
    lengths = np.array([len(one) for one in sequences.completions], np.int64)
    prompt_of = np.array(sequences.prompt_of, np.int64)
    return ServedKL(Drift(positions, lengths, prompt_of), Drift(bound, lengths, prompt_of), unknown)


def require_drawn(on: MeasuredOn) -> None:
    """Raise RazorError where completions are measured that the base has not drawn."""
    if on.generic.texts:
        raise RazorError(
            "A served model is measured on what is drawn from it, and a text is not: give --generic self, or a file of "
            "prompts."
        )
    if on.settings.turns == ALL:
        raise RazorError("A served model is measured on what is drawn from it: leave --turns all out.")


def drawn_by_server(
    model: Served, on: MeasuredOn, told: Callable[[str], Told], here: Any = None
) -> dict[str, Sequences]:
    """Both probes, completed by a served base, and ended where the other model, if it is `here`, ends its own too.

    Raises RazorError where no prompt fits, or one has images.
    """
    ends = stop_ids(model.tokenizer, here, on.settings.stop)
    generic, how = on.generic, on.generic.completed(on.settings)
    found = {FORWARD: _completed(model, on.prompts, on.settings, ends, told("the base completes the prompts"))}
    if generic.own is None:
        ends = stop_ids(model.tokenizer, here, how.stop)
        found[PROBE] = _completed(model, generic.prompts, how, ends, told("the base completes the generic prompts"))
        return found
    begun = own_texts.beginnings_of(model.tokenizer, on.settings.chat)
    own = generic.own
    each = [list(one) for one, count in zip(begun, own.shares(len(begun)), strict=True) for _ in range(count)]
    most = (
        own.max_new_tokens
        if model.context is None
        else min(own.max_new_tokens, model.context - max(map(len, begun)) - 1)
    )
    ends = stop_ids(model.tokenizer, here)
    texts = model.draw(each, 1, most, ends, told("the base writes texts of its own"))
    found[PROBE] = Sequences(each, texts, range(len(texts)))
    return found


def _completed(
    model: Served, prompts: Sequence[Prompt], how: ProbeSettings, ends: Sequence[int], told: Told
) -> Sequences:
    ids = encode(model.tokenizer, prompts, how.chat, how.chat_template_kwargs)
    if any(map(seen, ids)):
        raise RazorError("Prompts with images cannot be put to a served model: leave the column out.")
    # One more, as the server is asked for what follows the last.
    fit = [one for one in ids if model.context is None or len(one) + how.max_new_tokens < model.context]
    if not fit:
        raise RazorError(
            f"No prompt fits into the {model.context} tokens of the served model's context with a completion of "
            f"{how.max_new_tokens}: shorten the prompts, or lower --max-new-tokens."
        )
    return Sequences.grouped(fit, model.draw(fit, how.samples, how.max_new_tokens, ends, told))


@dataclass(frozen=True, eq=False)
class ServedSide:
    """What a `BaseSide` tells of its probes: how many prompts of each are measured, and the first of them."""

    sequences: Mapping[str, Sequences]
    cautions: Sequence[str]

    @property
    def whole(self) -> dict[str, int]:
        """How many prompts each probe has."""
        return {name: len(one.prompts) for name, one in self.sequences.items()}

    @property
    def first_prompt(self) -> Sequence[int]:
        """Token ids of the first of the new task's prompts."""
        return self.sequences[FORWARD].prompts[0]


@dataclass(eq=False)
class ServedBase:
    """A served base, read once, and checkpoints measured against it: what `ReadBase` is of one that is here.

    `beside`: of the last measurement, what goes into a log beside the estimates. `is_drawn_anew`: whether the base has
    drawn its completions now, and they are not those that were `kept`.
    """

    dtype: str
    digest: str
    served: Served
    side: ServedSide
    known: Mapping[str, Known]
    kept: KeptDraws
    is_drawn_anew: bool
    beside: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_source(cls, base: AddressedBase, dtype: str, on: MeasuredOn, log: Path) -> Self:
        """Raises RazorError for a server or a tokenizer that cannot be used, for texts and turns, and for damage to
        what is kept beside the `log`.
        """
        require_drawn(on)
        served = opened(base.address, tokenizer_of(base.asking, None), base.asking.top)
        digest, tokenizer = served_digest(served), tokenizer_digest(served.tokenizer)
        how = {"probe": probe_hash(on.settings, on.generic), "prompts_hash": on.prompts_hash, "tokenizer": tokenizer}
        kept = KeptDraws.beside(log, how)
        sequences = kept.of_base(digest)
        is_drawn_anew = not sequences
        if is_drawn_anew:
            sequences = drawn_by_server(served, on, lambda what: unheard)
        side = ServedSide(sequences, [EXACT if isinstance(served, LlamaFile) else AS_SERVED, *served.cautions])
        known = {name: served.read(one) for name, one in sequences.items()}
        return cls(dtype, digest, served, side, known, kept, is_drawn_anew)

    @property
    def tokenizer(self) -> Any:
        """What it was asked with."""
        return self.served.tokenizer

    def keep(self) -> None:
        """What was drawn, for the next that adds to the log. Raises RazorError where it cannot be written."""
        if self.is_drawn_anew:
            self.kept.keep(self.digest, self.side.sequences)

    def measured(self, path: str | Path, notes: list[str]) -> dict[str, Drift]:
        """The estimates of a checkpoint's KL on both probes; `notes` gain what has to be known of how.

        Raises RazorError for what cannot be loaded, an adapter, another vocabulary, and one that has diverged.
        """
        if is_adapter(path):
            raise RazorError("it is an adapter, whose base is behind the server: merge it, or watch with a base here.")
        try:
            with compute.memory_errors(NO_MEMORY):
                tuned = load(path, dtype=self.dtype, tokenizer=self.tokenizer)
                if tuned.tokenizer is self.tokenizer and NO_TOKENIZER not in notes:
                    notes.append(NO_TOKENIZER)
                require_same_tokens(tuned.tokenizer, self.tokenizer, path)
                own = LocalModel(tuned.model, self.dtype)
                found = {
                    name: between(self.served, own, one, self.known[name]) for name, one in self.side.sequences.items()
                }
        except NotFiniteError as error:
            raise RazorError("its outputs are NaN or infinite: training has diverged there.") from error
        self.beside = {f"{name}_at_least": one.bound.per_completion.mean for name, one in found.items()}
        return {name: one.estimate for name, one in found.items()}


def tokenizer_of(asking: Asking, here: str | None) -> Any:
    """The one that is named, or else that of the model that is here. Raises RazorError where there is none."""
    source = asking.tokenizer or here
    if source is None:
        raise RazorError(
            "A served model takes token ids, and no model here has its tokenizer: name the folder or hub id that has, "
            "with --tokenizer."
        )
    return tokenizer_at(source)


def require_same_tokens(one: Any, other: Any, source: str | Path) -> None:
    """Raise RazorError where a tokenizer lacks the other's tokens, or has them by other ids."""
    if not other.get_vocab().items() <= one.get_vocab().items():
        raise RazorError(
            f"The tokenizer of {source} is not that of the served model: compare a model with its own base, or name "
            "the right one with --tokenizer."
        )


def served_digest(model: Served) -> str:
    """What tells a served base from another: what it thinks of fixed tokens; as `base_digest`, without its weights.

    Without these a base that is as close as rounding in bfloat16 passes for the same: 0.15 nats in the median.
    """
    ids = fixed_tokens(len(model.tokenizer), DIGEST_VALUES + 1)
    logps = model.read(Sequences([ids[:1]], [ids[1:]], [0])).drawn
    return " ".join([SERVED, "0", "0", *(f"{logp:.6g}" for logp in logps)])
