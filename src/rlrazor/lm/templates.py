"""Chat templates that are not ours: tried apart before this process renders them.

A template is a program, which a model's author or anyone on the way has written. It may loop for hours, fill the memory
or end the interpreter. So each conversation is first rendered in a process of its own, under limits; what comes to an
end there is then rendered by transformers as ever. What was tried once is not tried again.
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from rlrazor.apart import Apart, DeadlyError, NotLoadedError
from rlrazor.errors import RazorError

SECONDS = 10.0  # that a conversation may take; it takes a thousandth of one
MEMORY = 1 << 30  # bytes of address space, of which Python and Jinja take a tenth

_tried: set[bytes] = set()


def try_apart(tokenizer: Any, conversations: Sequence[Mapping[str, Any]]) -> None:
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


def _try(text: str, calls: Sequence[Mapping[str, Any]]) -> None:
    with closing(Apart("template", (text, SECONDS), seconds=SECONDS, deaths=1, memory=MEMORY)) as apart:
        try:
            wrong = next((answer.value for answer in apart.call([((), call) for call in calls]) if answer.value), None)
        except DeadlyError as error:
            wrong = f"{error} on a prompt"
        except (NotLoadedError, OSError):  # no processes here, or no Jinja in them
            return
    if wrong:
        raise RazorError(
            f"The tokenizer's chat template {wrong}, so it is not used: take the template of the model that this one "
            "was made from, or measure prompts as plain text (--no-chat, chat=False)."
        )
