"""`letters`: any three different letters of a string, in alphabetical order. The new task of the tiny base.

    P:dacfbe=acf;  P:dacfbe=bdf;  ...      20 right answers to each prompt

Right completions can all be listed, so that accuracy, the KL-minimal policy and the distance to it are sums, not
estimates. `pretraining_example` is the form, not the rule, of the task, as the tiny base gets to see it.

Two more tasks have the same prompts and another order: `letters-descending`, from the last of the alphabet, and
`letters-appearance`, as they stand in the string. With them a law can be asked about a task that it was not fitted to.
One policy cannot do two of these three. In a sequence the tasks are FORMS, the same three told apart by their prompts:

    PS:dacfbe=acf;  (sorted)    PR:dacfbe=fca;  (the reverse)    PC:dacfbe=acf;  (as they stand: copied)
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task

LETTERS = "abcdefghij"
EOS = ";"
PICKED, OFFERED = 3, 6  # letters of an answer, and of a prompt: C(6, 3) = 20 right answers
IN_ORDER = 0.25
"""How often the pre-training text's answers are put in order; the rest keep the order drawn, right one time in six."""
EARLIER = 0.7  # a letter is this much less likely to be drawn than the one before it
TRAIN, TEST = 4096, 256

Example = tuple[str, str]  # prompt, completion


def distinct(draw: Callable[[random.Random], Example], rng: random.Random, count: int) -> list[Example]:
    """`count` examples, no prompt twice."""
    examples: dict[str, str] = {}
    while len(examples) < count:
        prompt, completion = draw(rng)
        examples.setdefault(prompt, completion)
    return list(examples.items())


def _string_of(prompt: str) -> str:
    return prompt.partition(":")[2][:-1]


@dataclass(frozen=True)
class Order:
    """The order that makes an answer right. `arrange(letters, string)` puts different letters of the string into it.

    `mark` is what prompts tell it by, after their P.
    """

    arrange: Callable[[str, str], str]
    mark: str = ""

    def pretraining_example(self, rng: random.Random) -> Example:
        """The task as the pre-training text has it: earlier letters likelier, in order only sometimes."""
        text = "".join(rng.sample(LETTERS, OFFERED))
        drawn: list[int] = []
        while len(drawn) < PICKED:
            position = rng.choices(range(OFFERED), [EARLIER**i for i in range(OFFERED)])[0]
            if position not in drawn:
                drawn.append(position)
        answer = "".join(text[i] for i in drawn)
        return f"P{self.mark}:{text}=", self.arrange(answer, text) if rng.random() < IN_ORDER else answer

    def right_completions(self, item: Item) -> list[str]:
        """The 20 right completions, without the stop string."""
        text = _string_of(item.prompt)
        return ["".join(letters) for letters in combinations(self.arrange(text, text), PICKED)]

    def verify(self, prompt: str, completion: str) -> float:
        """1 for three different letters of the prompt's string in this order, else 0."""
        text, letters = _string_of(prompt), set(completion)
        right = len(completion) == len(letters) == PICKED and letters <= set(text)
        return float(right and completion == self.arrange(completion, text))

    def one(self, item: Item, rng: random.Random) -> str:
        """Always the last three letters of the string, which the base draws least."""
        text = _string_of(item.prompt)
        return self.arrange(text[-PICKED:], text)

    def two(self, item: Item, rng: random.Random) -> str:
        """The last three letters of the string or the first three, evenly."""
        text = _string_of(item.prompt)
        return self.arrange(rng.choice((text[-PICKED:], text[:PICKED])), text)

    def uniform(self, item: Item, rng: random.Random) -> str:
        """Any right answer, evenly."""
        return rng.choice(self.right_completions(item))

    def wrong(self, item: Item, rng: random.Random) -> str:
        """A wrong answer as a careless external model gives it: three letters of the string, out of order."""
        text = _string_of(item.prompt)
        while True:
            letters = "".join(rng.sample(text, PICKED))
            if letters != self.arrange(letters, text):
                return letters

    def load(self, path: Path | None = None) -> Splits:
        """The prompts to train on and to measure on, the same for every seed. There is no file to read."""
        rng = random.Random("new task")
        items = []
        for prompt, _ in distinct(self.pretraining_example, rng, TRAIN + TEST):
            item = Item(prompt)
            items.append(Item(prompt, {}, self.one(item, rng), self.wrong(item, rng)))
        return Splits(items[:TRAIN], items[TRAIN:])

    def task(self, name: str, title: str, summary: str) -> Task:
        """The task of giving three letters in this order."""
        return Task(
            name=name,
            title=title,
            summary=f"three different letters of a string, {summary}: 20 right answers to each prompt",
            load=self.load,
            verify=self.verify,
            form=Form(PICKED + 2, stop=(EOS,), chat=False),
            annotators={"one": self.one, "two": self.two, "uniform": self.uniform},
            correct=self.right_completions,
        )


ASCENDING = Order(lambda letters, text: "".join(sorted(letters)))
DESCENDING = Order(lambda letters, text: "".join(sorted(letters, reverse=True)))
APPEARANCE = Order(lambda letters, text: "".join(sorted(letters, key=text.index)))

LETTERS_TASK = ASCENDING.task("letters", "Three letters in order", "in alphabetical order")
LETTERS_DESCENDING = DESCENDING.task("letters-descending", "Three letters, backwards", "from the last of the alphabet")
LETTERS_APPEARANCE = APPEARANCE.task("letters-appearance", "Three letters as they stand", "in the order of the string")

FORMS: Mapping[str, Order] = {
    "ascending": replace(ASCENDING, mark="S"),
    "descending": replace(DESCENDING, mark="R"),
    "appearance": replace(APPEARANCE, mark="C"),
}
"""The tasks of a sequence, by name."""
FORM_TASKS = tuple(
    FORMS[name].task(name, f"Three letters, {name}", f"{told}, for sequences of tasks")
    for name, told in (
        ("ascending", "in alphabetical order"),
        ("descending", "from the last of the alphabet"),
        ("appearance", "as they stand"),
    )
)
