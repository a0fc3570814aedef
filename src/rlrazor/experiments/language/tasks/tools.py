r"""ToolAlpaca (RR's tool-use task): the API calls in a completion against the reference calls.

A call is read by two regular expressions, as ToolAlpaca's own parser does (ReAct style):

    Action: searchAnime                       `_CALL`: at a line's start, possibly numbered; the name ends with the line
    Action Input: {"query": "Death Note"}     JSON, up to the next line that `_NEXT` finds: Action, Thought, Observation

A completion is right when its calls are the reference calls, none missing and none too many, in any order. Names are
compared without case. Arguments are compared as JSON after this normalisation: key order does not matter; text without
case, with runs of spaces as one; a number in quotes is that number, `"true"` is true; an argument that is null or empty
("", [], {}) is one not given. What the reference leaves open, `${animeId from searchAnime}`, matches anything, and so
does the question of a getDetails call, which asks the user. A reference call marked `[Optional]` may be made or not.

Known to go wrong: a list in another order, a synonym, another date format or another wording of a free-text argument
counts as a mistake; a default value spelled out differs from one left out. One reference is broken JSON (Auth0,
getUserProfile) and matches only itself. Six instructions of AviationAPI call functions that its documentation lacks.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.rows import field_of, held_out, list_of, of_rows, text_of
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task
from rlrazor.system.rows import Row, read_located

Call = tuple[str, Any]  # the name, and normalised arguments

LONGEST = 20_000  # characters; a longer completion is wrong (the longest reference has 749)

_CALL = re.compile(
    r"^[ \t]{0,8}(?:ASSISTANT )?Action ?\d{0,3} ?:[ \t]*(\S[^\n]*)\n\s*"
    r"(?:ASSISTANT )?Action ?\d{0,3} ?Input ?\d{0,3} ?:",
    re.MULTILINE,
)
_NEXT = re.compile(r"^[ \t]{0,8}(?:ASSISTANT )?(?:Action|Thought|Observation|Response|Final Answer)\b", re.MULTILINE)
_OPEN = re.compile(r'"?\$?\{[A-Za-z][^{}":,\n]{0,80}\}"?')  # ${x from y}, "{start date}"
_REPEATED_KEY = re.compile(r'("\w+":\s*)\1')  # "symbols": "symbols": [...], in four references
_NUMBER = re.compile(r"-?\d{1,30}(?:\.\d{1,30})?")

ANYTHING = "<left open>"

INSTRUCTION = """\
You can call the functions below. Write every call that the instruction needs, in this format and nothing after it:
Action: the function's name
Action Input: its arguments as one JSON object
Where an argument comes from the answer to an earlier call, write ${argument from function}.

getDetails: Ask the user for what the instruction leaves open.
Parameters: {"Question": "Required. string. What to ask."}
"""


def verify_tools(prompt: str, completion: str, *, calls: Sequence[Row]) -> float:
    """1.0 where the completion makes the reference `calls` (dicts of Action and Action_Input), 0.0 otherwise."""
    if len(completion) > LONGEST or ("<think>" in completion and "</think>" not in completion):
        return 0.0
    made = parse_calls(completion.rpartition("</think>")[2])
    required = [_reference(call) for call in calls if not call["Action"].startswith("[Optional]")]
    optional = [_reference(call) for call in calls if call["Action"].startswith("[Optional]")]
    spare = len(made) - len(required)
    if not made or not 0 <= spare <= len(optional):
        return 0.0
    # Every call made has to find its own reference call, and every required one to be found: an assignment.
    reference = required + optional
    misses = np.array([[not _matches(known, call) for known in reference] for call in made])
    unused = np.zeros((len(optional) - spare, len(reference)))
    unused[:, : len(required)] = 1
    cost = np.vstack([misses, unused])
    return float(cost[optimize.linear_sum_assignment(cost)].sum() == 0)  # type: ignore[attr-defined]


def parse_calls(text: str) -> list[Call]:
    """The calls of a completion, in order."""
    found = []
    for match in _CALL.finditer(text):
        following = _NEXT.search(text, match.end())
        arguments = text[match.end() : following.start() if following else len(text)]
        found.append(_call(match.group(1).strip(" \t`*\"'"), arguments))
    return found


def render_calls(calls: Sequence[Row]) -> str:
    """The completion that makes `calls`."""
    return "\n".join(
        f"Action: {call['Action'].removeprefix('[Optional]')}\nAction Input: {call['Action_Input']}" for call in calls
    )


def _reference(call: Row) -> Call:
    return _call(call["Action"].removeprefix("[Optional]"), call["Action_Input"])


def _call(name: str, arguments: str) -> Call:
    return name.casefold(), _normalised(_read(arguments))


def _read(arguments: str) -> Any:
    """Arguments as JSON, with what the data's references need; text that is no JSON stays text."""
    text = re.sub(r"^```\w*|```$|^`|`$", "", arguments.strip()).strip()
    text = _REPEATED_KEY.sub(r"\1", _OPEN.sub(f'"{ANYTHING}"', text))
    try:
        return json.JSONDecoder().raw_decode(text)[0]  # prose behind the object does not matter
    except (ValueError, RecursionError):
        return text


def _normalised(value: Any) -> Any:
    if isinstance(value, dict):
        pairs = ((str(key).casefold(), _normalised(inner)) for key, inner in value.items())
        return {key: inner for key, inner in pairs if inner not in ("", [], {}, None)}
    if isinstance(value, list):
        return [_normalised(inner) for inner in value]
    if isinstance(value, bool):
        return str(value).casefold()
    if value is None:
        return None
    text = " ".join(str(value).split()).casefold()
    # 3, "3" and 3.0 are one number; as text, so that long ids keep all their digits.
    return text.rstrip("0").rstrip(".") if "." in text and _NUMBER.fullmatch(text) else text


def _matches(known: Call, made: Call) -> bool:
    return known[0] == made[0] and (known[0] == "getdetails" or _fits(known[1], made[1]))


def _fits(known: Any, made: Any) -> bool:
    if known == ANYTHING:
        return True
    if isinstance(known, dict) and isinstance(made, dict):
        return known.keys() == made.keys() and all(_fits(known[key], made[key]) for key in known)
    if isinstance(known, list) and isinstance(made, list):
        return len(known) == len(made) and all(map(_fits, known, made))
    return bool(known == made)


def load_tools(path: Path | None) -> Splits:
    """ToolAlpaca's files, in the schema of its repository; a fifth of the APIs is held out, whole.

    Reference calls are the `Golden_Answers` of the evaluation files, or the steps of the training file's `Instances`.
    """
    if path is None:
        raise RazorError(
            "ToolAlpaca is not on the hub: its files are in the repository tangqiaoyu/ToolAlpaca on GitHub, under "
            "data. Download them and give --data FILE or FOLDER."
        )
    found = [pair for of_row in of_rows(read_located(path, "*.json*"), _items) for pair in of_row]
    return held_out([item for item, _ in found], [name for _, name in found])


def _items(row: Row) -> list[tuple[Item, str]]:
    """The instructions for an API, those without reference calls left out, and each time its name."""
    name = text_of(row, "Name")
    if "Golden_Answers" in row:
        instructions, answers = list_of(row, "Instructions"), list_of(row, "Golden_Answers")
        if len(instructions) != len(answers):
            raise RazorError(f"It has {len(instructions)} Instructions and {len(answers)} Golden_Answers.")
        numbers = range(len(answers))
        tasks = [(text_of(row, "Instructions", at), _calls(row, "Golden_Answers", at)) for at in numbers]
    else:
        numbers = range(len(list_of(row, "Instances")))
        tasks = [(text_of(row, "Instances", at, "input"), _steps(row, at)) for at in numbers]
    about = f"{INSTRUCTION}\n{text_of(row, 'NLDocumentation')}"
    return [
        (Item(f"{about}\n\nInstruction: {instruction}", {"calls": calls}, render_calls(calls)), name)
        for instruction, calls in tasks
        if calls
    ]


def _calls(row: Row, *keys: str | int) -> list[Row]:
    """The reference calls there, checked."""
    calls = list_of(row, *keys)
    for at in range(len(calls)):
        text_of(row, *keys, at, "Action")
        if not isinstance(field_of(row, *keys, at, "Action_Input"), str):
            raise RazorError(f"Its {'.'.join(map(str, keys))}.{at}.Action_Input has to be text, which holds JSON.")
    return calls


def _steps(row: Row, at: int) -> list[Row]:
    instance = field_of(row, "Instances", at)
    keys = ("Instances", at, "intermediate_steps")
    found: list[Row] = []
    for number in range(len(list_of(row, *keys)) if "intermediate_steps" in instance else 0):
        arguments = field_of(row, *keys, number, 0, 1)
        if not isinstance(arguments, str):
            raise RazorError(f"Its {'.'.join(map(str, keys))}.{number}.0.1 has to be text, which holds JSON.")
        found.append({"Action": text_of(row, *keys, number, 0, 0), "Action_Input": arguments})
    return found


TOOLS = Task(
    "tools",
    "ToolAlpaca (no hub; --data its files)",
    "instructions for an API; the calls are the reference calls; the reference calls",
    load_tools,
    verify_tools,
    Form(256),
)
