"""What a fine-tuned model is compared with its base on: prompts of the new task, and text that must not change.

Neither has labels. Of a prompt, completions are sampled from the base, once, with a seed of their own, and kept on disk
by the hash of all they depend on; of a text, every token is measured. A generic probe may also be prompts, completed by
the base: what a user has who kept the traffic but not the answers, or the prior tasks' own (`prior_prompts`). Or it is
texts that the base writes itself, for a user who has neither (`own_texts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.lm import compute, encoding, own_texts, sampling
from rlrazor.lm.adapters import adapter_disabled, unwrapped
from rlrazor.lm.digests import base_digest
from rlrazor.lm.forward import context_length, embedding_rows
from rlrazor.lm.images import images_of, seen
from rlrazor.lm.kl import Sequences
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.prior_prompts import PROMPTS, PriorPrompts
from rlrazor.lm.prompts import Prompt as Prompt
from rlrazor.lm.prompts import answers, check_template_kwargs, check_text, given_in, prompt_of
from rlrazor.lm.prompts import encode as encode
from rlrazor.lm.representation import ids_of_texts, paragraphs
from rlrazor.lm.sampling import Told, unheard
from rlrazor.lm.suitable import require_embeddings
from rlrazor.lm.task_names import ALL, LAST, PARAGRAPHS, PRIOR, TURNS, WORDS
from rlrazor.lm.task_names import SELF as SELF
from rlrazor.seeding import seed_of
from rlrazor.system.documents import parse_json, read_text
from rlrazor.system.rows import read_located
from rlrazor.system.writing import write_cache

if TYPE_CHECKING:
    from rlrazor.lm.prior import PriorTasks

_LATER = ("turns", "chat_template_kwargs")
NEW, GENERIC = "base", "probe"  # purposes: what the random streams of the two probes are called
AT_A_TIME, KEPT_TOKENS = 256, 1 << 16  # sequences, and tokens of theirs that are in the sampler's cache at most
_SHORTER = {
    NEW: (
        "prompt",
        "shorten the prompts, or lower max_new_tokens (--max-new-tokens; in Python ProbeSettings(max_new_tokens=...))",
    ),
    GENERIC: ("prompt of the generic probe", "give shorter ones, or another probe (--generic FILE, or self)"),
}
"""What is too long, by its purpose, and what to do about it."""
SAMPLER = 3  # raise it when `sampling.sample` draws otherwise: what is in a cache was drawn by an older one


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe's prompts are completed. Two measurements can be compared only where these are the same.

    `samples`: completions of each prompt. `stop`: strings that end one, beside the model's own end of sequence. `chat`:
    whether a prompt that is plain text is put into the user's turn of the tokenizer's chat template, where it has one.
    `precision`: what models compute in as they are measured (`compute.measuring`); None: what their weights are.
    `turns`: which of the assistant's turns in a conversation are measured: "last", which the base completes, or "all",
    those also that the conversation has, as they are. `chat_template_kwargs`: what the chat template is told of each
    prompt that does not say otherwise itself, such as {"enable_thinking": False}.
    """

    max_new_tokens: int = 128
    samples: int = 1
    stop: tuple[str, ...] = ()
    chat: bool = True
    precision: str | None = None
    turns: str = LAST
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        bounds.check_whole("samples", self.samples)
        bounds.check_whole("max_new_tokens", self.max_new_tokens)
        if self.max_new_tokens < 1:
            raise RazorError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not isinstance(self.chat, bool):
            raise RazorError(f"chat is True or False, not {self.chat!r:.60}.")
        encoding.check_stop(self.stop)
        if self.precision not in (None, *compute.PRECISIONS):
            raise RazorError(f"The precision is one of {', '.join(compute.PRECISIONS)}, not {self.precision!s:.60}.")
        if self.turns not in TURNS:
            raise RazorError(f"turns is one of {', '.join(TURNS)}, not {self.turns!s:.60}.")
        check_template_kwargs(self.chat_template_kwargs, "The")
        object.__setattr__(self, "chat_template_kwargs", dict(self.chat_template_kwargs))

    def as_json(self) -> dict[str, Any]:
        """By name; of those that came later only what is not as it always was, so that hashes of before still hold."""
        every, usual = asdict(self), asdict(ProbeSettings())
        return {name: value for name, value in every.items() if name not in _LATER or value != usual[name]}

    def on(self, model: Any) -> ProbeSettings:
        """The same with the precision that measuring this model has."""
        return replace(self, precision=self.precision or compute.precision_of(model))


@dataclass(frozen=True)
class GenericText:
    """The generic probe: `texts` are measured whole, `prompts` completed by the base first, `own` written by it alone.

    One of the three. `prior`: of prompts that are the prior tasks' own.
    """

    texts: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    own: OwnTexts | None = None
    prior: PriorPrompts | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.texts, self.prompts, self.own))) != 1:
            raise RazorError(
                "A generic probe is texts or prompts, or what the base writes itself: one of the three, not both and "
                "not neither."
            )
        if self.prior and not self.prompts:
            raise RazorError("A generic probe of the prior tasks' prompts has prompts, and there are none.")
        if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
            wrong = next((text for text in self.texts if not isinstance(text, str)), self.texts)
            raise RazorError(f"A generic probe's texts are a tuple of strings, and {wrong!r:.60} is none.")

    @classmethod
    def built_in(cls) -> GenericText:
        """Sixty paragraphs on everyday topics that come with rlrazor."""
        return cls(tuple(paragraphs()))

    @classmethod
    def of_base(cls, *, samples: int = 64, max_new_tokens: int = 128, seed: int = 0) -> GenericText:
        """Texts that the base writes itself, from nothing: see `own_texts`."""
        return cls(own=OwnTexts(samples, max_new_tokens, seed))

    @classmethod
    def of_prior(cls, tasks: PriorTasks) -> GenericText:
        """The prior tasks' own prompts: see `prior_prompts`. Raises RazorError where their data cannot be had."""
        found = tasks.prompts(PROMPTS)
        whose = PriorPrompts(tuple(found.tasks), tuple(found.scored), without=tuple(found.without))
        return cls(prompts=tuple(found.prompts), prior=whose)

    @property
    def count(self) -> int:
        """How many texts, or prompts."""
        return self.own.samples if self.own else len(self.prompts or self.texts)

    @property
    def content_hash(self) -> str:
        """Of all that KL on it depends on, of texts of the base's own of how they are drawn: 16 hexadecimal digits."""
        form = self.prior and self.prior.max_new_tokens
        drawn = [*([asdict(self.own)] if self.own else []), *([{"plain": form}] if form else [])]
        return content_hash([self.texts, self.prompts, *drawn])

    def completed(self, settings: ProbeSettings) -> ProbeSettings:
        """How the base completes its prompts, each once, where `settings` are those of the new task's."""
        if self.prior is None or self.prior.max_new_tokens is None:
            return replace(settings, samples=1)
        return ProbeSettings(
            self.prior.max_new_tokens,
            chat=False,
            precision=settings.precision,
            chat_template_kwargs=settings.chat_template_kwargs,
        )

    def left_out(self, settings: ProbeSettings, measured: int) -> list[str]:
        """A sentence where so many are measured and there are more; `settings` are those of the new task's."""
        if (missing := self.count - measured) <= 0:
            return []
        why = "they have no two tokens" if self.texts else too_long(self.completed(settings))
        return [f"{missing} of the {self.count} rows of the generic probe are left out: {why}."]

    def cut(self, count: int, tokens: int | None = None) -> GenericText:
        """The first so many; what the base writes itself of so many tokens at most."""
        own = self.own and replace(
            self.own,
            samples=min(count, self.own.samples),
            max_new_tokens=min(tokens or self.own.max_new_tokens, self.own.max_new_tokens),
        )
        return GenericText(self.texts[:count], self.prompts[:count], own, self.prior)


def too_long(settings: ProbeSettings) -> str:
    """Why prompts that are completed so are not measured."""
    return f"they do not fit into the context with a completion of {settings.max_new_tokens} tokens"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of rows (`rows.read_located`) as `prompt_of` finds them, or else of a text with one a line.

    Repeated ones are dropped. Raises RazorError for a file that is missing, empty or damaged, and for a row that has no
    prompt or one that cannot be measured, saying which row and why.
    """
    found = []
    for where, row in read_located(path, line="prompt"):
        if given := given_in(row):
            row["images"] = images_of(given, path if path.is_dir() else path.parent, where)
        found.append(prompt_of(row, where))
    return _unique(found)


def read_generic(source: str | Path | PriorTasks) -> GenericText:
    """A generic probe of a file of rows with a column `text`, or else prompts, or of a text file with a text a line.

    Of prior tasks it is their prompts; of the word "self" what the base writes itself, of "paragraphs" the built-in
    ones; a file of such a name is given as a Path, or as ./self. Raises RazorError for "prior", which has to say whose.
    """
    if not isinstance(source, str | Path):
        return GenericText.of_prior(source)
    if source in WORDS:
        if source == PRIOR:
            raise RazorError(
                f"{PRIOR!r} is the prior tasks' own prompts, and which tasks these are is not known here: give a law "
                "that was calibrated on them, which holds them; in Python, the PriorTasks themselves; or a file."
            )
        return GenericText.built_in() if source == PARAGRAPHS else GenericText.of_base()
    rows = read_located(Path(source), line="text")
    if "text" not in rows[0][1]:
        if any(given_in(row) for _, row in rows):
            raise RazorError("A generic probe with images is not measured: leave the column out.")
        return GenericText(prompts=tuple(_unique([prompt_of(row, where) for where, row in rows])))
    for where, row in rows:
        if "text" not in row:
            raise RazorError(f"{where}: it needs a column `text`, as the rows before it; it has {', '.join(row)}.")
        check_text(row["text"], where)
    return GenericText(tuple(_unique([row["text"] for _, row in rows])))


def _unique(values: Sequence[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True, default=str): value for value in values}.values())


def content_hash(value: Any) -> str:
    """Of anything that JSON can hold: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def probe_hash(settings: ProbeSettings, generic: GenericText) -> str:
    """Of how KL is measured, the new task's prompts aside: KLs can be compared where it is the same."""
    return content_hash([settings.as_json(), generic.content_hash])


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: ProbeSettings,
    purpose: str | None,
    told: Told = unheard,
) -> list[list[int]]:
    """`settings.samples` completions of each prompt, drawn with a seed that the purpose decides; None: greedy.

    So every model that is asked for the same purpose draws with the same numbers.
    """
    longest = max(map(len, prompts)) + settings.max_new_tokens
    how = sampling.Sampling(
        settings.max_new_tokens,
        encoding.stop_ids(tokenizer, model, settings.stop),
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        samples=settings.samples,
        greedy=purpose is None,
        rng=torch.Generator(compute.device_of(model)).manual_seed(seed_of(0, f"measure/{purpose}")),
        chunk=max(1, min(AT_A_TIME, KEPT_TOKENS // longest)),
    )
    with compute.measuring(model, settings.precision):
        return sampling.sample(model, prompts, how, told)


def default_cache() -> Path:
    """Where tools keep the base's completions unless told otherwise."""
    return Path(platformdirs.user_cache_dir("rlrazor")) / "probes"


def of_prompts(
    base: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: ProbeSettings,
    *,
    purpose: str = NEW,
    cache_dir: Path | None = None,
    digest: str | None = None,
    told: Told = unheard,
) -> Sequences:
    """The probe of these prompts: each that fits into the context, with what the base says to it.

    Of a PEFT model the base is what is left without its adapter. Of conversations of which all turns are measured, the
    assistant's earlier turns are completions of what comes before each, as they are (`prompts.answers`).

    Completions come from `cache_dir`, if there is one, where the base, the prompts' tokens and the settings are the
    same; `digest` is the base's, where it is known. `told` hears how much of completing them is done. Raises RazorError
    where no prompt fits.
    """
    if not prompts:
        raise RazorError("There are no prompts to measure on: give at least one, and better a hundred.")
    settings = settings.on(base)
    template, limit = settings.chat_template_kwargs, context_length(base) or float("inf")
    ids = encode(tokenizer, prompts, settings.chat, template)
    given: list[list[tuple[list[int], list[int]]]] = [[] for _ in ids]
    if settings.turns == ALL:
        given = answers(tokenizer, prompts, encoding.stop_ids(tokenizer, base), template)
    every = [[*one, *(token for _, said in of for token in said)] for one, of in zip(ids, given, strict=True)]
    require_embeddings(unwrapped(base), tokenizer, every)
    fit = [
        max([len(prompt) + settings.max_new_tokens, *(len(before) + len(said) for before, said in of)]) <= limit
        for prompt, of in zip(ids, given, strict=True)
    ]
    fitting, given = list(compress(ids, fit)), list(compress(given, fit))
    if not fitting:
        what, mend = _SHORTER[purpose]
        raise RazorError(
            f"No {what} fits into the {limit} tokens of the model's context with a completion of "
            f"{settings.max_new_tokens}: {mend}."
        )
    if cache_dir is None:
        path = None
    else:
        ends = encoding.stop_ids(tokenizer, base, settings.stop)
        digest = digest or base_digest(base, settings.precision)
        shown = [one.digest for prompt in fitting if (one := seen(prompt)) is not None]
        decided = [SAMPLER, digest, fitting, ends, settings.as_json(), purpose, *([shown] if shown else [])]
        path = cache_dir / f"{content_hash(decided)}.json"

    def sampled() -> list[list[int]]:
        return complete(base, tokenizer, fitting, settings, purpose, told)

    count = len(fitting) * settings.samples
    return Sequences.grouped(fitting, _once(base, path, count, settings.max_new_tokens, sampled), given)


def of_generic(
    base: Any,
    tokenizer: Any,
    generic: GenericText,
    settings: ProbeSettings,
    *,
    cache_dir: Path | None = None,
    digest: str | None = None,
    told: Told = unheard,
) -> Sequences:
    """The generic probe: texts as `ids_of_texts` has them, prompts with one completion by the base, or its own texts.

    Those no stop string ends, as it is the new task's. Raises RazorError where nothing can be measured, or the base
    cannot write from nothing.
    """
    if generic.own is not None:
        settings = settings.on(base)
        return _written(base, tokenizer, generic.own, settings, cache_dir=cache_dir, digest=digest, told=told)
    if generic.prompts:
        how = generic.completed(settings)
        return of_prompts(
            base, tokenizer, generic.prompts, how, purpose=GENERIC, cache_dir=cache_dir, digest=digest, told=told
        )
    texts = [text for text in ids_of_texts(base, tokenizer, generic.texts) if len(text) > 1]
    require_embeddings(unwrapped(base), tokenizer, texts, "Text")
    if not texts:
        raise RazorError("No text of the generic probe has two tokens or more, so there is nothing to measure.")
    return Sequences.texts(texts)


def _written(
    base: Any,
    tokenizer: Any,
    how: OwnTexts,
    settings: ProbeSettings,
    *,
    cache_dir: Path | None,
    digest: str | None,
    told: Told,
) -> Sequences:
    """What the base writes from nothing; of a PEFT model without its adapter."""
    begun = own_texts.beginnings(base, tokenizer, settings.chat)
    ends, precision = encoding.stop_ids(tokenizer, base), settings.precision
    path = None
    if cache_dir is not None:
        decided = [SAMPLER, own_texts.AT_A_TIME, digest or base_digest(base, precision), begun, ends, precision]
        path = cache_dir / f"{content_hash([*decided, asdict(how)])}.json"

    def sampled() -> list[list[int]]:
        return own_texts.draw(base, begun, how, ends, precision, told)

    return own_texts.begun_with(begun, _once(base, path, how.samples, how.within(base, begun), sampled), how)


def cautions_of(base: Any, tokenizer: Any, generic: GenericText, sequences: Sequences) -> list[str]:
    """Sentences on what `of_generic` has drawn: where the base has written it itself, or prompts are scored."""
    if generic.prior is not None:
        return generic.prior.cautions()
    return own_texts.cautions(sequences, encoding.stop_ids(tokenizer, base)) if generic.own else []


def _once(
    base: Any, path: Path | None, count: int, longest: int, sampled: Callable[[], list[list[int]]]
) -> list[list[int]]:
    """So many completions of the base: those that are kept there, or else sampled now, and then kept."""
    tokens = embedding_rows(unwrapped(base)) or bounds.MOST_ROWS
    if path is not None and (kept := _cached(path, count, longest, tokens)) is not None:
        return kept
    with adapter_disabled(base):
        completions = sampled()
    if path is not None:
        write_cache(path, json.dumps(completions))
    return completions


def _cached(path: Path, count: int, longest: int, tokens: int) -> list[list[int]] | None:
    """None where it is not there, or holds anything but `count` completions of up to `longest` of so many `tokens`."""
    try:
        completions = parse_json(read_text(path), path)
    except RazorError:
        return None
    right = (
        isinstance(completions, list)
        and len(completions) == count
        and all(isinstance(row, list) and 0 < len(row) <= longest for row in completions)
        and all(type(token) is int and 0 <= token < tokens for row in completions for token in row)
    )
    return completions if right else None
