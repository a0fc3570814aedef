"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever it is, and ignores it where that is a `__del__` or a callback of a C library.
So the signal is also remembered, and long loops ask for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_asked = False


def check() -> None:
    """Raise KeyboardInterrupt if there was a Ctrl-C since `remembered` began."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """Remember a Ctrl-C within this block; do nothing outside of the main thread, where there are no signals."""
    global _asked
    # Who started the process may have it ignore the signal.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return

    def remember(number: int, frame: Any) -> None:
        global _asked
        _asked = True
        raise KeyboardInterrupt

    _asked = False
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _asked = False
