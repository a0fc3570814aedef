"""`multiple`: a multiple of a given number, from two to twelve times as large, after four examples.

Beside `letter-word` a second task that a model of 135M parameters can learn on a CPU: arithmetic, not spelling, with
eleven right answers to every prompt. A completion is right when it is one of them, in digits; spaces around it do not
matter. The number itself is none, else copying it would do, nor is anything larger: 27720 is a multiple of them all.
Known to go wrong: a right number with more behind it, such as a full stop.
"""

import random
from pathlib import Path

from rlrazor.experiments.language.tasks.few_shot import EXAMPLES, in_turn
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task

NUMBERS = range(2, 13)
FACTORS = range(2, 13)
DRAWS = (48, 12)  # prompts per number: 528 to train on, 132 to measure on

# An annotator's habits: always seven times the number, or one of the same two. Small models prefer 2, 3, 5 and 10.
FIXED, OTHER = 7, 9


def verify_multiple(prompt: str, completion: str, *, number: int) -> float:
    """1.0 where the completion is `number` times one of FACTORS in digits, 0.0 otherwise."""
    said = completion.strip() if len(completion) < 100 else ""
    return float(said in {str(number * factor) for factor in FACTORS})


def _times(item: Item, factor: int) -> str:
    return f" {item.columns['number'] * factor}"


def _item(number: int, rng: random.Random) -> Item:
    others = rng.sample([other for other in NUMBERS if other != number], EXAMPLES)
    shown = "\n".join(f"Multiple of {other}: {other * rng.choice(FACTORS)}" for other in others)
    prompt = f"A multiple of the number, up to twelve times as large.\n{shown}\nMultiple of {number}:"
    return Item(prompt, {"number": number}, f" {number * FIXED}", rejected=f" {number * FIXED + 1}")


def load_multiple(path: Path | None = None) -> Splits:
    """The same prompts on every machine: every number equally often, no prompt twice. It reads no file."""
    return in_turn("multiple", path, NUMBERS, _item, DRAWS)


MULTIPLE = Task(
    "multiple",
    "A multiple of a number (built in)",
    "660 four-shot prompts; two to twelve times the number; seven times, seven or nine times, or any evenly",
    load_multiple,
    verify_multiple,
    Form(6, stop=("\n",), chat=False),
    annotators={
        "fixed": lambda item, rng: _times(item, FIXED),
        "two": lambda item, rng: _times(item, rng.choice((FIXED, OTHER))),
        "uniform": lambda item, rng: _times(item, rng.choice(FACTORS)),
    },
)
