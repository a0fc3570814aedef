"""What a fine-tuned model is compared with its base on: prompts of the new task, and text that must not change.

Neither has labels. Of a prompt, completions are sampled from the base, once, with a seed of their own, and kept on disk
by the hash of all they depend on; of a text, every token is measured. A generic probe may also be prompts, completed by
the base: what a user has who kept the traffic but not the answers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from jinja2 import TemplateError

from rlrazor.errors import RazorError
from rlrazor.jsonl import read_rows
from rlrazor.lm import compute, encoding, sampling
from rlrazor.lm.adapters import adapter_disabled
from rlrazor.lm.kl import Sequences
from rlrazor.lm.models import base_digest, context_length
from rlrazor.lm.representation import paragraphs
from rlrazor.seeding import seed_of

NEW, GENERIC = "base", "probe"  # purposes: what the random streams of the two probes are called
SAMPLER = 2  # raise it when `sampling.sample` draws otherwise: what is in a cache was drawn by an older one
TEXT_TOKENS = 512  # of a text that are measured: a long document should not outweigh a hundred short ones

Prompt = str | Sequence[dict[str, Any]]
"""Text, or the messages of a conversation, which the tokenizer's chat template turns into text."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe's prompts are completed. Two measurements can be compared only where these are the same.

    `samples`: completions of each prompt. `stop`: strings that end one, beside the model's own end of sequence. `chat`:
    whether a prompt that is plain text is put into the user's turn of the tokenizer's chat template, where it has one.
    `precision`: what models compute in as they are measured (`compute.measuring`); None: what their weights are.
    """

    max_new_tokens: int = 128
    samples: int = 1
    stop: tuple[str, ...] = ()
    chat: bool = True
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1:
            raise RazorError("max_new_tokens and samples must be at least 1.")
        if self.precision not in (None, *compute.PRECISIONS):
            raise RazorError(f"The precision is one of {', '.join(compute.PRECISIONS)}, not {self.precision}.")

    def on(self, model: Any) -> ProbeSettings:
        """The same with the precision that measuring this model has."""
        return replace(self, precision=self.precision or compute.precision_of(model))


@dataclass(frozen=True)
class GenericText:
    """The generic probe: `texts` are measured whole, `prompts` completed by the base first. One of them is empty."""

    texts: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.texts) == bool(self.prompts):
            raise RazorError("A generic probe is texts or prompts, not both and not neither.")

    @classmethod
    def built_in(cls) -> GenericText:
        """Sixty paragraphs on everyday topics that come with rlrazor."""
        return cls(tuple(paragraphs()))

    @property
    def content_hash(self) -> str:
        """Of all of it: 16 hexadecimal digits."""
        return content_hash([self.texts, self.prompts])


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON Lines file with a field `prompt`, or else of a text file with one a line.

    A prompt is text or a list of messages. Repeated ones are dropped. Raises RazorError for a file that is missing,
    empty, or has a row without a prompt.
    """
    return _unique(_field(path, "prompt"), path)


def read_generic(path: Path) -> GenericText:
    """A generic probe of a JSON Lines file with a field `text`, or `prompt`, or else of a text file with one a line."""
    if path.exists() and _is_json(path) and "text" not in read_rows(path)[0]:
        return GenericText(prompts=tuple(read_prompts(path)))
    texts = [text for text in _unique(_field(path, "text"), path) if isinstance(text, str)]
    return GenericText(tuple(texts))


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")


def _field(path: Path, name: str) -> list[Any]:
    if _is_json(path):
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            if not _is_prompt(row.get(name)):
                raise RazorError(f"{path}, row {number}: it needs a field {name!r} with text; it has {', '.join(row)}.")
            _check_unicode(row[name], f"{path}, row {number}")
        return [row[name] for row in rows]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise RazorError(f"There is no {path}: give a JSON Lines file, or one {name} a line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RazorError(
            f"{path} cannot be read as text: {error}. Give a JSON Lines file, or one {name} a line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value)
    )


def _check_unicode(prompt: Prompt, where: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    texts = [prompt] if isinstance(prompt, str) else [str(turn.get("content")) for turn in prompt]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RazorError(
            f"{where}: the text is not valid Unicode ({error.reason}): mend it, or leave it out."
        ) from error


def _unique(values: Sequence[Any], path: Path) -> list[Any]:
    if not values:
        raise RazorError(f"{path} is empty: it needs at least one line.")
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def content_hash(value: Any) -> str:
    """Of anything that JSON can hold: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def probe_hash(settings: ProbeSettings, generic: GenericText) -> str:
    """Of how KL is measured, the new task's prompts aside: KLs can be compared where it is the same."""
    return content_hash([asdict(settings), generic.content_hash])


def encode(tokenizer: Any, prompts: Sequence[Prompt], chat: bool) -> list[list[int]]:
    """Token ids of each prompt. Raises RazorError for one that is empty, or that the chat template does not take."""
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) and not _is_prompt(prompt):
            raise RazorError(f"Prompt {number} is neither text nor a list of turns, each with a role and a content.")
        _check_unicode(prompt, f"Prompt {number}")
        rows.append(_ids(tokenizer, prompt, chat))
        if not rows[-1]:
            raise RazorError(f"Prompt {number} is empty: it has no tokens. Leave it out.")
    return rows


def _ids(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    if not isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        raise RazorError(
            "A prompt is a conversation, and the tokenizer has no chat template to turn it into text: give prompts as "
            "text, or a tokenizer with a template."
        )
    try:
        if isinstance(prompt, str):
            return encoding.prompt_ids(tokenizer, prompt, chat=chat)
        turns = list(prompt)
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RazorError(
            f"The tokenizer's chat template does not take a prompt ({error}): a conversation is a list of turns, each "
            "with a `role` and a `content`."
        ) from error


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: ProbeSettings,
    purpose: str | None,
) -> list[list[int]]:
    """`settings.samples` completions of each prompt, drawn with a seed that the purpose decides; None: greedy.

    So every model that is asked for the same purpose draws with the same numbers.
    """
    rng = torch.Generator(next(model.parameters()).device).manual_seed(seed_of(0, f"measure/{purpose}"))
    with compute.measuring(model, settings.precision or compute.precision_of(model)):
        return sampling.sample(
            model,
            prompts,
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=encoding.stop_ids(tokenizer, model, settings.stop),
            pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            greedy=purpose is None,
            rng=rng,
        )


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
) -> Sequences:
    """The probe of these prompts: each that fits into the context, with what the base says to it.

    Of a PEFT model the base is what is left without its adapter.

    Completions come from `cache_dir`, if there is one, where the base, the prompts' tokens and the settings are the
    same. Raises RazorError where no prompt fits.
    """
    if not prompts:
        raise RazorError("There are no prompts to measure on: give at least one, and better a hundred.")
    settings = settings.on(base)
    ids = encode(tokenizer, prompts, settings.chat)
    limit = context_length(base) or float("inf")
    fitting = [prompt for prompt in ids if len(prompt) + settings.max_new_tokens <= limit]
    if not fitting:
        raise RazorError(
            f"No prompt fits into the {limit} tokens of the model's context with a completion of "
            f"{settings.max_new_tokens}: shorten the prompts, or lower max_new_tokens."
        )
    if cache_dir is None:
        with adapter_disabled(base):
            return Sequences.grouped(fitting, complete(base, tokenizer, fitting, settings, purpose))
    ends = encoding.stop_ids(tokenizer, base, settings.stop)
    key = content_hash([SAMPLER, base_digest(base, settings.precision), fitting, ends, asdict(settings), purpose])
    path = cache_dir / f"{key}.json"
    completions = _cached(path, len(fitting) * settings.samples)
    if completions is None:
        with adapter_disabled(base):
            completions = complete(base, tokenizer, fitting, settings, purpose)
        # A cache that cannot be written costs time, not results. Several processes may be writing the same.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as own:
                partial = Path(own) / path.name
                partial.write_text(json.dumps(completions))
                partial.replace(path)
    return Sequences.grouped(fitting, completions)


def of_generic(
    base: Any, tokenizer: Any, generic: GenericText, settings: ProbeSettings, *, cache_dir: Path | None = None
) -> Sequences:
    """The generic probe: texts whole, up to TEXT_TOKENS or the context, or prompts with one completion by the base."""
    if generic.prompts:
        single = replace(settings, samples=1)
        return of_prompts(base, tokenizer, generic.prompts, single, purpose=GENERIC, cache_dir=cache_dir)
    longest = min(TEXT_TOKENS, context_length(base) or TEXT_TOKENS)
    texts = [list(tokenizer(text)["input_ids"])[:longest] for text in generic.texts]
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise RazorError("No text of the generic probe has two tokens or more, so there is nothing to measure.")
    return Sequences.texts(texts)


def _cached(path: Path, count: int) -> list[list[int]] | None:
    """None where it is not there, or not whole."""
    try:
        completions = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    right = isinstance(completions, list) and len(completions) == count
    if not right or not all(isinstance(row, list) and all(type(token) is int for token in row) for row in completions):
        return None
    return [list(row) for row in completions]
