"""Code that others wrote, in a process of its own: what it does to that process, it does not do to razor.

A verifier may exit, hang, crash or close standard output, a chat template may loop for hours. An `Apart` starts a
child, has it load the code once and keeps it; calls go to it over a socket, a batch in one message, each with a time
limit. A child that dies or runs out of time is replaced by a new one, and that one call has failed. What a child prints
goes to standard error, its standard input is empty, it leads a process group of its own, so that Ctrl-C does not
reach it, and it ends with razor, also where razor is killed. This guards against accidents; it is no sandbox: code may
do whatever the user may.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any, NoReturn

from rlrazor.system.apart.child import said

LOADING = 30.0  # seconds in which code is loaded, at least
_LONGEST_LINE = 1 << 16  # bytes of an answer
_SIGNALS = {int(known): known.name for known in signal.Signals}

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Arguments, and named ones."""


@dataclass(frozen=True)
class Answer:
    """What became of a call: its `value`; or a `failure`, what the code did, as in "took longer than 10 s"."""

    value: Any = None
    failure: str | None = None


class NotLoadedError(Exception):
    """The code cannot be loaded, and why."""


class DeadlyError(Exception):
    """The code has ended too many children in a row; the message says what became of the last."""


class _DiedError(Exception):
    """A child that does not answer, and why."""


class Apart:
    """One piece of code and the child that runs it, which is started when there is something to call.

    `role` and `what` are those of `child`. `seconds`: the limit of a call; loading may take `LOADING` if
    that is longer. `deaths`: of children in a row, at which it gives up. `memory`: bytes that a child may have.
    `quiet`: what it prints goes nowhere. Threads and forks of this process may share it: calls wait for each other, and
    each process has a child of its own.
    """

    def __init__(
        self,
        role: str,
        what: Sequence[Any],
        *,
        seconds: float,
        deaths: int,
        memory: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.role, self.what, self.seconds, self.deaths, self.memory = role, tuple(what), seconds, deaths, memory
        self.quiet = quiet
        self._died = 0
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def start(self) -> None:
        """Load the code, if it is not; raises NotLoadedError."""
        with self._lock:
            self._started()

    def call(self, calls: Sequence[Call]) -> list[Answer]:
        """The answer to each call, in order.

        Raises DeadlyError, and NotLoadedError where a new child cannot load what an old one has.
        """
        with self._lock:
            answers: list[Answer] = []
            while len(answers) < len(calls):
                answers += self._batch(calls[len(answers) :])
            return answers

    def close(self) -> None:
        """End the child; the next call starts another."""
        with self._lock:
            self._end()

    def _batch(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers up to the first call that ends the child; at least one."""
        sent, unsent = [], {}
        for position, call in enumerate(calls):
            try:
                sent.append(pickle.dumps(call, pickle.HIGHEST_PROTOCOL))
            except Exception as error:
                unsent[position] = Answer(failure=f"cannot be given its arguments ({said(error)})")
        answers: list[Answer] = []
        try:
            if sent:
                child = self._started()
                child.send(sent, self.seconds)
            for position in range(len(calls)):
                answers.append(unsent[position] if position in unsent else child.receive(self.seconds))
                self._died = 0
        except _DiedError as error:
            self._end()
            self._died += 1
            if self._died >= self.deaths:
                self._died = 0
                raise DeadlyError(str(error)) from error
            answers.append(Answer(failure=str(error)))
        except BaseException:  # Ctrl-C: answers that are still to come belong to no call
            self._end()
            raise
        return answers

    def _started(self) -> "_Child":
        if self._child is not None and self._child.owner != os.getpid():
            self._child = None  # that of the process that this one was forked from
        if self._child is None:
            child = _Child(quiet=self.quiet)
            try:
                child.send((self.role, self.what, sys.path, self.memory), LOADING)
                answer = child.receive(max(LOADING, self.seconds))
            except BaseException as error:
                child.end()
                if isinstance(error, _DiedError):
                    raise NotLoadedError(str(error)) from error
                raise
            if answer.failure is not None:
                child.end()
                raise NotLoadedError(answer.failure.removeprefix("raised "))
            self._child = child
        return self._child

    def _end(self) -> None:
        if self._child is not None and self._child.owner == os.getpid():
            self._child.end()
        self._child = None


class _Child:
    """The process, and this side of its socket."""

    def __init__(self, *, quiet: bool) -> None:
        self.owner = os.getpid()
        prints = subprocess.DEVNULL if quiet else _errors()
        own, its = socket.socketpair()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("child.py")), str(its.fileno())],
                stdin=subprocess.PIPE,  # never written to: its end is ours
                stdout=prints,
                stderr=prints,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        self.socket, self.read = own, b""
        self.end = weakref.finalize(self, _end, self.process, own, self.owner)  # at the interpreter's exit as well

    def send(self, message: Any, seconds: float) -> None:
        self.socket.settimeout(seconds)
        try:
            self.socket.sendall(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except TimeoutError:
            self._late(seconds)
        except OSError:
            self._gone()

    def receive(self, seconds: float) -> Answer:
        """The next answer; raises _DiedError where there is none within `seconds`."""
        until = time.monotonic() + seconds
        while b"\n" not in self.read:
            # What has come while this process was stopped is not late.
            self.socket.settimeout(max(until - time.monotonic(), 0.01))
            try:
                found = self.socket.recv(_LONGEST_LINE)
            except TimeoutError:
                self._late(seconds)
            except OSError:
                found = b""
            if not found or len(self.read) > _LONGEST_LINE:
                self._gone()
            self.read += found
        line, _, self.read = self.read.partition(b"\n")
        try:
            kind, value = loads(line)
        except ValueError:
            self._gone()
        if kind == "value":
            return Answer(value)
        return Answer(failure=f"raised {value}" if kind == "raised" else str(value))

    def _late(self, seconds: float) -> NoReturn:
        raise _DiedError(f"took longer than {seconds:g} s")

    def _gone(self) -> NoReturn:
        try:
            code = self.process.wait(1.0)  # the socket may be closed a moment before
        except subprocess.TimeoutExpired:
            raise _DiedError("closed the files that it is reached by") from None
        if code < 0:
            raise _DiedError(f"was ended by {_SIGNALS.get(-code, f'signal {-code}')}")
        raise _DiedError(f"ended its process with exit code {code}")


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    """Kill a child and all that it has started; in a fork of its owner, only forget it."""
    channel.close()
    if owner == os.getpid():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()


def _errors() -> int:
    """Where a child's output goes: this process's standard error, if it has one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
