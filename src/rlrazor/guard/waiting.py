"""What is seen of a monitor's set-up, which can take minutes before the trainer shows anything."""

import sys
import time
from contextlib import suppress
from typing import Any, Self

from rlrazor.system import durations

LINE_EVERY = 10.0  # seconds between lines where there is no terminal
_BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}"


class SetUpProgress:
    """Told what is being done and how much of it has been: a bar on stderr of a terminal or a notebook, then gone.

    Elsewhere, and where the trainer is to draw no bars (`draws`), a line now and then; nothing unless it `speaks`.
    """

    def __init__(self, *, speaks: bool, draws: bool) -> None:
        from tqdm import auto

        in_notebook = auto.notebook_tqdm.__module__ == "tqdm.notebook"
        self.speaks, self.draws = speaks, draws and (in_notebook or sys.stderr.isatty())
        self.what, self.begun, self.said = "", 0.0, 0.0
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, what: str, done: float) -> None:
        """`done`: a fraction of 1."""
        if self.speaks:
            with suppress(OSError, ValueError):  # stderr that is full, closed, or of another encoding
                self._show(what, done)

    def _show(self, what: str, done: float) -> None:
        if what != self.what:
            self._close()
            self.what, self.begun, self.said = what, time.monotonic(), time.monotonic()
        if self.draws:
            self._draw(done)
        elif (now := time.monotonic()) - self.said >= LINE_EVERY and 0 < done < 1:
            self.said = now
            left = (now - self.begun) * (1 - done) / done
            print(f"[razor] {what}: {done:.0%}, about {durations.about(left)} left", file=sys.stderr, flush=True)

    def _draw(self, done: float) -> None:
        from tqdm import auto

        if self.bar is None:
            self.bar = auto.tqdm(total=1.0, desc=f"[razor] {self.what}", bar_format=_BAR, leave=False, file=sys.stderr)
        self.bar.update(min(done, 1.0) - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.close()
        self.bar = None
