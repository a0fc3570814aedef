"""Programs of others: run with a limit on their time, all that they start ended with them, and the end of their words.

What one of them says is kept in memory to its last bytes alone, however much that is.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import IO

_TAIL = 10_000  # bytes of standard error


class CommandError(Exception):
    """Why a command has not done what it was to do."""


def run(
    command: Sequence[str],
    folder: Path | str,
    seconds: float,
    *,
    env: Mapping[str, str] | None = None,
    read: Callable[[IO[bytes]], None] | None = None,
) -> str:
    """Run a command in `folder`, and `read` its standard output; returns the end of what it wrote to standard error.

    After `seconds` it is ended, and at its end all that it has started. `env` is added to the environment. Raises
    CommandError where it is not installed, takes too long or fails; and what `read` raises, with what the command said
    as a note.
    """
    program = shutil.which(command[0])
    if program is None:
        raise CommandError(f"{command[0]} is not installed")
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if read else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, which can be ended
    )
    said, late = bytearray(), Event()
    listener = Thread(target=_keep_end, args=(process.stderr, said), daemon=True)
    listener.start()
    timer = Timer(seconds, lambda: late.set() or _end_all(process))  # type: ignore[func-returns-value]
    timer.daemon = True
    timer.start()
    failure: Exception | None = None
    try:
        if read is not None and process.stdout is not None:
            with process.stdout:
                read(process.stdout)
        else:
            process.wait()
    except Exception as error:
        failure = error
    finally:
        timer.cancel()
        _end_all(process)
        process.wait()
        listener.join(1.0)  # who has left the group may hold it open
    if late.is_set():
        raise CommandError(f"{command[0]} did not finish within {seconds:g} seconds") from failure
    text = said.decode(errors="replace").strip()
    if failure is not None:
        failure.add_note(text)
        raise failure
    if read is None and process.returncode != 0:
        raise CommandError(text or f"{command[0]} failed with exit code {process.returncode}")
    return text


def _keep_end(stream: IO[bytes], said: bytearray) -> None:
    with stream, suppress(ValueError):
        while chunk := os.read(stream.fileno(), _TAIL):
            said[:] = (said + chunk)[-_TAIL:]


def _end_all(process: "subprocess.Popen[bytes]") -> None:
    """End a command and what it has started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
