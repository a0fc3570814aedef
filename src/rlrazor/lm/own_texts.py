"""Texts that the base writes itself, from nothing: a generic probe for which no text is needed at all.

Sampled at temperature 1, each to its own end or to `max_new_tokens`, from what begins every text for the base, and
where there is a chat template, as often from an empty turn of the user's. KL is then the mean over the texts of the sum
over their positions, each summed over the whole vocabulary. By the chain rule that is an unbiased estimate of KL(base
|| tuned) between the distributions of whole texts (arXiv:2505.13811), where texts end by themselves. Where they are cut
at N tokens, it is one of KL between the distributions of the first N tokens, and that exactly: a smaller number, as
later tokens can only add to it.

A text is drawn with numbers that its seed, its beginning and its place decide. More texts are the same ones and others.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.lm import compute, encoding, sampling
from rlrazor.lm.adapters import unwrapped
from rlrazor.lm.forward import context_length
from rlrazor.lm.kl import Sequences
from rlrazor.lm.sampling import Told
from rlrazor.lm.suitable import require_embeddings, require_language_model
from rlrazor.seeding import seed_of

AT_A_TIME = 32  # texts that share their random numbers' stream: with another number they are other texts
LOOP_FROM = 16  # tokens: whether a shorter text repeats itself cannot be told
SAID = 0.1  # of the texts: what more of them do is said
INSTEAD = "Give a file of text or prompts that must not change as the generic probe (--generic FILE)."


@dataclass(frozen=True)
class OwnTexts:
    """How they are drawn: so many `samples` in all, each of `max_new_tokens` at most."""

    samples: int = 64
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "seed"):
            bounds.check_whole(name, getattr(self, name))
        if self.max_new_tokens < 1:
            raise RazorError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")

    def within(self, model: Any, begun: Sequence[Sequence[int]]) -> int:
        """The most tokens of a text after any of these beginnings, as the model's context holds no more."""
        limit = context_length(unwrapped(model))
        longest = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - max(map(len, begun)))
        if longest < 1:
            raise RazorError(f"The {limit} tokens of the base's context hold no text after what begins one. {INSTEAD}")
        return longest

    def shares(self, beginnings: int) -> list[int]:
        """How many texts have each of so many beginnings, the first one more where they do not divide."""
        return [len(range(at, self.samples, beginnings)) for at in range(beginnings)]


def beginnings(model: Any, tokenizer: Any, chat: bool) -> list[list[int]]:
    """Token ids that texts begin with: what the tokenizer puts in front of each, or else bos, or else eos.

    With `chat`, and a chat template that takes it, also an empty turn of the user's. Raises RazorError for an
    encoder-decoder, and where there is no such token.
    """
    model = unwrapped(model)
    require_language_model(model)
    declared = [getattr(one, "bos_token_id", None) for one in (getattr(model, "generation_config", None), model.config)]
    found = beginnings_of(tokenizer, chat, declared)
    require_embeddings(model, tokenizer, found, "Beginning")
    return found


def beginnings_of(tokenizer: Any, chat: bool, declared: Sequence[Any] = ()) -> list[list[int]]:
    """The same of a tokenizer; `declared`: what the model, where it is here, says is its bos."""
    special = [token for token in declared if token in tokenizer.added_tokens_decoder]  # else a class's default
    tokens = [tokenizer.bos_token_id, *special, tokenizer.eos_token_id]
    front = encoding.front_ids(tokenizer) or [token for token in tokens if token is not None][:1]
    if not front:
        raise RazorError(
            "The base cannot write a text from nothing, as its tokenizer has no token that begins one, neither bos nor "
            f"eos. {INSTEAD}"
        )
    turn = encoding.empty_turn_ids(tokenizer) if chat and getattr(tokenizer, "chat_template", None) else None
    return [front, *([turn] if turn else [])]


def draw(
    model: Any,
    begun: Sequence[Sequence[int]],
    how: OwnTexts,
    ends: Sequence[int],
    precision: str | None,
    told: Told,
) -> list[list[int]]:
    """The texts without what they begin with, beginning by beginning; any of `ends` ends one.

    `told` hears how much is done. Raises as `sampling.sample` does.
    """
    texts: list[list[int]] = []
    longest = how.within(model, begun)
    with compute.measuring(model, precision):
        for place, (beginning, count) in enumerate(zip(begun, how.shares(len(begun)), strict=True)):
            for first in range(0, count, AT_A_TIME):
                seed = seed_of(how.seed, f"measure/own/{place}/{first}")
                here = sampling.Sampling(
                    longest,
                    ends,
                    pad_id=0,
                    samples=min(AT_A_TIME, count - first),
                    rng=torch.Generator(compute.device_of(model)).manual_seed(seed),
                    chunk=AT_A_TIME,
                    within=(0, AT_A_TIME),
                )

                def told_of_all(done: float, before: int = len(texts), own: int = here.samples) -> None:
                    told((before + done * own) / how.samples)

                texts += sampling.sample(model, [beginning], here, told_of_all)
    return texts


def begun_with(begun: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], how: OwnTexts) -> Sequences:
    """The texts with what they begin with, each a prompt of its own: they are independent of one another."""
    each = [
        list(beginning) for beginning, count in zip(begun, how.shares(len(begun)), strict=True) for _ in range(count)
    ]
    return Sequences(each, texts, range(len(texts)))


def cautions(sequences: Sequences, ends: Collection[int]) -> list[str]:
    """Sentences on texts that say little of the base: those that end at once, are all the same, or loop."""
    texts = [tuple(text) for text in sequences.completions]
    count, empty = len(texts), sum(len(text) == 1 and text[0] in ends for text in texts)
    looping = sum(loops(text[:-1] if text[-1] in ends else text) for text in texts)
    shares = {"end at once": empty / count, "loop (their last half repeats a few tokens)": looping / count}
    found = [f"{'all' if share == 1 else f'{share:.0%}'} {what}" for what, share in shares.items() if share >= SAID]
    alike = count > 1 and len(set(texts)) == 1
    if not (found or alike):
        return []
    said = f"Of the {count} texts that the base wrote for the generic probe, {' and '.join(found or ['none'])}"
    if alike:
        said = f"The {count} texts that the base wrote for the generic probe are one and the same"
        said += f", and {' and '.join(found)}" if found else ""
    if alike or max(shares.values()) > 0.5:
        return [f"{said}: KL on it says little of what the base can do. {INSTEAD}"]
    return [f"{said}: those say less of the base than other text."]


def loops(text: Sequence[int]) -> bool:
    """Whether the last half of a text is one n-gram again and again, twice at least."""
    if len(text) < LOOP_FROM:
        return False
    half = list(text[len(text) // 2 :])
    return any(half[period:] == half[:-period] for period in range(1, len(half) // 2 + 1))
