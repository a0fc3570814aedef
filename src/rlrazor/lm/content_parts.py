"""Chat templates that show a content only where it is a list of parts, {"type": "text", "text": ...}.

Those of some models that see images (SmolVLM, Idefics) go through a content part by part, and make nothing, or single
letters, of a text. Which a template is, is found out by trying it, role by role, not by name. What is text is given as
one part to those alone: a template that takes both is given text, as it always was.
"""

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from rlrazor.lm import trials

_SAID = "quokka"  # in small letters, and no word of a template's own
_WRITTEN = re.compile(rf"""text\\*['"]:\s*\\*['"]{_SAID}""")  # behind the name of what it is in; twice in JSON with \\
_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {}}}
_known: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], bool]] = weakref.WeakKeyDictionary()


def as_shown(tokenizer: Any, turns: Sequence[Mapping[str, Any]], tools: Any = None) -> list[dict[str, Any]]:
    """The turns as the tokenizer's chat template shows them: as they are, or with what is text as a list of one part.

    `tools`: those of the conversation, for which a tokenizer may have a template of its own. Raises RazorError for a
    template that does not come to an end.
    """
    return [_shown(tokenizer, turn, tools) for turn in turns]


def texts_of(content: Any) -> list[str]:
    """What a content says as text, or the parts of it that are text."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if _is_text(part)]


def with_more(turn: Mapping[str, Any], more: str) -> dict[str, Any]:
    """The turn, saying more in each of its texts."""
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": content + more}
    parts = [{**part, "text": part["text"] + more} if _is_text(part) else part for part in content]
    return {**turn, "content": parts}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _shown(tokenizer: Any, turn: Mapping[str, Any], tools: Any) -> dict[str, Any]:
    content = turn.get("content")
    if isinstance(content, str) and _wants_parts(tokenizer, str(turn.get("role")), tools):
        return {**turn, "content": _one_part(content)}
    return dict(turn)


def _one_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _wants_parts(tokenizer: Any, role: str, tools: Any) -> bool:
    try:
        template = tokenizer.get_chat_template(None, tools)
    except Exception:  # it has none, as transformers will say; or a tokenizer that renders without Jinja
        return False
    if not isinstance(template, str) or "text" not in template:  # which whoever reads a part has to name
        return False
    known = _known.setdefault(tokenizer, {})
    if (template, role) not in known:
        known[template, role] = not _shows(tokenizer, template, role, _SAID) and _shows(
            tokenizer, template, role, _one_part(_SAID)
        )
    return known[template, role]


def _shows(tokenizer: Any, template: str, role: str, content: Any) -> bool:
    """Whether the template says what a turn of that role says, and not how Python or JSON would write it."""
    asked = [
        {"messages": turns, "tools": None, "add_generation_prompt": role != "assistant"}
        for turns in _conversations(role, content)
    ]
    trials.try_template(tokenizer, asked)
    return any(_says(tokenizer, template, one) for one in asked)


def _conversations(role: str, content: Any) -> list[list[dict[str, Any]]]:
    """With a turn of that role, where templates want one."""
    turn = {"role": role, "content": content}
    hi = _one_part("hi") if isinstance(content, list) else "hi"
    user = {"role": "user", "content": hi}
    if role == "user":
        return [[turn]]
    if role in ("system", "developer"):
        return [[turn, user]]
    if role == "tool":  # behind a call of it, as some insist; others know no calls
        answer = {**turn, "tool_call_id": "abcdefghi", "name": "add"}
        return [[user, {"role": "assistant", "content": hi, "tool_calls": [_CALL]}, answer], [user, turn]]
    return [[user, turn]]


def _says(tokenizer: Any, template: str, asked: Mapping[str, Any]) -> bool:
    given = dict(asked)
    try:
        text = str(
            tokenizer.apply_chat_template(given.pop("messages"), **given, chat_template=template, tokenize=False)
        )
    except Exception:  # a template may raise anything
        return False
    return _SAID in text and not _WRITTEN.search(text)
