"""What a long computation is at: told by whatever computes, shown by whoever listens, or by nobody."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRAINING = "training"  # the phase whose count is of a run's steps

At = Callable[[str, int, int], None]
"""(phase, done, total): "training", 40, 100; a total of 0 where there is nothing to count."""

_listeners: list[tuple[At, Callable[[str], None]]] = []


def at(phase: str, done: int = 0, total: int = 0) -> None:
    """Tell what is being done. It costs a call: tell as often as there is something new."""
    for by, _ in _listeners:
        by(phase, done, total)


def say(sentence: str) -> None:
    """Tell what a person should read; on standard error where nobody listens."""
    if _listeners:
        _listeners[-1][1](sentence)
    else:
        print(sentence, file=sys.stderr)


@contextmanager
def heard(by: At, said: Callable[[str], None]) -> Iterator[None]:
    """Within this block, `by` is called with what `at` is told, and `said`, of blocks in one another the innermost's,
    with the sentences.
    """
    _listeners.append((by, said))
    try:
        yield
    finally:
        _listeners.pop()
