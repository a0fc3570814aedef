"""What a generated text answers, whatever its template: the same generation, read once more by one that forgives.

A task's own parser looks for one form ("#### 18"). A model that was taught another ("The answer is 18.") fails it and
has forgotten nothing. Which parser forgives, by the first of these that a task has:

- a filter of the task's own that is called flexible, as GSM8K's `flexible-extract`;
- the metric `math_verify` beside exact match, as in Minerva's tasks;
- ours, of tasks that generate a text and are scored by exact match: `answer_in`.

An item that the strict parser counts is counted by the forgiving one too, so a score can only rise. IFEval, whose task
is the form, is scored by no exact match and so has none; nor has a task whose answers are choices, where nothing is
parsed. Left out: asking again in another template. One generation is read twice, so an answer that a task's stop string
cut off is missed by both.
"""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rlrazor.lm.final_answers import after_reasoning, declared_answer
from rlrazor.lm.harness.questions import Row, item_name
from rlrazor.lm.harness.tasks import Task
from rlrazor.lm.scores import Robust

FLEXIBLE = "flexible"
VERIFIED = "math_verify"
EXACT = "exact_match"
OURS = "declared answer, last number or option letter"

_NUMBER = re.compile(  # no part of a fraction
    r"(?:(?<![\w.)])-)?\$?(?<![\d/])(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)(?!\d|\s?/\s?\d)"
)
_TARGET = re.compile(r"\(?([A-Z])\)?")  # an option letter, as the answer to a question
_LETTER = re.compile(r"((?i:option|choice)\s+)?[\s*(\[{\"'$]*(?:\\text\{)?\(?([A-Z])(?![A-Za-z0-9])")
# "A triangle": an article before a noun, not an option that something is said of.
_ARTICLE = re.compile(
    r"A\s+(?!(?:is|was|as|because|since|due|for|and|or|but|not|if|in|on|at|by|to|with|from|of|when|while|where|which|that|"
    r"who|given|then|so|does|has|would|will|can|states?|says?|means?)\b)[a-z]"
)
_LETTERS = (re.compile(r"\(([A-Z])\)"), re.compile(r"^\s*([A-Z])\s*(?:[.):]|$)", re.MULTILINE))  # undeclared


def robust_of(task: Task, samples: Mapping[str, Sequence[Row]], metric: str, filtered: str) -> Robust | None:
    """The outcomes by the forgiving parser of what `filtered` is the strict filter of, scored by `metric`.

    None where a task, or one of a group's, has no such parser.
    """
    if not task.metric(metric).higher_is_better:
        return None
    by: list[str] = []
    items: dict[str, dict[str, float]] = {}
    for name, leaf in task.leaves.items():
        rows = samples.get(name, ())
        strict = [row for row in rows if row["filter"] == filtered and metric in row]
        if not strict:
            continue
        found = _forgiving(leaf, rows, strict, metric)
        if found is None:
            return None
        by.append(found[0])
        outcomes = [max(float(row[metric]), one) for row, one in zip(strict, found[1], strict=True)]
        items[name] = dict(zip(map(item_name, strict), outcomes, strict=True))
    return Robust(", ".join(dict.fromkeys(by)), items) if items else None


def _forgiving(leaf: Any, rows: Sequence[Row], strict: Sequence[Row], metric: str) -> tuple[str, list[float]] | None:
    """Which parser, and the outcome of each strict row's item by it."""
    if leaf.OUTPUT_TYPE != "generate_until" or not all(_is_right_or_wrong(row[metric]) for row in strict):
        return None
    for filtered in dict.fromkeys(row["filter"] for row in rows):
        if filtered.startswith(FLEXIBLE):
            again = {item_name(row): float(row[metric]) for row in rows if row["filter"] == filtered}
            return filtered, [again[item_name(row)] for row in strict]
    if metric == EXACT and all(VERIFIED in row for row in strict):
        return VERIFIED, [float(row[VERIFIED]) for row in strict]
    if metric == EXACT:
        return OURS, [_by_ours(leaf, row) for row in strict]
    return None


def _is_right_or_wrong(outcome: Any) -> bool:
    return isinstance(outcome, Real) and float(outcome) in (0.0, 1.0)


def _by_ours(leaf: Any, row: Row) -> float:
    text = str(row["resps"][0][0])
    for target in targets_of(leaf, row["doc"]):
        found = answer_in(text, target)
        if found is not None and (found == target or _as_scored(leaf, row, found)):
            return 1.0
    return 0.0


def _as_scored(leaf: Any, row: Row, answer: str) -> bool:
    """Whether the task itself counts this answer, which knows what it takes for equal."""
    outcome = leaf.process_results(row["doc"], [answer]).get(EXACT)
    return isinstance(outcome, Real) and float(outcome) == 1.0


def targets_of(leaf: Any, doc: Any) -> list[str]:
    """The right answers of an item whose answer is generated, the first of them the one to demonstrate."""
    target = leaf.doc_to_target(doc)
    if leaf.config.doc_to_choice is not None and isinstance(target, int):
        target = leaf.doc_to_choice(doc)[target]
    return [str(one) for one in target] if isinstance(target, list | tuple) else [str(target)]


def answer_in(text: str, target: str) -> str | None:
    """What a text answers to a question whose answer looks like `target`; the target itself where it is equal to that.

    After the reasoning, where a text has any (`final_answers`). Of a number the last in what the text declares to be
    its answer, or else in all of it, equal as numbers are ("1,000", "$1000.00"); a target that is a whole solution, as
    GSM8K's, is the number behind its last "####". Of an option letter the one that is declared, or else the last in
    brackets, or else the last that begins a line. Of anything else what is declared. None where there is no such thing.
    """
    text = after_reasoning(text)
    wanted, declared = target.rsplit("####", 1)[-1].strip(), declared_answer(text)
    if (number := _number(wanted)) is not None:
        said = _NUMBER.findall(declared or "") or _NUMBER.findall(text)
        return None if not said else target if _number(said[-1]) == number else str(said[-1])
    if letter := _TARGET.fullmatch(wanted):
        found = _letter(text, declared)
        return target if found == letter[1] else found
    return None if declared is None else declared.rstrip(".")


def _letter(text: str, declared: str | None) -> str | None:
    if declared is not None and (match := _LETTER.match(declared)):
        return None if match[1] is None and _ARTICLE.match(declared, match.start(2)) else match[2]
    found = next((said for pattern in _LETTERS if (said := pattern.findall(text))), [None])
    return found[-1]


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "").replace("$", ""))
    return value if math.isfinite(value) else None
