"""The final answer of a completion: what comes after the reasoning, and not what the reasoning mentions on its way."""

import re

# Longer than any final answer, short enough for the regular expressions: a verifier looks at no more than this many
# characters, counted from the end, since the end is where the final answer stands.
TAIL = 4000

_MARKER = re.compile(r"\\boxed\s*\{|####|\banswer\b[ \t*]*(?:\bis\b|[:=])", re.IGNORECASE)


def after_reasoning(completion: str) -> str:
    """The last TAIL characters of what follows `</think>`; nothing where reasoning was opened and not closed."""
    _, closed, after = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return ""
    return (after if closed else completion)[-TAIL:].strip()


def declared_answer(text: str) -> str | None:
    r"""What follows the last `\boxed{`, `####`, `answer is` or `answer:`; None where there is no such mark.

    Of a box its content, empty where it is not closed (cut off); of the others the rest of the line, or the next line.
    """
    marks = list(_MARKER.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :]
    if marks[-1].group().endswith("{"):
        return _until_closed(rest)
    return next((line.strip() for line in rest.lstrip(" \t:*").split("\n") if line.strip()), "")


def _until_closed(text: str) -> str:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position].strip()
    return ""
