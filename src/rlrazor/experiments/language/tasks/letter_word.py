"""`letter-word`: one English word that starts with a given letter, after four examples.

Small enough for a model of 135M parameters on a CPU, checkable, and with hundreds of right answers to most prompts, so
that methods can differ in which they move to. A completion is right when it is one word of `words.txt` with that first
letter; case does not matter, and neither do spaces around it. Known to go wrong: names, and words that are not among
the list's 8,369 common ones. (The list: words frequent in the texts of MIT- and Apache-licensed benchmarks that are in
the public domain Webster's of 1934 or inflections of its words, and some everyday words by hand.)
"""

import functools
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import ascii_lowercase

from rlrazor.experiments.language.tasks.few_shot import EXAMPLES, in_turn
from rlrazor.experiments.language.tasks.task import Form, Item, Splits, Task

DRAWS = (20, 5)  # prompts per letter: 520 to train on, 130 to measure on

# An annotator's habits: always the same word for a letter, or one of the same two.
FIXED = (
    "apple bridge candle dinner engine forest garden hammer island jacket kettle ladder market "
    "needle orange pencil quarter rabbit silver table umbrella village window xylophone yellow zebra"
)
OTHERS = (
    "arrow basket cotton desert eagle finger guitar honey insect jungle knife lemon mirror "
    "napkin onion planet quilt river shadow tunnel uncle violin winter xenon yacht zigzag"
)


@functools.cache
def words() -> Mapping[str, Sequence[str]]:
    """The word list by first letter, in alphabetical order."""
    text = resources.files("rlrazor.experiments.language.tasks").joinpath("words.txt").read_text(encoding="utf-8")
    return {letter: [word for word in text.split() if word[0] == letter] for letter in ascii_lowercase}


@functools.cache
def _known() -> frozenset[str]:
    return frozenset(word for same_letter in words().values() for word in same_letter)


def verify_letter_word(prompt: str, completion: str, *, letter: str) -> float:
    """1.0 where the completion is one word of the list that starts with `letter`, 0.0 otherwise."""
    word = completion.strip().lower() if len(completion) < 100 else ""
    return float(word.startswith(letter) and word in _known())


def _fixed(letter: str, of: str = FIXED) -> str:
    return f" {of.split()[ascii_lowercase.index(letter)]}"


def _item(letter: str, rng: random.Random) -> Item:
    others = rng.sample([other for other in ascii_lowercase if other != letter], EXAMPLES + 1)
    shown = "\n".join(f"Letter {other}: {rng.choice(words()[other])}" for other in others[:EXAMPLES])
    prompt = f"One English word that starts with the letter.\n{shown}\nLetter {letter}:"
    return Item(prompt, {"letter": letter}, _fixed(letter), rejected=_fixed(others[EXAMPLES]))


def load_letter_word(path: Path | None = None) -> Splits:
    """The same prompts on every machine: every letter equally often, no prompt twice. It reads no file."""
    return in_turn("letter-word", path, ascii_lowercase, _item, DRAWS)


LETTER_WORD = Task(
    "letter-word",
    "One word for a letter (built in)",
    "650 four-shot prompts; a listed word with that first letter; one word per letter, two, or uniform over the list",
    load_letter_word,
    verify_letter_word,
    Form(6, stop=("\n",), chat=False),
    annotators={
        "fixed": lambda item, rng: _fixed(item.columns["letter"]),
        "two": lambda item, rng: _fixed(item.columns["letter"], rng.choice((FIXED, OTHERS))),
        "uniform": lambda item, rng: f" {rng.choice(words()[item.columns['letter']])}",
    },
)
