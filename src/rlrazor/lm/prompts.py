"""A prompt of the new task: what it may be, what is wrong with what is none, and the tokens that it is measured as.

The same as TRL's trainers make of the same row: text, a conversation, one that ends with words of the assistant's, to
be continued, one with tools; never with what the tokenizer puts behind a text.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import encoding
from rlrazor.system.documents import is_utf8, loads

if TYPE_CHECKING:
    from rlrazor.lm.images import ImageFile  # which imports torch

_MISSING = ("nan", "NaN", "null", "NULL", "None", "<NA>", "NA", "N/A", "#N/A")
_TURNS_AS_TEXT = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from)["']\s*:""")  # of JSON, or as Python writes it

# What `apply_chat_template` takes beside what it tells the template.
_TAKEN = frozenset(
    {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "sanitize_control_tokens"}
)

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text; or the turns of a conversation, which the tokenizer's chat template turns into text; or, where that template is
told more, a mapping of `prompt`, one of the two, `tools`, `chat_template_kwargs` and `images`, as TRL has columns."""


def given_in(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row has in TRL's column `images`, or else in its `image`: none where both are missing or empty."""
    return many(row.get("images")) or many(row.get("image"))


def many(value: Any) -> tuple[Any, ...]:
    """What may be one or a list, without those that are null."""
    return tuple(one for one in (value if isinstance(value, list | tuple) else [value]) if one is not None)


def prompt_of(row: Mapping[str, Any], where: str = "A row") -> Prompt:
    """The prompt of a row in one of TRL's formats: its `prompt`, or its `messages` up to the assistant's last turn.

    With `tools` (JSON schemas, or text with them) and `chat_template_kwargs`, which go with it into the chat template;
    beside a prompt that is text, other things that a data set may call `tools` are left out. Raises RazorError.
    """
    if "prompt" in row:
        prompt = row["prompt"]
    elif "messages" in row:
        prompt = _before_the_answer(row["messages"], where)
    else:
        raise RazorError(
            f"{where}: it needs a column `prompt` (text, or a list of turns) or `messages` (turns); it has "
            f"{', '.join(map(str, row)) or 'none'}."
        )
    tools, told = _as_json(row.get("tools")), _as_json(row.get("chat_template_kwargs"))
    if isinstance(prompt, str) and not _are_schemas(tools):
        tools = None
    held = (("tools", tools), ("chat_template_kwargs", told), ("images", given_in(row)))
    beside = {name: value for name, value in held if value}
    found: Prompt = {"prompt": prompt, **beside} if beside else prompt
    check(found, where)
    return found


def _before_the_answer(messages: Any, where: str) -> Any:
    """Turns before the last that is the assistant's; all of them where none is."""
    if not isinstance(messages, list | tuple) or not all(isinstance(turn, Mapping) for turn in messages):
        raise RazorError(f"{where}: its `messages` are no list of turns, each with a `role` and a `content`.")
    answers = [at for at, turn in enumerate(messages) if turn.get("role") == "assistant"]
    if answers[-1:] == [0]:
        raise RazorError(f"{where}: its `messages` begin with the assistant's only turn, so there is no prompt.")
    return list(messages[: answers[-1]] if answers else messages)


def _as_json(value: Any) -> Any:
    """What text holds as JSON, as tables have it; anything else, and text that is none, as it is."""
    try:
        return loads(value, nan=float) if isinstance(value, str) else value
    except ValueError:
        return value


def _are_schemas(tools: Any) -> bool:
    return isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)


def parts_of(prompt: Prompt) -> tuple[str | Sequence[Mapping[str, Any]], dict[str, Any]]:
    """A prompt's text or turns, and what the chat template is given beside."""
    if not isinstance(prompt, Mapping):
        return prompt, {}
    tools, told = (_as_json(prompt.get(name)) for name in ("tools", "chat_template_kwargs"))
    return prompt["prompt"], {**(told or {}), **({"tools": tools} if tools else {})}


def texts_of(prompt: Prompt) -> list[str]:
    """What is said in a prompt: its text, or that of its turns, those that only call a tool left out."""
    said, _ = parts_of(prompt)
    if isinstance(said, str):
        return [said]
    parts = [_said_in(turn.get("content")) for turn in said]
    return ["".join(texts) for texts in parts if texts]


def _said_in(content: str | Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The texts in a turn's content; of a place for an image none."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if isinstance(part.get("text"), str)]


def last_said(prompt: Prompt) -> str:
    """What the user says last: the text, or of turns the user's last, or where none is the user's the last of all."""
    said, _ = parts_of(prompt)
    if isinstance(said, str):
        return said
    turns = [turn for turn in said if turn.get("role") == "user"] or said
    return (texts_of(turns[-1:]) or [""])[0]


def check(prompt: Any, where: str) -> None:
    """Raise RazorError where this is no Prompt."""
    said = prompt
    if isinstance(prompt, Mapping):
        more = sorted(map(str, set(prompt) - {"prompt", "tools", "chat_template_kwargs", "images"}))
        if more or "prompt" not in prompt:
            raise RazorError(
                f"{where}: a prompt is text, a list of turns, or a mapping of prompt, tools, chat_template_kwargs and "
                f"images; "
                f"this is one of {', '.join(map(str, prompt)) or 'nothing'}. `prompts.prompt_of` makes one of a row."
            )
        if not _are_schemas(_as_json(prompt.get("tools")) or ()):
            raise RazorError(f"{where}: its `tools` are no list of JSON schemas, such as get_json_schema makes.")
        check_template_kwargs(_as_json(prompt.get("chat_template_kwargs")) or {}, f"{where}: its")
        said = prompt["prompt"]
        if not _are_read(prompt.get("images", ())):
            raise RazorError(f"{where}: its `images` are not read yet: `images.images_of` reads them.")
    seen = isinstance(prompt, Mapping) and bool(prompt.get("images"))
    wrong = _wrong_with_text(said) if isinstance(said, str) else _wrong_with_turns(said, seen=seen)
    if wrong is not None:
        raise RazorError(f"{where}: the prompt {wrong}. Mend it, or leave it out.")
    check_unicode(prompt, where)


def _are_read(images: Sequence[Any]) -> bool:
    if not images:
        return True
    from rlrazor.lm.images import ImageFile

    return all(isinstance(image, ImageFile) for image in images)


def check_template_kwargs(told: Any, whose: str) -> None:
    """Raise RazorError where these are no names and values that a chat template can be told."""
    if not isinstance(told, Mapping) or not all(isinstance(name, str) for name in told):
        raise RazorError(f"{whose} `chat_template_kwargs` are no object of names and values.")
    if taken := [name for name in told if name in _TAKEN]:
        raise RazorError(
            f"{whose} `chat_template_kwargs` have {taken[0]!r}, which is not told to a chat template but decides how "
            "one is used, and that is settled here: leave it out."
        )
    check_unicode(told, whose)


def template_kwargs(text: str | None) -> dict[str, Any]:
    """What an option says, as JSON. Raises RazorError for what is no object of names and values."""
    try:
        told = loads(text or "{}")
    except ValueError as error:
        raise RazorError(
            f'What the chat template is told is an object in JSON, such as {{"enable_thinking": false}}: {error}.'
        ) from error
    check_template_kwargs(told, "The")
    return dict(told)


def is_prompt(value: Any) -> bool:
    """Whether `check` takes it."""
    try:
        check(value, "")
    except RazorError:
        return False
    return True


def check_text(text: Any, where: str) -> None:
    """Raise RazorError where this is no text that says something."""
    wrong = _wrong_with_text(text) if isinstance(text, str) else _name_of(text)
    if wrong is not None:
        raise RazorError(f"{where}: the text {wrong}. Mend it, or leave it out.")
    check_unicode(text, where)


def _wrong_with_text(text: str) -> str | None:
    if not text.strip():
        return _name_of(text)
    if text.strip() in _MISSING:
        return f"is {text.strip()!r}, as a missing value is written"
    if _TURNS_AS_TEXT.match(text):
        return "is a conversation written as text: give its turns as a list, in JSON Lines or Parquet"
    return None


def _wrong_with_turns(turns: Any, *, seen: bool = False) -> str | None:
    if not isinstance(turns, list | tuple):
        return f"{_name_of(turns)}, neither text nor a list of turns"
    if not turns:
        return "is a list of nothing"
    for number, turn in enumerate(turns, 1):
        if (wrong := _wrong_with_turn(turn, seen=seen)) is not None:
            return f"is a conversation whose turn {number} {wrong}"
    if turns[-1]["role"] == "assistant" and turns[-1].get("content") is None:
        return "is a conversation that ends with a call of a tool, which not the model answers: end it before, or after"
    return None


def _wrong_with_turn(turn: Any, *, seen: bool) -> str | None:
    if not isinstance(turn, Mapping):
        return f"{_name_of(turn)}, where an object with `role` and `content` is needed"
    if {"from", "value"} <= set(turn):
        return "has `from` and `value`: call them `role` and `content`, as the chat template does"
    if not isinstance(turn.get("role"), str):
        return f"has no `role`; it has {', '.join(map(str, turn)) or 'nothing'}"
    content = turn.get("content")
    if content is None:
        return None if turn.get("tool_calls") else "has neither `content` nor `tool_calls`"
    if isinstance(content, str):
        return None
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return f"has a `content` that {_name_of(content)}"
    kinds = {str(part.get("type")) for part in content if not isinstance(part.get("text"), str)}
    kinds -= {"image"} if seen else set()
    return f"holds more than text ({', '.join(sorted(kinds))}), which is not measured" if kinds else None


def _name_of(value: Any) -> str:
    """What stands where text should."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        return "is text" if value.strip() else "is blank"
    if isinstance(value, bool):
        return f"is {str(value).lower()}"
    if isinstance(value, float) and value != value:
        return "is NaN"
    if isinstance(value, int | float):
        return f"is the number {value}"
    return "is an object" if isinstance(value, Mapping) else f"is of type {type(value).__name__}"


def check_unicode(prompt: Prompt | Mapping[str, Any], where: str) -> None:
    """Raise RazorError for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    if not is_utf8(json.dumps(prompt, ensure_ascii=False, default=str)):
        raise RazorError(f"{where}: the text is not valid Unicode (surrogates not allowed): mend it, or leave it out.")


NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class _Given:
    """A prompt as the tokenizer is given it: text, or turns and what the chat template is told beside."""

    said: str | Sequence[Mapping[str, Any]]
    template: dict[str, Any]
    where: str
    images: "tuple[ImageFile, ...]" = ()
    chat: bool = False

    @property
    def is_asked(self) -> bool:
        """Whether the tokenizer's own template turns it into text."""
        return not self.images and not isinstance(self.said, str)


def encode(tokenizer: Any, prompts: Sequence[Prompt], chat: bool, told: Mapping[str, Any] = NOTHING) -> list[list[int]]:
    """Token ids of each prompt. `told`: what the chat template is told of each that does not say otherwise itself.

    Raises RazorError for one that is empty, or that the chat template does not take or makes nothing of.
    """
    given = _given(tokenizer, prompts, chat, told)
    encoding.try_turns(tokenizer, [(one.said, one.template) for one in given if one.is_asked])  # type: ignore[misc]
    return [_ids(tokenizer, one) for one in given]


def answers(
    tokenizer: Any, prompts: Sequence[Prompt], ends: Collection[int], told: Mapping[str, Any] = NOTHING
) -> list[list[tuple[list[int], list[int]]]]:
    """Of each prompt that is a conversation the turns that the assistant has had in it, but for one to be continued.

    Each as token ids: what comes before it in the conversation, and what the assistant says there; see
    `encoding.answer_ids`, which `ends` is for. None of a text, nor of one that the assistant begins. Raises RazorError
    where the chat template does not tell which tokens these are.
    """
    conversations: list[list[_Given]] = []
    for one in _given(tokenizer, prompts, False, told):
        if one.images:
            raise RazorError(f"{one.where} has images, and with them last turns alone are measured: --turns last.")
        turns = [] if isinstance(one.said, str) else one.said[:-1]
        spoke = [at for at, turn in enumerate(turns) if at and turn["role"] == "assistant"]
        conversations.append([replace(one, said=turns[: at + 1]) for at in spoke])
    encoding.try_answers(tokenizer, [(one.said, one.template) for of in conversations for one in of])  # type: ignore[misc]
    return [[_answer(tokenizer, one, ends) for one in of] for of in conversations]


def unheard(tokenizer: Any, prompts: Sequence[Prompt], chat: bool, told: Mapping[str, Any] = NOTHING) -> str | None:
    """A sentence where the chat template makes the same of a prompt whatever tools or other things it is told."""
    given = [one for one in _given(tokenizer, prompts, chat, told) if one.is_asked]
    for name in dict.fromkeys(name for one in given for name in one.template):
        having = [one for one in given if name in one.template]
        without = [
            replace(one, template={key: value for key, value in one.template.items() if key != name}) for one in having
        ]
        encoding.try_turns(tokenizer, [(one.said, one.template) for one in without])  # type: ignore[misc]
        try:
            if any(_ids(tokenizer, one) != _ids(tokenizer, other) for one, other in zip(having, without, strict=True)):
                continue
        except RazorError:  # it cannot do without
            continue
        of = "the prompts" if len(having) == len(prompts) else f"{len(having)} of the {len(prompts)} prompts"
        what = "the `tools`" if name == "tools" else f"`{name}`"
        return f"The chat template says nothing of {what} that {of} come with: they are measured as without."
    return None


def as_text(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt as text: what it says, or a conversation as the chat template shows it. Raises as `encode` does."""
    (one,) = _given(tokenizer, [prompt], False, NOTHING)
    if isinstance(one.said, str):
        return one.said
    with _clear_errors(tokenizer, one):
        return encoding.turns_text(tokenizer, one.said, **one.template)


def _given(tokenizer: Any, prompts: Sequence[Prompt], chat: bool, told: Mapping[str, Any]) -> list[_Given]:
    """Raises RazorError for what is no prompt, and for a conversation without a template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    given = []
    for number, prompt in enumerate(prompts, 1):
        check(prompt, f"Prompt {number}")
        said, own = parts_of(prompt)
        template, images = {**told, **own}, prompt.get("images", ()) if isinstance(prompt, Mapping) else ()
        if images:
            pass  # the processor puts it into its own template
        elif isinstance(said, str):
            said = [{"role": "user", "content": said}] if chat and has_template else said
        elif has_template:
            said = _without_none(said)
        else:
            raise RazorError(
                f"Prompt {number} is a conversation, and the tokenizer has no chat template to turn it into text: give "
                "prompts as text, or a tokenizer with a template."
            )
        given.append(_Given(said, template, f"Prompt {number}", tuple(images), chat))
    return given


def _without_none(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As newer versions of transformers have turns: a key without a value is none."""
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


def _ids(tokenizer: Any, one: _Given) -> list[int]:
    if one.images:
        from rlrazor.lm.images import encode as encode_seen

        return encode_seen(tokenizer, one.said, one.images, one.template, one.where, chat=one.chat)
    with _clear_errors(tokenizer, one):
        if isinstance(one.said, str):
            ids = encoding.text_ids(tokenizer, one.said)
        else:
            ids = encoding.turns_ids(tokenizer, one.said, **one.template)
    if not ids:
        raise RazorError(f"{one.where} is empty: it has no tokens. Leave it out.")
    return ids


def _answer(tokenizer: Any, one: _Given, ends: Collection[int]) -> tuple[list[int], list[int]]:
    assert not isinstance(one.said, str)
    try:
        return encoding.answer_ids(tokenizer, one.said, ends, **one.template)
    except RazorError:
        raise
    except Exception as error:  # a template may raise anything
        raise RazorError(
            f"Which tokens the assistant says in turn {len(one.said)} of {one.where} cannot be told by the tokenizer's "
            f"chat template ({cause_of(error).rstrip('.')}): measure last turns alone (--turns last), or take a "
            "template that marks them ({% generation %}), as TRL has for training."
        ) from error


@contextmanager
def _clear_errors(tokenizer: Any, one: _Given) -> Iterator[None]:
    """Say in one sentence what a chat template does not take of a conversation: tools, a system's turn, or all."""
    try:
        yield
    except RazorError:
        raise
    except Exception as error:  # a template may raise anything
        why = cause_of(error).rstrip(".")
        turns = [turn for turn in one.said if isinstance(turn, Mapping)]
        others = [turn for turn in turns if turn["role"] not in ("system", "developer")]
        if "tools" in one.template and _takes(tokenizer, turns, {**one.template, "tools": None}):
            raise RazorError(
                f"The tokenizer's chat template does not take the tools of {one.where} ({why}): leave `tools` out, or "
                "take a template that knows them."
            ) from error
        if 0 < len(others) < len(turns) and _takes(tokenizer, others, one.template):
            raise RazorError(
                f"The tokenizer's chat template does not take a system's turn, as {one.where} has one ({why}): put "
                "what it says at the beginning of the user's first turn, or leave it out."
            ) from error
        raise RazorError(
            f"The tokenizer's chat template does not take a prompt ({why}): {one.where} is given to it as a list of "
            "turns, each with a `role` and a `content`."
        ) from error


def _takes(tokenizer: Any, turns: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> bool:
    try:
        return bool(encoding.turns_ids(tokenizer, turns, **template))
    except Exception:  # a template may raise anything
        return False
