"""How the prompts that are measured on and the training set go together: none in both, and both in one form."""

import json
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import encoding
from rlrazor.lm.probes import ProbeSettings, Prompt, encode
from rlrazor.lm.prompts import parts_of, unheard

ROWS = 100_000  # of a training set that are looked at: more would take seconds
FEW_ROWS = 64  # ... and for the form that they are in
IDS = ("prompt_ids", "prompt_input_ids", "input_ids")  # what TRL's trainers leave of a row: DPO's, older ones', SFT's
COLUMNS = ("prompt", "text", "messages", *IDS)


def count_overlap(prompts: Sequence[Prompt], ids: Sequence[Collection[Sequence[int]]], dataloader: Any) -> int:
    """How many of the prompts are in the training set, as far as that can be seen.

    `ids`: of each prompt its tokens, in every form in which they may be trained on, such as with and without a chat
    template. A row has a prompt when its `prompt` is it, or its `text`, its `messages` or its token ids begin with it.
    A set that streams, or packs several rows into one, is not looked into: 0.
    """
    name, values = column(dataloader, COLUMNS)
    if name is None:
        return 0
    keys: list[set[Any]] = [
        {tuple(form) for form in forms} if name in IDS else {_said(parts_of(prompt)[0])}
        for prompt, forms in zip(prompts, ids, strict=True)
    ]
    wanted: set[Hashable] = set().union(*keys)
    lengths = sorted({len(key) for key in wanted})  # type: ignore[arg-type]
    found: set[Hashable] = set()
    for value in islice(values, ROWS):
        row = _tokens(value) if name in IDS else _said(value)
        if row is None:
            continue
        beginnings = [row] if name == "prompt" else [row[:length] for length in lengths]
        found |= wanted.intersection(beginnings)
    return sum(not key.isdisjoint(found) for key in keys)


def template_caution(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    settings: ProbeSettings,
    dataloader: Any = None,
    told: Mapping[str, Any] | None = None,
) -> str | None:
    """A sentence where prompts are measured in the chat template and trained on as plain text, or the other way round.

    Also where text that is in the template already is put into it again, where the trainer tells the template what the
    prompts do not (`told`: the `chat_template_kwargs` of GRPO's arguments), or where the template has no ear for what
    it is told (`prompts.unheard`). Judged by how the first rows of the training set begin; None where all is well, or
    cannot be seen: no template, one that puts nothing before what is said, or a set that streams.
    """
    openings = _openings(tokenizer) if getattr(tokenizer, "chat_template", None) else []
    if not openings:
        return None

    def in_template(row: Any) -> bool:
        """Whether text, or token ids, begin as the template does; turns are put into it."""
        ids = encoding.text_ids(tokenizer, row) if isinstance(row, str) else _tokens(row)
        if ids is None:
            return _said(row) is not None
        own = _own(tokenizer, ids)
        return any(own[: len(opening)] == opening for opening in openings)

    few = prompts[:FEW_ROWS]
    said = [parts_of(prompt)[0] for prompt in few]
    as_given = any(map(in_template, said))
    if settings.chat and any(isinstance(text, str) and in_template(text) for text in said):
        return (
            "The prompts are text in the tokenizer's chat template already, and are put into it again: measure with "
            "chat=False (--no-chat), or give them without it."
        )
    name, values = column(dataloader, (*IDS, "prompt", "messages", "text"))
    trained = [in_template(row) for row in islice(values, FEW_ROWS)] if name is not None else []
    measured = settings.chat or as_given
    if trained and measured and not any(trained):
        return (
            "The prompts are measured in the tokenizer's chat template, and the rows that are trained on do not begin "
            "as it does: KL is that of other prompts. Give them as text, and measure with chat=False (--no-chat)."
        )
    if any(trained) and not measured:
        return (
            "The prompts are measured as plain text, and the rows that are trained on are in the tokenizer's chat "
            "template: KL is that of other prompts. Measure with chat=True, or give them as conversations."
        )
    given = [{**settings.chat_template_kwargs, **parts_of(prompt)[1]} for prompt in prompts]
    if told and any(trained) and any({**one, **told} != one for one in given):
        return (
            f"The trainer gives the chat template {dict(told)}, and the prompts are measured without: give the same to "
            "ProbeSettings(chat_template_kwargs=...), or with the prompts in a column chat_template_kwargs."
        )
    return unheard(tokenizer, few, settings.chat, settings.chat_template_kwargs)


def cautions_of_rows(on: MeasuredOn, tokenizer: Any, dataloader: Any, told: Mapping[str, Any] | None) -> list[str]:
    """Sentences on how prompts and the rows that are trained on go together, as far as that can be seen."""
    try:
        told_all = on.settings.chat_template_kwargs
        forms = [encode(tokenizer, on.prompts, chat, told_all) for chat in {on.settings.chat, False}]
        shared = count_overlap(on.prompts, list(zip(*forms, strict=True)), dataloader)
        form = template_caution(on.prompts, tokenizer, on.settings, dataloader, told)
    except Exception as error:  # of a data set of the user's own
        return [f"whether the prompts are in the training set cannot be seen: {type(error).__name__}: {error}"]
    said = [] if form is None else [form]
    if shared:
        said = [
            f"{shared} of the {len(on.prompts)} prompts are in the training set: KL on them is larger than on prompts "
            "the model has not seen. Hold prompts out.",
            *said,
        ]
    return said


def column(dataloader: Any, names: Sequence[str]) -> tuple[str | None, Iterator[Any]]:
    """The first of these columns that the training set has, and its values; None where it cannot be looked into."""
    dataset = getattr(dataloader, "dataset", None)
    columns = getattr(dataset, "column_names", None) or ()
    name = next((name for name in names if name in columns), None)
    if dataset is None or name is None or not hasattr(dataset, "__len__"):
        return None, iter(())
    as_it_is = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset  # not as tensors
    return name, iter(as_it_is[name])


def _openings(tokenizer: Any) -> list[list[int]]:
    """What the chat template puts before the first words of a user, and of a system, as far as it takes them."""
    found = []
    asked = [
        [[{"role": role, "content": said} for role in roles] for said in "ab"]
        for roles in (("user",), ("system", "user"))
    ]
    try:
        encoding.try_turns(tokenizer, [(turns, {}) for pair in asked for turns in pair])
    except RazorError:
        return []
    for pair in asked:
        try:
            one, other = (_own(tokenizer, encoding.turns_ids(tokenizer, turns)) for turns in pair)
        except Exception:  # a template may raise anything
            continue
        shared = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        # A special token begins no plain text, and what follows it may differ: tools, dates.
        found += [one[: 1 if one[0] in tokenizer.added_tokens_decoder else shared]] if shared else []
    return found


def _own(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids without what begins every sequence, in a template or not."""
    first = next((at for at, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    return list(ids[first:])


def _tokens(value: Any) -> tuple[int, ...] | None:
    """Token ids; None for anything else."""
    return tuple(value) if isinstance(value, list) and all(isinstance(first, int) for first in value[:1]) else None


def _said(prompt: Any) -> str | None:
    """Text as it is; of a conversation what its user said first; None for anything else."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not all(isinstance(turn, Mapping) for turn in prompt):
        return None
    said = [turn.get("content") for turn in prompt if turn.get("role") == "user"]
    return _text(said[0] if said else None) or json.dumps(prompt, sort_keys=True, default=str)


def _text(content: Any) -> str | None:
    """The text of a content, which may be a list of parts; None where it has none or more than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return None
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None
