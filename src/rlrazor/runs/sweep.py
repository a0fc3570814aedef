"""From specs to finished runs: what is missing is trained, in this process or in several, and stored as it ends.

Knows `RunSpec`, `Record` and the store, not what is trained: the training loop comes in as a picklable callable.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Self

from rlrazor.errors import RazorError
from rlrazor.runs import workers
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.system import interrupts, phases, processes, quiet

Train = Callable[[RunSpec, RunStore], Iterator[Checkpoint]]
PHASES_EVERY = 0.2  # seconds between what a worker says of one phase


class DivergedError(Exception):
    """Raised by a training loop when the loss is no longer finite; the checkpoints before it are kept."""

    def __init__(self, step: int, epoch: float) -> None:
        super().__init__(step, epoch)
        self.step, self.epoch = step, epoch


class Progress:
    """Told what happens, in the main process; this one does nothing about it."""

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        """A checkpoint was measured."""

    def finished(self, specs: Sequence[RunSpec]) -> None:
        """These runs are stored."""

    def at(self, spec: RunSpec, phase: str, done: int, total: int) -> None:
        """A run is in this phase; of training, after so many of its steps. See `phases.at`."""

    def say(self, sentence: str) -> None:
        """See `phases.say`."""


@dataclass(frozen=True)
class Trajectory:
    """Runs that one training serves: the longest is trained, the others are its prefixes."""

    longest: RunSpec
    specs: tuple[RunSpec, ...]


def trajectories(specs: Sequence[RunSpec]) -> list[Trajectory]:
    """Group runs of which one is a prefix of another, in order of first appearance."""
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.trajectory, []).append(spec)
    return [Trajectory(max(group, key=lambda s: s.params.get("epochs", 0)), tuple(group)) for group in groups.values()]


def missing(specs: Sequence[RunSpec], store: RunStore) -> list[RunSpec]:
    """The specs whose runs are not in the store, with the weights that it keeps of them."""
    return [spec for spec in specs if not store.is_finished(spec)]


def run(
    specs: Sequence[RunSpec],
    train: Train,
    store: RunStore,
    *,
    jobs: int = 1,
    progress: Progress = Progress(),  # noqa: B008  it has no state
) -> None:
    """Train what is missing of `specs`, as `Workers.run` does, which are gone afterwards."""
    with Workers(jobs) as ours:
        ours.run(specs, train, store, progress)


class Workers:
    """Trains runs in this process, or in `jobs` others, which start when they are needed and stay for the next runs.

    They keep what they have loaded: a base and its side of what is measured. A context manager: none is left behind.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None
        self.messages: Any = None

    def run(self, specs: Sequence[RunSpec], train: Train, store: RunStore, progress: Progress) -> None:
        """Train what is missing of `specs` and store it. Results do not depend on `jobs` or on interruptions.

        `train(spec, store)` yields a checkpoint at a time, is deterministic, and must be picklable when `jobs` > 1.
        Under torchrun all processes train, and the first alone stores what it was handed. Raises RazorError when a run
        cannot be stored or a worker dies; what was finished stays.
        """
        if self.jobs > 1 and processes.count() > 1:
            raise RazorError("Several runs at a time do not go with torchrun, which shares each: use one of the two.")
        todo = processes.in_first(lambda: trajectories(missing(specs, store)))
        if self.jobs > 1 and todo:
            self._run_in_processes(todo, train, store, progress)
            return
        for trajectory in todo:
            interrupts.check()
            _train_and_store(trajectory, train, store, progress)
            progress.finished(trajectory.specs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _run_in_processes(self, todo: Sequence[Trajectory], train: Train, store: RunStore, progress: Progress) -> None:
        self._renew_if_one_died()
        futures: dict[Future[None], Trajectory] = {}
        try:
            with interrupts.held():  # a worker that is not yet known as one would be left behind
                pool = self._started()
                for trajectory in todo:
                    kept = {spec.run_id: store.keeps(spec) for spec in trajectory.specs}
                    futures[pool.submit(work, trajectory, train, RunStore(store.folder, kept))] = trajectory
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                interrupts.check()
                forward(_waiting(self.messages), progress)
                for future in done:
                    future.result()
                    progress.finished(futures[future].specs)
        except BrokenProcessPool as error:
            raise RazorError(
                "A worker process died, most likely killed or out of memory. Finished runs are kept: run the same "
                "command again; --jobs 1 needs the least memory."
            ) from error

    def _renew_if_one_died(self) -> None:
        """A worker that was killed while it had nothing to do has cost nothing."""
        if self.pool and (self.pool._broken or not all(one.is_alive() for one in _processes_of(self.pool))):
            self._end()

    def _started(self) -> ProcessPoolExecutor:
        """The pool; it starts a worker when there is work for one more."""
        if self.pool is None:
            # spawn: a forked child would inherit torch's thread pool and locks in whatever state they are.
            context = multiprocessing.get_context("spawn")
            _start_tracker()
            self.messages = context.SimpleQueue()  # what is put is there before the run's result is
            self.pool = ProcessPoolExecutor(
                self.jobs, mp_context=context, initializer=workers.start, initargs=(self.messages,)
            )
        return self.pool

    def _end(self) -> None:
        """Leave no worker behind, without waiting for any: what is finished is stored, and nothing half-written."""
        with interrupts.held():
            pool, self.pool = self.pool, None
            if pool is None:
                return
            for process in _processes_of(pool):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            self.messages.close()


def _processes_of(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())  # None once it is broken


def _train_and_store(trajectory: Trajectory, train: Train, store: RunStore, progress: Progress) -> None:
    start, longest = time.perf_counter(), trajectory.longest
    diverged: DivergedError | None = None
    checkpoints: list[Checkpoint] = []
    for spec in trajectory.specs:
        store.keep(longest, store.keeps(spec))
    keep = store.keeps(longest)
    try:
        with phases.heard(partial(progress.at, longest), progress.say):
            for checkpoint in train(longest, store):
                interrupts.check()
                record = checkpoint.record
                # Any may turn out to be the last: of a run that diverges, or of a beginning of this one.
                weights = checkpoint.weights() if keep.wants(record.step, last=True) else {}
                checkpoints.append(replace(checkpoint, weights=partial(dict, weights)))
                progress.checkpoint(longest, record)
    except DivergedError as error:
        diverged = error
    if processes.rank() > 0:
        return
    seconds = time.perf_counter() - start
    for spec in trajectory.specs:
        length = spec.params.get("epochs")
        own = [one for one in checkpoints if length is None or one.record.epoch <= length]
        if not own:
            raise RazorError(f"{spec.describe()} diverged before its first checkpoint: use a lower learning rate.")
        diverged_at = diverged.step if diverged and (length is None or diverged.epoch <= length) else None
        own = [replace(one, record=replace(one.record, run_id=spec.run_id)) for one in own]
        store.write(spec, own, seconds=seconds, diverged_at=diverged_at)
    shutil.rmtree(store.partial_folder(longest), ignore_errors=True)  # not before the run is stored


def _start_tracker() -> None:
    """Start multiprocessing's process that tidies up semaphores, to do so without a warning where we were killed."""
    name, before = "PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS")
    os.environ[name] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Messenger(Progress):
    """The progress of a worker: what it is told goes to the main process, phases a few times a second at most."""

    def __init__(self) -> None:
        self.last = ("", 0.0)

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        workers.messages.put(("checkpoint", spec, record))

    def at(self, spec: RunSpec, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self.last[0] or now - self.last[1] > PHASES_EVERY or done == total:
            self.last = (phase, now)
            workers.messages.put(("at", spec, phase, done, total))

    def say(self, sentence: str) -> None:
        workers.messages.put(("say", sentence))


def work(trajectory: Trajectory, train: Train, store: RunStore) -> None:
    """What a worker does, in a process where `workers.messages` leads to the main one."""
    quiet.libraries()
    _train_and_store(trajectory, train, store, _Messenger())


def forward(messages: Iterable[Any], progress: Progress) -> None:
    """Tell what workers have sent."""
    for what, *told in messages:
        getattr(progress, what)(*told)


def _waiting(messages: Any) -> Iterator[Any]:
    while not messages.empty():
        yield messages.get()
