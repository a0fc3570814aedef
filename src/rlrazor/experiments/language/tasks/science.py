"""SciKnowEval, chemistry, level L-3 (RR's science task): multiple choice by letter, and equations to balance.

A letter is what the completion declares last ("answer is C", a box), or the one letter that its lines consist of; an
option's own text may stand behind it. Two letters are no answer. An equation is the last line that has two sides; any
balancing with the reference's species on either side counts, its multiples too (see `chemistry`).

Known to go wrong: "The answer is the second option" and lower-case letters are not read. Of the references, one writes
a subscript 0 and does not balance by any count of atoms; there the reference's own coefficients count as right.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.chemistry import Equation, NotAnEquation, parse_equation
from rlrazor.experiments.language.tasks.rows import field_of, held_out, list_of, of_rows, rows_of, text_of
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task
from rlrazor.lm.final_answers import after_reasoning, declared_answer
from rlrazor.system.rows import Row

_LETTER = re.compile(r"(?:option\s+)?[\s*(\[{\"'$]*(?:\\text\{)?([A-D])(?=$|[\s.,;:)*\]\"'}$])", re.IGNORECASE)
_SECOND = re.compile(r"[\s*)\]}.,/&]*(?:\b(?:or|and)\b)?[\s*(\[{]*\b[A-D]\b(?=$|[\s.,;:)*\]}])")


def verify_science(
    prompt: str, completion: str, *, kind: str, reference: str, options: Mapping[str, str] | None = None
) -> float:
    """1.0 where the completion is right, 0.0 otherwise.

    `kind` is "choice", with `reference` a letter and `options` the text of each; or "equation", with `reference` a
    balanced equation. Raises NotAnEquation for a reference equation that cannot be read.
    """
    text = after_reasoning(completion)
    if kind == "equation":
        return float(_balances(text, reference))
    return float(_chosen(text, options or {}) == reference)


def _chosen(text: str, options: Mapping[str, str]) -> str | None:
    declared = declared_answer(text)
    lines = text.split("\n") if declared is None else [declared]
    letters = {letter for line in lines if (letter := _letter_of(line.strip(), options, declared is not None))}
    return letters.pop() if len(letters) == 1 else None


def _letter_of(line: str, options: Mapping[str, str], declared: bool) -> str | None:
    """The letter that a line names; where it is not declared to be the answer, the line has to consist of it."""
    match = _LETTER.match(line)
    if match is None or match.group(1) not in options:
        return None
    rest = line[match.end() :]
    text = rest.strip(" .:)*]}\"'")
    if text == "" or " ".join(text.split()) == " ".join(options[match.group(1)].split()):
        return match.group(1)
    if not declared and not re.match(r"[.:)]", rest):
        return None  # prose that begins with a letter: "A molecule of ..."
    return None if _SECOND.match(rest) else match.group(1)


def _balances(text: str, reference: str) -> bool:
    for line in reversed([*text.split("\n"), declared_answer(text) or ""]):
        try:
            answer = parse_equation(line.rpartition(":")[2])
        except NotAnEquation:
            continue
        known = parse_equation(reference)
        return answer.species == known.species and (answer == known or _is_balanced(answer))
    return False


def _is_balanced(equation: Equation) -> bool:
    try:
        return equation.balanced()
    except NotAnEquation:
        return False


def _item(row: Row) -> Item:
    instruction, question = text_of(row, "prompt", "default"), text_of(row, "question")
    letter = field_of(row, "answerKey")
    if letter is None or letter == "":
        answer = text_of(row, "answer")
        unbalanced = re.sub(r"(^|[+=] )\d+", r"\1", answer)
        rejected = unbalanced if unbalanced != answer else f"2{answer}"
        return Item(f"{instruction}\n\n{question}", {"kind": "equation", "reference": answer}, answer, rejected)
    options = _options(row)
    if not isinstance(letter, str) or letter not in options or len(options) < 2:
        raise RazorError(f"Its answerKey is {letter!r:.40}, and has to be one of at least two labels of its choices.")
    listed = "\n".join(f"{label}. {text}" for label, text in options.items())
    columns = {"kind": "choice", "reference": letter, "options": options}
    wrong = _one_of([label for label in options if label != letter], question)
    return Item(f"{instruction}\n\n{question}\n\n{listed}\n\nAnswer:", columns, letter, wrong)


def _options(row: Row) -> dict[str, str]:
    """The text of each option, by its letter."""
    count, texts = len(list_of(row, "choices", "label")), len(list_of(row, "choices", "text"))
    if count != texts:
        raise RazorError(f"Its choices have {count} labels and {texts} texts.")
    options = {text_of(row, "choices", "label", at): text_of(row, "choices", "text", at) for at in range(count)}
    if len(options) < count:
        raise RazorError("Its choices have the same label twice.")
    return options


def _one_of(names: Sequence[str], seed: str) -> str:
    """One of `names`, always the same for the same `seed`: no letter is the usual wrong one."""
    return names[hashlib.sha256(seed.encode()).digest()[0] % len(names)]


def load_science(path: Path | None) -> Splits:
    """The 2,400 items of chemistry, level L3; a fifth of them is held out. Other domains and levels are left out."""
    rows = rows_of(path, "*chemistry*.json*", "hicai-zju/SciKnowEval", "test")
    levels = of_rows(rows, lambda row: field_of(row, "details", "level") if row.get("domain") == "Chemistry" else "")
    return held_out(of_rows([row for row, level in zip(rows, levels, strict=True) if level == "L3"], _item))


SCIENCE = Task(
    "science",
    "SciKnowEval Chemistry L-3 (hub; --data *chemistry*.jsonl)",
    "2,100 questions with four options, 300 equations to balance; right letter, balanced; the bare answers",
    load_science,
    verify_science,
    Form(256),
)
