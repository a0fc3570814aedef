"""Chat templates, tokenizers and patterns that came with a model: tried apart before this process uses them.

A template is a program, which a model's author or anyone on the way has written, and much of a tokenizer is regular
expressions. They may run for hours, fill the memory or end the interpreter. So a process of its own does first, under
limits, what libraries will do here: what comes to an end there is then done as ever. What was tried once is not tried
again.
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.system.apart import Answer, Apart, Call, DeadlyError, NotLoadedError

SECONDS = 10.0  # that a conversation may take; it takes a thousandth of one
# Bytes of address space: Python and Jinja take a tenth of it, the largest tokenizers a fifth.
MEMORY = {"template": 1 << 30, "patterns": 1 << 30, "tokenizer": 1 << 32}

_tried: set[bytes] = set()


def try_template(tokenizer: Any, conversations: Sequence[Mapping[str, Any]]) -> None:
    """Raise RazorError where the tokenizer's template does not come to an end on one of the conversations.

    Each is what the template is given: `messages`, `tools`, `add_generation_prompt` and so on. Errors that a template
    has are not looked at here: to render it is to see them.
    """
    by_template: dict[str, list[tuple[bytes, dict[str, Any]]]] = {}
    for variables in conversations:
        try:
            text = tokenizer.get_chat_template(None, variables.get("tools"))
            digest = hashlib.blake2b(pickle.dumps((text, variables)), digest_size=16).digest()
        except Exception:  # as transformers will say; or a tokenizer that renders without Jinja
            continue
        if isinstance(text, str) and digest not in _tried:
            special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
            by_template.setdefault(text, []).append((digest, {"documents": None, **special, **variables}))
    for text, calls in by_template.items():
        _try(text, [variables for _, variables in calls])
        _tried.update(digest for digest, _ in calls)


def _answers(role: str, what: Sequence[Any], calls: Sequence[Call]) -> list[Answer]:
    """Of a process of its own; none where there are no processes here, or no libraries in them. Raises DeadlyError."""
    quiet = role == "tokenizer"  # its library prints as it panics
    apart = Apart(role, what, seconds=SECONDS, deaths=1, memory=MEMORY[role], quiet=quiet)
    with closing(apart), suppress(NotLoadedError, OSError):
        return apart.call(calls)
    return []


def _try(text: str, calls: Sequence[Mapping[str, Any]]) -> None:
    try:
        answers = _answers("template", (text, SECONDS), [((), call) for call in calls])
        wrong = next((answer.value for answer in answers if answer.value), None)
    except DeadlyError as error:
        wrong = f"{error} on a prompt"
    if wrong:
        raise RazorError(
            f"The tokenizer's chat template {wrong}, so it is not used: take the template of the model that this one "
            "was made from, or measure prompts as plain text (--no-chat, chat=False)."
        )


def try_tokenizer(folder: Path) -> None:
    """Raise RazorError where a folder's tokenizer.json ends the process that reads it, or does not come to an end."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").digest()
    if digest in _tried:
        return
    try:
        answers = _answers("tokenizer", (str(path),), [((), {})])
        failure = next((answer.failure for answer in answers), None)
    except DeadlyError as error:
        failure = str(error)
    if failure is not None:
        raise RazorError(f"{path} cannot be used: reading a short text with it {failure}. Download it again.")
    _tried.add(digest)


def try_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise RazorError where matching regular expressions with a model's names of modules does not come to an end."""
    if not patterns:
        return
    try:
        _answers("patterns", (), [((list(patterns), list(names)), {})])
    except DeadlyError as error:
        raise RazorError(
            f"Matching the adapter's patterns, such as {patterns[0]!r:.100}, with the model's layers {error}: mend "
            "target_modules in its adapter_config.json."
        ) from error
