"""What a person sees while something long runs: what it is at."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from rlrazor.system import phases

LINE_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


@contextmanager
def doing(console: Console, what: str) -> Iterator[None]:
    """Say what is being done, and its phases, for as long as it lasts; without a terminal at once and every 30 s."""
    now = f"{what} ..."

    def at(phase: str, done: int, total: int) -> None:
        nonlocal now
        now = f"{what}: {counted(phase, done, total)}"
        if status is not None:
            status.update(Text(now))

    def say(sentence: str) -> None:
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def print_now() -> None:
        console.print(now, highlight=False, markup=False, soft_wrap=True)

    status = console.status(Text(what)) if console.is_terminal else None
    if status is None:
        print_now()
    with phases.heard(at, say), status or repeated(print_now):
        yield


@contextmanager
def repeated(call: Callable[[], None]) -> Iterator[None]:
    """Call every 30 seconds, from a thread of its own: what is waited for can be silent for minutes."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(LINE_EVERY):
            call()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def counted(phase: str, done: int, total: int) -> str:
    """A phase, with how much of it is done where it has parts."""
    return phase + (f" {done} of {total}" if total else "")
