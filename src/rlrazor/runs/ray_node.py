"""What a task of a Ray cluster does on its node: trains a run in a scratch folder, and returns its files."""

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.extras import versions_of
from rlrazor.runs import sweep, workers
from rlrazor.runs.store import Keep, RunStore
from rlrazor.system.locks import locked

HEARD_WITHIN = 5.0  # seconds for an answer, where the last of it is waited for

PACKAGES = ("torch", "numpy", "polars", "safetensors", "transformers", "trl", "peft", "accelerate", "lm-eval")
"""What decides bits, and has to be the same on all nodes where it is here."""


def train_on_node(
    trajectory: sweep.Trajectory,
    train: sweep.Train,
    kept: Mapping[str, Keep],
    given: Mapping[str, tuple[Sequence[str], Any]],
    mailbox: Any,
    theirs: Mapping[str, str],
    where: str,
) -> dict[str, Any]:
    """The task: the files of each finished run, by its id, and under "" what was written beside; or what is "wrong".

    `given`: of what the run starts from, by run id, its files' names, and where in the cluster these are. `theirs`: the
    versions where the command runs, whose folder is `where`, in case it is there on this node too.
    """
    import ray

    if sentence := _unlike(theirs):
        return {"wrong": sentence}
    with suppress(OSError):
        os.chdir(where)
    workers.messages = sender = _Sender(mailbox)
    try:
        store = RunStore(_scratch(), kept)
        own = {spec.run_id for spec in trajectory.specs}
        for folder in store.runs.glob("*"):
            if folder.name not in given:
                shutil.rmtree(folder)
        for run_id, (names, files) in given.items():
            if not all((store.runs / run_id / name).is_file() for name in names):
                store.take(run_id, ray.get(files))
        sweep.work(trajectory, train, store)
        found: dict[str, Any] = {run_id: store.files(run_id) for run_id in own}
        found[""] = _taken_beside(store)
    except RazorError as error:
        return {"wrong": str(error)}
    sender.wait()
    return found


class _Sender:
    """In a task: `workers.messages`, of which the messenger of a worker needs `put` only."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox, self.last = mailbox, list[Any]()

    def put(self, message: Any) -> None:
        with suppress(Exception):
            self.last = [self.mailbox.put.remote(message)]

    def wait(self) -> None:
        """Until the last one has arrived, so that it is heard before the run is over."""
        import ray

        with suppress(Exception):
            ray.wait(self.last, timeout=HEARD_WITHIN)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide bits, where they are installed."""
    return {"Python": ".".join(platform.python_version_tuple()[:2]), **versions_of(PACKAGES)}


def _unlike(theirs: Mapping[str, str]) -> str | None:
    """What differs here from where the command runs."""
    own = versions()
    for name, wanted in theirs.items():
        if own.get(name) != wanted:
            found = f"has {name} {own[name]}" if name in own else f"lacks {name}"
            return (
                f"The node {socket.gethostname()} of the cluster {found}, and the command runs with {wanted}: install "
                "the same on all nodes, as the last digits depend on it."
            )
    return None


def _scratch() -> Path:
    """A folder of this worker process, the same for all its tasks, so that a loaded base is known again.

    Ray kills its workers, which then clear nothing; so the next one clears what nobody holds the lock of.
    """
    global _folder
    if _folder is None:
        # It has its name when its lock is held: workers start together, and each clears.
        made = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}"))
        _while_alive.enter_context(locked(made / ".lock", f"{made} is another process's."))
        (made / "runs").mkdir()
        if _are_locks_kept(made / ".lock"):
            for left in made.parent.glob(f"{_SCRATCH}*"):
                with suppress(RazorError, OSError), locked(left / ".lock", "in use"):
                    shutil.rmtree(left)
        _folder = made.rename(made.with_name(made.name.removeprefix(".")))
    return _folder


def _are_locks_kept(held: Path) -> bool:
    """Whether the file system has locks, of which this process holds one of that file."""
    try:
        with locked(held, "taken"):
            return False
    except RazorError:
        return True


_SCRATCH = "rlrazor-ray-"
_folder: Path | None = None
_while_alive = ExitStack()


def _taken_beside(store: RunStore) -> dict[str, bytes]:
    """What a run has written beside its folder, such as films; gone from here then."""
    found = {}
    for path in [path for path in store.folder.rglob("*") if path.is_file()]:
        name = path.relative_to(store.folder)
        if name.parts[0] != store.runs.name and not name.parts[0].startswith("."):
            found[name.as_posix()] = path.read_bytes()
            path.unlink()
    return found
