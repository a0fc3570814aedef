"""Runs as tasks of a Ray cluster, in place of the processes of `sweep.Workers`.

    here      holds the folder; hands out what a run starts from and whom it imitates; stores what comes back
    a task    a scratch folder on its node --the training that a worker process does--> the files of the finished runs

No folder has to be shared: a run's files travel with it, and one process writes. What that costs is small beside a run,
as weights go along only where they are kept. Our package travels too, so that a node trains by the same code; the other
packages have to be there, in the same versions, which each task checks before it begins.

A node that is lost costs the runs that were on it: they start again elsewhere, from their beginning. Ray would do that
by itself, but say nothing, and for a process that ran out of memory without end; so it is done here.
"""

import logging
import os
import re
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import rlrazor
from rlrazor.errors import RazorError
from rlrazor.extras import needs_package
from rlrazor.runs import sweep
from rlrazor.runs.ray_node import HEARD_WITHIN, train_on_node, versions
from rlrazor.runs.records import RunSpec
from rlrazor.runs.store import RunStore
from rlrazor.system import cores, interrupts
from rlrazor.system.writing import atomic_path

LOSSES = 3  # of one run, with the node or the process that it was on, until the command gives up
REACHED_WITHIN = 5.0  # seconds, the cluster's address
HEARD_EVERY = 0.3  # seconds between questions for what tasks have to say
MOST_MESSAGES = 10_000  # that nobody has asked for yet; what is lost of them is no result

_HANDED_ON = ("OMP_", "MKL_", "RLRAZOR_", "HF_", "TRANSFORMERS_", "TQDM_", "TOKENIZERS_", "CUBLAS_")
_SECRET = re.compile("TOKEN(?!IZERS)|KEY|SECRET|PASSWORD")  # a cluster shows the environment of its tasks
_HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""From tasks that take none. Newer Rays would leave all of them to each such task, older ones hide them anyway."""


@dataclass(frozen=True)
class Cluster:
    """Where runs go, and what each takes there.

    `address`: host:port of a cluster's head, `auto` for the one that this machine belongs to, None for one that is
    started on this machine and ended again. `at_once`: how many runs at most; None: all that there is room for.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.gpus % 1:  # Ray says so too, when the first run begins
            raise RazorError(
                f"--gpus above 1 is a whole number, not {self.gpus:g}: a run takes GPUs, or a part of one."
            )

    def check(self) -> None:
        """Raise RazorError where Ray is not installed, or nobody answers at the address."""
        needs_package("ray", "--executor ray", "'ray>=2.40'")
        if self.address is not None:
            _reach(self.address)


class RayWorkers:
    """Trains runs as tasks of a cluster. A context manager: without it the command has nothing to do with Ray."""

    def __init__(self, cluster: Cluster) -> None:
        _settle(cluster)
        self.cluster, self.joined = cluster, False
        self.task: Any = None
        self.mailbox: Any = None
        self.running: dict[Any, sweep.Trajectory] = {}
        self.asked, self.asked_at = list[Any](), 0.0  # for what tasks have to say

    def run(self, specs: Sequence[RunSpec], train: sweep.Train, store: RunStore, progress: sweep.Progress) -> None:
        """Train what is missing of `specs` and store it, as `sweep.Workers.run` does, with the same bits.

        Raises RazorError where there is no cluster, where one of its nodes differs from this machine, where a run is
        lost `LOSSES` times, and where it cannot be stored; what was finished stays.
        """
        todo = deque(sweep.trajectories(sweep.missing(specs, store)))
        if not todo:
            return
        if not self.joined:
            self._join(progress)
        try:
            self._run(todo, train, store, progress)
        except BaseException:
            self._cancel()
            raise

    def _run(
        self, todo: deque[sweep.Trajectory], train: sweep.Train, store: RunStore, progress: sweep.Progress
    ) -> None:
        import ray

        given, losses = dict[Any, Any](), Counter[RunSpec]()
        while todo or self.running:
            while todo and len(self.running) < (self.cluster.at_once or len(todo) + len(self.running)):
                trajectory = todo.popleft()
                self.running[self._submitted(trajectory, train, store, given)] = trajectory
            done, _ = ray.wait(list(self.running), num_returns=1, timeout=0.2)
            interrupts.check()
            self._hear(progress)
            for task in done:
                trajectory = self.running.pop(task)
                lost, found = _outcome(task)
                if lost:
                    losses[trajectory.longest] += 1
                    _say_lost(trajectory.longest, lost, losses[trajectory.longest], progress)
                    todo.append(trajectory)
                    continue
                for spec in trajectory.specs:
                    store.take(spec.run_id, found[spec.run_id])
                _write_beside(found[""], store.folder)
                self._hear(progress, last=True)
                progress.finished(trajectory.specs)

    def _cancel(self) -> None:
        import ray

        for task in self.running:
            with suppress(Exception):
                ray.cancel(task, force=True)
        self.running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.joined:
            return
        import ray

        with interrupts.held():
            ray.shutdown()
            self.joined = False

    def _join(self, progress: sweep.Progress) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        _start(self.cluster)
        self.joined = True
        _compare(self.cluster, ray.nodes(), progress)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        of_run = {"num_cpus": self.cluster.cpus, "num_gpus": self.cluster.gpus, "max_retries": 0}
        self.task = ray.remote(**of_run)(train_on_node)

    def _submitted(
        self, trajectory: sweep.Trajectory, train: sweep.Train, store: RunStore, given: dict[Any, Any]
    ) -> Any:
        """A task; `given`: what was handed out already, of each run and its steps."""
        import ray

        spec, needed = trajectory.longest, dict[str, set[int]]()
        for of in (*spec.chain, *((spec.teacher,) if spec.teacher else ())):
            needed.setdefault(of.spec.run_id, set()).add(of.step)
        handed = {}
        for run_id, steps in needed.items():
            key = (run_id, frozenset(steps))
            if key not in given:
                files = store.files(run_id, steps)
                given[key] = (tuple(files), ray.put(files))
            handed[run_id] = given[key]
        kept = {spec.run_id: store.keeps(spec) for spec in trajectory.specs}
        return self.task.remote(trajectory, train, kept, handed, self.mailbox, versions(), os.getcwd())

    def _hear(self, progress: sweep.Progress, *, last: bool = False) -> None:
        """Tell what tasks have sent, at its `last` all that is there. What is lost of it is missed by nobody."""
        import ray

        now = time.monotonic()
        with suppress(ray.exceptions.RayError):
            if self.asked or last:
                answered, self.asked = ray.wait(
                    [*self.asked, *([self.mailbox.empty.remote()] if last else [])],
                    num_returns=len(self.asked) + last,
                    timeout=HEARD_WITHIN * last,
                )
                for answer in answered:
                    sweep.forward(ray.get(answer), progress)
            if not self.asked and now - self.asked_at > HEARD_EVERY:
                self.asked, self.asked_at = [self.mailbox.empty.remote()], now


class Mailbox:
    """An actor beside the process of the command: what tasks have to say, until that asks for it."""

    def __init__(self) -> None:
        self.messages: deque[Any] = deque(maxlen=MOST_MESSAGES)

    def put(self, message: Any) -> None:
        """From a task."""
        self.messages.append(message)

    def empty(self) -> list[Any]:
        """All that is there, which is gone then."""
        found = list(self.messages)
        self.messages.clear()
        return found


def handed_on() -> dict[str, str]:
    """The variables of this process that its tasks get as well: threads, caches, and no secret."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
    return {name: value for name, value in found.items() if not _SECRET.search(name)}


def _write_beside(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        with atomic_path(folder / name) as path:
            path.write_bytes(data)


def _outcome(task: Any) -> tuple[str, dict[str, Any]]:
    """What a task that has ended has returned; or, first, how it was lost. Raises RazorError with what was wrong."""
    import ray
    from ray import exceptions

    try:
        found: dict[str, Any] = ray.get(task)
    except exceptions.RayTaskError as error:
        said = str(error.cause).strip()
        if isinstance(error.cause, ImportError) or "failed to import" in said:
            why = said.splitlines()[-1]
            raise RazorError(
                f"A node of the cluster cannot import what it needs ({why:.200}): install the same packages on all "
                "nodes."
            ) from error
        raise
    except exceptions.RuntimeEnvSetupError as error:
        raise RazorError(f"The cluster could not take our package: {str(error).splitlines()[0]:.300}") from error
    except exceptions.RayError as error:
        return type(error).__name__, {}
    if sentence := found.get("wrong"):
        raise RazorError(sentence)
    return "", found


def _say_lost(spec: RunSpec, how: str, times: int, progress: sweep.Progress) -> None:
    if times >= LOSSES:
        raise RazorError(
            f"{spec.describe()} was lost {times} times with its node, or with its process, which may have been out of "
            f"memory ({how}). Finished runs are kept: run the same command again, with more --cpus for each run."
        )
    progress.say(f"{spec.describe()} was lost with its node or its process ({how}): it starts again.")


def _compare(cluster: Cluster, nodes: Iterable[Mapping[str, Any]], progress: sweep.Progress) -> None:
    """Say what does not go together of the nodes and what a run takes; raise RazorError where no run will ever start.

    Ray waits for a node that has room. One may be about to join, unless the cluster is this command's own.
    """
    each = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(one.get("CPU", 0) >= cluster.cpus and one.get("GPU", 0) >= cluster.gpus for one in each):
        asked = f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs for a run"
        if cluster.address is None:
            there = " and ".join(f"{sum(one.get(kind, 0) for one in each):g} {kind}s" for kind in ("CPU", "GPU"))
            raise RazorError(
                f"This machine has {there}, not {asked}: ask for less by --cpus and --gpus, or name a cluster's "
                "--address."
            )
        progress.say(
            f"No node of the cluster has {asked}: all wait until one joins. Ctrl-C ends that; --cpus and --gpus ask "
            "for less."
        )
    elif not cluster.gpus and any(one.get("GPU", 0) for one in each):
        progress.say("The cluster has GPUs, which runs do not see without --gpus: they are on the CPU.")


def _settle(cluster: Cluster) -> None:
    """What Ray reads as it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would be sent to its makers
    if cluster.address is None:
        # Its name notwithstanding: nothing is to listen beyond this machine. Ray takes its network card's address for
        # 127.0.0.1 otherwise.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:
        # Once, and not twenty times, half a minute each, where something else than Ray answers.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")


def _start(cluster: Cluster) -> None:
    """Join the cluster, or start one here; raises RazorError where there is none."""
    import ray

    environment = {"py_modules": [str(Path(rlrazor.__file__).parent)], "env_vars": handed_on() | _HIDE_GPUS}
    start = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    if cluster.address is None:
        start = partial(
            start, "local", include_dashboard=False, num_cpus=cores.available(), _node_ip_address="127.0.0.1"
        )
    else:
        _reach(cluster.address)
        start = partial(start, cluster.address)
    try:
        with interrupts.held(), _own_signals():
            start()
    except (OSError, RuntimeError, ValueError) as error:
        with suppress(Exception):
            ray.shutdown()
        said = " ".join(str(error).partition("Last connection error")[0].split())
        raise RazorError(
            f"The Ray cluster at {cluster.address or 'this machine'} cannot be used: {said:.300}"
        ) from error


def _reach(address: str) -> None:
    """Raise RazorError where nobody answers at the address: Ray would try for minutes."""
    if address == "auto":
        return
    at = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = at.hostname, at.port
    except ValueError:
        host, port = None, None
    if not host or not port or at.scheme not in ("", "ray"):
        raise RazorError(f"--address is HOST:PORT of a Ray cluster's head, or auto, not {address!r:.100}.")
    try:
        socket.create_connection((host, port), REACHED_WITHIN).close()
    except OSError as error:
        raise RazorError(
            f"No Ray cluster answers at {address} ({error.strerror or error}): start one by `ray start --head`, or "
            "name another --address."
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray has SIGTERM end the process in a way of its own."""
    minded = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in minded}
    try:
        yield
    finally:
        with suppress(ValueError):  # outside of the main thread there are no signals
            for number, handler in before.items():
                signal.signal(number, handler)
