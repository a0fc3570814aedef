"""Where a world's environments are stepped: in this process or in others, to the same results."""

import multiprocessing
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.lanes import Lanes
from rlrazor.experiments.robot.world import World
from rlrazor.runs import workers as ends
from rlrazor.system import interrupts

PATIENCE = 300  # seconds in which a process has to be done with one step or start, which builds an environment
PULSE = 1.0  # seconds after which it says that it is at work still


class Simulator(Protocol):
    """Does what it is told, one thing after another, and answers in that order."""

    def send(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Have `what(lanes, *arguments)` called."""
        ...

    def receive(self) -> Any:
        """The next answer. Raises the RazorError that was raised there, and one where the process died or hangs."""
        ...

    def end(self) -> None:
        """Stop at once."""
        ...


class Simulators:
    """A world's environments: in this process, or with `workers` in as many others, which stay until the end.

    A context manager: none is left behind. What they have built stays for the next roll-out.
    """

    def __init__(self, world: World, workers: int = 0) -> None:
        self.world, self.workers = world, workers
        self._started: list[Simulator] = []

    @property
    def each(self) -> Sequence[Simulator]:
        """One for each worker, or the one that is here."""
        if not self._started:
            with interrupts.held():  # a process that is not yet known as one would be left behind
                for _ in range(self.workers):
                    self._started.append(_There(self.world))
                self._started = self._started or [_Here(self.world)]
        return self._started

    def end(self) -> None:
        """Stop all; the next use starts them anew."""
        with interrupts.held():
            started, self._started = self._started, []
            for one in started:
                one.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Here:
    """In this process."""

    def __init__(self, world: World) -> None:
        self.lanes = Lanes(world)
        self.answers: deque[Any] = deque()

    def send(self, what: Callable[..., Any], *arguments: Any) -> None:
        with denormals():
            self.answers.append(what(self.lanes, *arguments))

    def receive(self) -> Any:
        return self.answers.popleft()

    def end(self) -> None:
        self.lanes.close()


class _There:
    """In a process of its own."""

    def __init__(self, world: World) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child has torch's locks in whatever state they are
        self.world = world
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, world), daemon=True)
        self.process.start()
        other.close()  # the process has the only one: when it dies, what is read here ends

    def send(self, what: Callable[..., Any], *arguments: Any) -> None:
        try:
            self.pipe.send((what, arguments))
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            while (heard := self._heard()) is None:
                pass
        except (EOFError, OSError) as error:
            raise self._died() from error
        fine, answer = heard
        if fine:
            return answer
        raise answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()

    def _heard(self) -> tuple[bool, Any] | None:
        """What it says next, which is None when it is at work still."""
        for _ in range(PATIENCE):  # not until some time: this process may be stopped in between
            if self.pipe.poll(1.0):
                heard: tuple[bool, Any] | None = self.pipe.recv()
                return heard
            interrupts.check()
        raise RazorError(
            f"A process that simulates {self.world.name} has not been done with a step for {PATIENCE} s: its simulator "
            "hangs. Run the same command again; with workers=0 there is no such process."
        )

    def _died(self) -> RazorError:
        return RazorError(
            f"A process that simulates {self.world.name} died, most likely killed or out of memory. Run the same "
            "command again; workers=0 needs the least memory."
        )


def _serve(pipe: Any, world: World) -> None:
    ends.start(None)
    lanes = Lanes(world, _Pulse(pipe))
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, what(lanes, *arguments))
        except RazorError as error:
            answer = (False, error)
        except Exception as error:  # a fault of ours, which keeps its traceback
            answer = (False, RuntimeError("".join(traceback.format_exception(error))))
        pipe.send(answer)


class _Pulse:
    """Called after each step, it tells the parent so once in a while."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.told = pipe, time.monotonic()

    def __call__(self) -> None:
        if (now := time.monotonic()) - self.told >= PULSE:
            self.pipe.send(None)
            self.told = now


@contextmanager
def denormals() -> Iterator[None]:
    """Compute with denormals in this block, as a new process does, also where this one flushes them to zero.

    `lm.compute.prepare_process` has it do so. The other processes could as well, but for torch, which alone would take
    them longer to import than all else.
    """
    torch = sys.modules.get("torch")
    if torch is None or sys.float_info.min / 2:
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
