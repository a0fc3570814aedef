"""Where a world's environments are stepped: in this process or in others, to the same results."""

import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.lanes import Lanes
from rlrazor.experiments.robot.world import World
from rlrazor.runs import workers as ends
from rlrazor.system import interrupts

Answer = TypeVar("Answer")


class Simulator(Protocol):
    """Does what it is told, one thing after another, and answers in that order."""

    def send(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Have `what(lanes, *arguments)` called."""
        ...

    def receive(self) -> Any:
        """The next answer. Raises the RazorError that was raised there, and one where the process has died."""
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
            fine, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if fine:
            return answer
        raise answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()

    def _died(self) -> RazorError:
        return RazorError(
            f"A process that simulates {self.world.name} died, most likely killed or out of memory. Run the same "
            "command again; workers=0 needs the least memory."
        )


def _serve(pipe: Any, world: World) -> None:
    ends.start(None)
    lanes = Lanes(world)
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
