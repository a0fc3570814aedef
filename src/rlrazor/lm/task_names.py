"""The names of lm-eval's tasks, read off its files: importing it, and letting it make its own index, takes a minute.

A task, a group or a tag is named in a line of a YAML file, or of one without a suffix that others include.
"""

import difflib
import functools
import os
import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from rlrazor.errors import RazorError

DEFAULT_TASKS = ("hellaswag", "truthfulqa_mc2", "mmlu", "ifeval", "winogrande", "humaneval")
RUNS_MODEL_CODE = "humaneval"
NONE = "none"  # in place of their names: no prior task is scored
# In place of a file of generic text: what the base writes itself, the prior tasks' own prompts, the built-in texts.
SELF, PRIOR, PARAGRAPHS = WORDS = ("self", "prior", "paragraphs")
LAST, ALL = TURNS = ("last", "all")  # which of the assistant's turns in a conversation are measured
# How prior tasks are put into the chat template: not, each example a turn of the conversation, all in the user's turn.
NOT_IN, AS_TURNS, IN_ONE_TURN = CHAT_FORMS = ("no", "turns", "one-turn")

_NAMED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?\s*:[ \t]*(.*(?:\n[ \t]*- .*)*)", re.MULTILINE)
_NAME = re.compile(r"\w[^\s\"',\[\]#]*")


def are_none(tasks: Sequence[str]) -> bool:
    """Whether they are NONE. Raises RazorError where it stands beside a task."""
    if NONE in tasks and len(tasks) > 1:
        raise RazorError(f"Prior tasks are named, or {NONE!r} stands alone: no task is scored then.")
    return tuple(tasks) == (NONE,)


def check_names(tasks: Sequence[str]) -> None:
    """Raise RazorError for one that is neither a task of lm-eval's nor a YAML file, with the names most like it."""
    for name in tasks:
        if name in DEFAULT_TASKS or not (known := known_names()) or name in known or Path(name).is_file():
            continue
        raise unknown_task(name, known)


def unknown_task(name: str, known: Collection[str]) -> RazorError:
    """The error for a name that is none of those."""
    near = difflib.get_close_matches(name, known)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
    return RazorError(f"lm-eval has no task {name}. {hint}")


@functools.cache
def known_names() -> frozenset[str]:
    """All names of the installed lm-eval, and a few words that are none; none where it is not installed."""
    try:
        found = find_spec("lm_eval")
    except (ImportError, ValueError):  # a finder that refuses it
        found = None
    names: set[str] = set()
    for package in (found.submodule_search_locations or ()) if found else ():
        for folder, _, files in os.walk(os.path.join(package, "tasks")):
            for file in files:
                if "yaml" in file or "." not in file:
                    names.update(_names_in(os.path.join(folder, file)))
    return frozenset(names)


def _names_in(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError:
        return []
    return [name for found in _NAMED.findall(text) for name in _NAME.findall(found.decode(errors="replace"))]
