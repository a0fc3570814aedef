r"""Math word problems: the final answer is compared with the reference by math-verify.

Three sources with one verifier: Open-Reasoner-Zero's questions (RR's choice), GSM8K and MATH-500. What counts is the
final answer: the last `\boxed{...}`, or what follows the last "answer is", "answer:" or "####", or else the last line.

Known to go wrong: a right answer with another word after the mark ("the answer is obtained by ...") counts as wrong,
and so does one that math-verify cannot parse, unless it is letter for letter the reference. "5 or 6" is
no answer. Answers of more than 300 characters, more than six levels of brackets, or with powers and factorials too
large to compute are compared as text.
"""

import functools
import math
import re
import threading
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.rows import field_of, held_out, of_rows, rows_of, text_of
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task
from rlrazor.lm.final_answers import after_reasoning, declared_answer
from rlrazor.system.rows import Row, read_located

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
LONGEST = 300  # characters of an answer that is parsed; the longest reference has 53
DEEPEST = 6  # brackets within brackets: comparing a fraction takes 3 s at 16; the deepest reference has 2
SECONDS = 2  # for one parse or comparison, which take milliseconds

# sympy computes what it reads, in C code that no timeout interrupts: a tower of powers takes forever, and all memory.
LARGEST = 999  # an exponent that is computed
LARGEST_POWER = 10**6  # the product of an answer's exponents, so that a power of a power is bounded too
_COSTLY = re.compile(
    r"\\(?:sum|prod|int|lim)(?![a-z])"  # a computation left to do; and numbers that only notation makes short:
    r"|\d\s*[eE]\s*[+-]?\s*\d{3}|binom.*\d{4}|(?:\d{3}|[)\]}!])\s*!|\d{100}",
    re.DOTALL,
)
_GROWS = re.compile(r"\\?\b(?:exp|sinh|cosh|tanh|coth)(?![a-z])")  # what stands behind it is an exponent
_POWER = re.compile(r"(?:\^|\*\*)\s*")


def verify_math(prompt: str, completion: str, *, reference: str) -> float:
    """1.0 where the final answer equals `reference` (LaTeX or a number), 0.0 otherwise."""
    text = after_reasoning(completion)
    answer = declared_answer(text)
    if answer is None:
        answer = text.rsplit("\n", 1)[-1]
    answer = answer.strip().rstrip(".")
    if not answer:
        return 0.0
    if _as_text(answer) == _as_text(reference):
        return 1.0
    hedged = re.search(r"\bor\b", answer) and not re.search(r"\bor\b", reference)
    if hedged or len(answer) > LONGEST or _depth(answer) > DEEPEST or _too_large(answer):
        return 0.0
    return float(_equal(reference, answer))


def _as_text(answer: str) -> str:
    """The answer without what does not change it: spaces, dollar signs, and the font."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).replace("\\!", "")
    return "".join(answer.replace("\\$", "").replace("$", "").split())


def _depth(answer: str) -> int:
    return max(accumulate((character in "({[") - (character in ")}]") for character in answer))


def _too_large(answer: str) -> bool:
    """Whether computing the answer's powers and factorials might take more than a moment; answers hardly ever do."""
    text = _GROWS.sub("e^", re.sub(r"\\(?:left|right)(?![a-z])", "", answer))
    if _COSTLY.search(text):
        return True
    product = 1
    for power in _POWER.finditer(text):
        exponent = _exponent(text[power.end() :])
        numbers = re.findall(r"\d+", exponent)
        nested = len(_POWER.findall(exponent))
        # Of powers in exponents only the likes of e^{-x^2} are computed.
        if nested > 1 or (nested and len("".join(numbers)) > 1) or "!" in exponent:
            return True
        value = math.prod(max(2, int(number)) for number in numbers)
        product *= value
        if value > LARGEST or product > LARGEST_POWER:
            return True
    return False


def _exponent(text: str) -> str:
    """The exponent that `text` begins with, and the exponents of that one; rather too much than too little."""
    if re.match(r"\\[A-Za-z]+\s*[{\[(]", text):
        return text
    single = re.match(r"-?\s*(?:[\d.]+|\\?[A-Za-z]+)?", text)
    end = single.end() if single else 0
    if text[end : end + 1] in ("(", "{", "["):
        depths = accumulate((character in "({[") - (character in ")}]") for character in text[end:])
        end += next((position for position, depth in enumerate(depths, 1) if depth == 0), len(text))
    above = _POWER.match(text, end)
    return text[:end] + text[end : above.end()] + _exponent(text[above.end() :]) if above else text[:end]


def _equal(reference: str, answer: str) -> bool:
    from math_verify import verify

    # Its timeout is an alarm signal, which only the main thread can set.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    return bool(verify(_parsed(reference, seconds), _parsed(answer, seconds), timeout_seconds=seconds))


@functools.lru_cache(maxsize=4096)  # a group's samples share their reference
def _parsed(answer: str, seconds: int | None) -> Any:
    from math_verify import parse

    answer = answer.replace("\\$", "").replace("\\!", "")
    plain = "$" not in answer and "\\(" not in answer and "\\[" not in answer
    formula = plain and ("\\" in answer or not re.search(r"[A-Za-z]{2,}", answer))
    return parse(f"${answer}$" if formula else answer, parsing_timeout=seconds)


def _item(row: Row) -> Item:
    return Item(f"{text_of(row, 'prompt', 0, 'value')}\n{INSTRUCTION}", {"reference": _reference(row, "final_answer")})


def _hub_item(row: Row) -> Item:
    return Item(f"{text_of(row, 'problem')}\n{INSTRUCTION}", {"reference": _reference(row, "answer")})


def _reference(row: Row, key: str) -> str:
    """The right answer: text, or a number."""
    found = field_of(row, key)
    if isinstance(found, bool) or not isinstance(found, str | int | float) or not str(found).strip():
        raise RazorError(f"Its {key} is {found!r:.40}, and has to be text or a number.")
    if isinstance(found, float) and not math.isfinite(found):
        raise RazorError(f"Its {key} is {found}, and has to be a finite number.")
    return str(found)


def _gsm8k_item(row: Row) -> Item:
    question, (solution, mark, reference) = text_of(row, "question"), text_of(row, "answer").rpartition("####")
    reference = reference.strip().replace(",", "")
    if not mark or not reference:
        raise RazorError("Its answer has to end with #### and the final answer.")
    steps = re.sub(r"<<[^<>]*>>", "", solution).strip()  # the calculator's annotations
    demonstration = f"{steps}\nThe final answer is \\boxed{{{reference}}}."
    return Item(f"{question}\n{INSTRUCTION}", {"reference": reference}, demonstration)


def load_orz(path: Path | None) -> Splits:
    """Open-Reasoner-Zero's 57k questions; a fifth of them is held out."""
    rows = rows_of(path, "*orz*.json*", "Open-Reasoner-Zero/orz_math_57k_collection", "train")
    return held_out(of_rows(rows, _item))


def load_math500(path: Path | None) -> Splits:
    """MATH-500, a fifth held out. Local files have Open-Reasoner-Zero's schema, the hub's have `problem`, `answer`."""
    rows = rows_of(path, "*math*500*.json*", "HuggingFaceH4/MATH-500", "test")
    return held_out(of_rows(rows, _hub_item if path is None else _item))


def load_gsm8k(path: Path | None) -> Splits:
    """GSM8K's own train and test split; of a single local file, a fifth is held out."""
    if path is not None and not path.is_dir():
        return held_out(of_rows(read_located(path), _gsm8k_item))
    sides = (rows_of(path, f"gsm8k_{side}.json*", "openai/gsm8k", side, "main") for side in ("train", "test"))
    return Splits(*(of_rows(rows, _gsm8k_item) for rows in sides))


MATH = Task(
    "math",
    "Open-Reasoner-Zero 57k (hub; --data *orz*.json)",
    "57k questions; final answer equal (math-verify); none: --demonstrations FILE",
    load_orz,
    verify_math,
    Form(1024),
)
GSM8K = Task(
    "gsm8k",
    "GSM8K (hub; --data gsm8k_train.jsonl and gsm8k_test.jsonl, or one file)",
    "8.8k grade-school problems; final answer equal (math-verify); its own solutions",
    load_gsm8k,
    verify_math,
    Form(512),
)
MATH500 = Task(
    "math500",
    "MATH-500 (hub; --data math500.jsonl)",
    "500 competition problems; final answer equal (math-verify); none: --demonstrations FILE",
    load_math500,
    verify_math,
    Form(1024),
)
