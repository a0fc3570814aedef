"""Ctrl-C, SIGTERM and SIGHUP: one sentence and an exit code of 128 + the signal, at any moment and however often.

Python raises KeyboardInterrupt wherever it is. It is lost where that is a `__del__`, a callback of a C library or code
that catches everything; it waits for C code to end; and a second one breaks off the cleaning up after the first. So a
signal is raised once and remembered, and long loops ask for it (`check`). The process of the command (`as_process`) has
a thread too that ends it where that takes longer than PATIENCE, or after a second signal than HASTE: what is written is
whole at any moment, since files and folders are renamed into place.

Little is imported here: until `as_process` is called, a Ctrl-C is a traceback.
"""

from __future__ import annotations

import _thread
import atexit
import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's own takes as long to import as all of the above
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

PATIENCE = 3.0  # seconds for the command to end in order
HASTE = 0.3  # seconds for it after a second signal
_SAID = {signal.SIGINT: "interrupted"}  # else: ended by SIGTERM
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar has hidden it
_LOST = 0  # no signal has this number


class _State:
    asked: int = 0  # the signal that asks to end
    raised: bool = False  # ... and KeyboardInterrupt is on its way
    since: float = 0.0  # when it was raised
    held: int = 0  # blocks that are not to be broken off
    keeps: bool = False  # whether the same command goes on from where it was
    last: int = signal.SIGINT  # what `say` is about
    said: bool = False
    over: bool = False  # the command has ended, and the process is about to
    told: int = -1  # of the process of the command: where the thread that waits for signals is told of them
    unheard: int = 0  # signals of our own that it will be told of


_state = _State()


def check() -> None:
    """Raise KeyboardInterrupt if a signal has asked to end since `remembered` began."""
    if _state.asked and not _state.held:
        raise KeyboardInterrupt


@contextmanager
def remembered(*, keeps: bool = False) -> Iterator[None]:
    """Remember a signal within this block, which is a command; `keeps`: the same command goes on from where it was.

    Whatever leaves the block after a signal is a KeyboardInterrupt. Outside of the main thread there are no signals.
    """
    # Who started the process may have it ignore the signal.
    alone = _state.told < 0 and _in_main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    _state.keeps = keeps
    if alone:
        _state.asked, _state.raised, _state.said, _state.last = 0, False, False, signal.SIGINT
        before = signal.signal(signal.SIGINT, _handle)
    try:
        yield
        check()
    except Exception as error:  # what a library makes of a KeyboardInterrupt
        if _state.asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        if alone:
            signal.signal(signal.SIGINT, before)
            _state.asked = 0


@contextmanager
def held() -> Iterator[None]:
    """Keep a signal back until the block has ended; processes that are started in it have Ctrl-C blocked."""
    if not _in_main_thread():
        yield
        return
    _state.held += 1
    # The mask of this thread is what a new process begins with; signals come to other threads in the meantime.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _state.held -= 1
    if _state.asked and not _state.raised and not _state.held:
        _state.raised = True
        raise KeyboardInterrupt


def say() -> int:
    """Say, once, what has ended the command; returns its exit code."""
    if not _state.said:
        _state.said = True
        with suppress(OSError, ValueError):  # the terminal may be gone
            print(_sentence(terminal=sys.stderr.isatty()), file=sys.stderr, flush=True)
    return 128 + _state.last


def as_process(command: Callable[[], int]) -> int:
    """What `command` returns, or the exit code of the signal that ended it: it is all that this process is for.

    Not under torchrun, which ends its processes itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or not _in_main_thread():
        return command()
    _mind_signals()
    try:
        try:
            code = command()
        except BaseException:
            if not _state.asked:
                raise
            return say()
        return say() if _state.asked else code
    except KeyboardInterrupt:  # between the lines above
        return say()
    finally:
        _state.over = True


def _mind_signals() -> None:
    minded = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    reader, _state.told = os.pipe()
    os.set_blocking(_state.told, False)
    for number in minded:
        signal.signal(number, _handle)
    atexit.register(_leave, minded)  # registered first, it is called last
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _forget(minded))
    sys.unraisablehook = _unraisable
    threading.excepthook = _thread_failed
    # Told of a signal at once, also while the main thread is in C code.
    signal.set_wakeup_fd(_state.told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(number: int, frame: Any) -> None:
    now = time.monotonic()
    if not _state.asked:
        _state.asked = _state.last = number
        _state.since = now
    if _state.over:
        _end()
    if _state.held or (_state.raised and now - _state.since < PATIENCE):
        return
    _state.raised, _state.since = True, now
    raise KeyboardInterrupt


def _watch(signals: int) -> None:
    """End the process where it does not end itself."""
    hurry = threading.Event()
    waiting: threading.Thread | None = None
    while True:
        number = ord(os.read(signals, 1))
        if number == _LOST:
            time.sleep(0.01)  # out of the hook that has told us
            _state.unheard += 1
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, _state.asked)  # it may be asleep
            else:
                _thread.interrupt_main(signal.Signals(_state.asked))
        elif number not in _SIGNALS:
            continue
        elif _state.unheard:
            _state.unheard -= 1
        elif waiting is None:
            waiting = threading.Thread(target=_end_soon, args=(hurry,), daemon=True)
            waiting.start()
        else:
            hurry.set()


def _end_soon(hurry: threading.Event) -> None:
    if hurry.wait(PATIENCE):
        time.sleep(HASTE)
    _end()


def _unraisable(lost: Any) -> None:
    if not _state.asked:
        sys.__unraisablehook__(lost)
    elif issubclass(lost.exc_type, KeyboardInterrupt) and not _state.over:
        _state.raised = False
        with suppress(OSError):
            os.write(_state.told, bytes([_LOST]))


def _thread_failed(failed: Any) -> None:
    if not _state.asked:
        threading.__excepthook__(failed)


def _end() -> NoReturn:
    """End the process as it is, with all that it has started."""
    _state.last = _state.asked or _state.last
    if not _state.said:
        _state.said = True
        with suppress(OSError, ValueError):
            if select.select([], [2], [], HASTE)[1]:  # a pipe that nobody empties would be waited for
                os.write(2, f"{_sentence(terminal=os.isatty(2))}\n".encode())
    if (started := sys.modules.get("multiprocessing.process")) is not None:
        for child in list(started._children):
            with suppress(OSError, AttributeError, ValueError):
                child.kill()
    os._exit(128 + _state.last)


def _forget(minded: list[signal.Signals]) -> None:
    """In a forked child: what ends it is none of the parent's business."""
    signal.set_wakeup_fd(-1)
    for number in minded:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    atexit.unregister(_leave)
    _state.told = -1


def _leave(minded: list[signal.Signals]) -> None:
    for number in minded:
        signal.signal(number, signal.SIG_IGN)  # Python would put back what kills
    if _state.said:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        # Python would end itself by SIGINT, where a KeyboardInterrupt has left code that was run by `exec`.
        os._exit(128 + _state.last)


def _sentence(*, terminal: bool) -> str:
    how = _SAID.get(signal.Signals(_state.last), f"ended by {signal.Signals(_state.last).name}")
    rest = (
        "What is finished is kept; the same command goes on from there."
        if _state.keeps
        else "Nothing is half-written; the same command starts anew."
    )
    return f"{_SHOW_CURSOR if terminal else ''}razor: {how}. {rest}"
