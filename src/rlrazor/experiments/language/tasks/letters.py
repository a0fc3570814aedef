"""`letters`: any three different letters of a string, in alphabetical order. The new task of the tiny base.

    P:dacfbe=acf;  P:dacfbe=bdf;  ...      20 right answers to each prompt

Right completions can all be listed, so that accuracy, the KL-minimal policy and the distance to it are sums, not
estimates. `pretraining_example` is the form, not the rule, of the task, as the tiny base gets to see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from rlrazor.experiments.language.tasks.task import Item, Splits, Task

LETTERS = "abcdefghij"
EOS = ";"
PICKED, OFFERED = 3, 6  # letters of an answer, and of a prompt: C(6, 3) = 20 right answers
IN_ORDER = 0.25
"""How often the pre-training text's answers are put in order; the rest keep the order drawn, right one time in six."""
EARLIER = 0.7  # a letter is this much less likely to be drawn than the one before it
TRAIN, TEST = 4096, 256

Example = tuple[str, str]  # prompt, completion


def pretraining_example(rng: random.Random) -> Example:
    """The new task as the pre-training text has it: earlier letters likelier, in order only sometimes."""
    text = "".join(rng.sample(LETTERS, OFFERED))
    drawn: list[int] = []
    while len(drawn) < PICKED:
        position = rng.choices(range(OFFERED), [EARLIER**i for i in range(OFFERED)])[0]
        if position not in drawn:
            drawn.append(position)
    answer = "".join(text[i] for i in drawn)
    return f"P:{text}=", "".join(sorted(answer)) if rng.random() < IN_ORDER else answer


def distinct(draw: Callable[[random.Random], Example], rng: random.Random, count: int) -> list[Example]:
    """`count` examples, no prompt twice."""
    examples: dict[str, str] = {}
    while len(examples) < count:
        prompt, completion = draw(rng)
        examples.setdefault(prompt, completion)
    return list(examples.items())


def right_completions(item: Item) -> list[str]:
    """The 20 right completions, without the stop string."""
    return ["".join(letters) for letters in combinations(sorted(item.prompt[2:-1]), PICKED)]


def verify(prompt: str, completion: str) -> float:
    """1 for three different letters of the prompt's string in alphabetical order, else 0."""
    letters = list(completion)
    right = len(letters) == PICKED and letters == sorted(set(letters)) and set(letters) <= set(prompt[2:-1])
    return float(right)


def one(item: Item, rng: random.Random) -> str:
    """Always the last three letters of the string, which the base draws least."""
    return "".join(sorted(item.prompt[2:-1][-PICKED:]))


def two(item: Item, rng: random.Random) -> str:
    """The last three letters of the string or the first three, evenly."""
    text = item.prompt[2:-1]
    return "".join(sorted(rng.choice((text[-PICKED:], text[:PICKED]))))


def uniform(item: Item, rng: random.Random) -> str:
    """Any right answer, evenly."""
    return rng.choice(right_completions(item))


def wrong(item: Item, rng: random.Random) -> str:
    """A wrong answer as a careless external model gives it: three letters of the string, out of order."""
    while True:
        letters = rng.sample(item.prompt[2:-1], PICKED)
        if letters != sorted(letters):
            return "".join(letters)


def load(path: Path | None = None) -> Splits:
    """The prompts to train on and to measure on, the same for every seed. There is no file to read."""
    rng = random.Random("new task")
    items = []
    for prompt, _ in distinct(pretraining_example, rng, TRAIN + TEST):
        item = Item(prompt)
        items.append(Item(prompt, {}, one(item, rng), wrong(item, rng)))
    return Splits(items[:TRAIN], items[TRAIN:])


LETTERS_TASK = Task(
    name="letters",
    title="Three letters in order",
    summary="three different letters of a string, in alphabetical order: 20 right answers to each prompt",
    load=load,
    verify=verify,
    max_new_tokens=PICKED + 2,
    stop=(EOS,),
    chat=False,
    annotators={"one": one, "two": two, "uniform": uniform},
    correct=right_completions,
)
