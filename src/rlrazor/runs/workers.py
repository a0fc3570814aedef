"""What a worker of a sweep does first: leave Ctrl-C to its parent, and end when its parent does.

Nothing heavy is imported here: until a worker gets to this it would outlive a parent that is killed.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

messages: Any = None
"""The queue to the parent."""

_PR_SET_PDEATHSIG = 1


def start(queue: Any) -> None:
    """Called in each worker when it starts."""
    global messages
    messages = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on alone: it would train into a folder that it no longer owns."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        # The thread below cannot run while C code holds the interpreter's lock. The kernel can.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:
            os._exit(1)
    threading.Thread(target=_wait_for, args=(parent.sentinel,), daemon=True).start()


def _wait_for(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
