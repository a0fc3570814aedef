"""One run in several processes, as torchrun starts them: what the first does for all, and how all of them end.

The first process owns the folder: it measures, writes and prints while the others wait for it. What happens in one
process happens in all: outcomes are gathered first and raised after, so that none waits for another that has failed.
Left out: a start by anything that does not set RANK and WORLD_SIZE as torchrun does.
"""

import atexit
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rlrazor.errors import RazorError, chain_of

T = TypeVar("T")
Outcome = tuple[Any, Exception | None]

WAIT = timedelta(days=7)  # the first process may measure for hours; where one dies, torchrun ends the others
EXIT_ELSEWHERE = 2  # of a process that is silent because another one says why all end
SILENCE = 2.0  # seconds for that other one to say it: when one process exits, torchrun ends all


class _Elsewhere(Exception):  # noqa: N818
    """The cause of an error that another process has had, and reports."""


def count() -> int:
    """How many processes this run has: those that torchrun has started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Which of them this one is; 0 is the first."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def join() -> None:
    """Meet the other processes, before any of them loads a model: each takes a GPU of its own. Once is enough.

    Raises RazorError where there are more processes than GPUs.
    """
    if count() > 1:
        _waiting_group()


def in_first(make: Callable[[], T]) -> T:
    """What `make()` returns, or raises, in the first process: for all of them, while the others wait."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    group = _waiting_group()
    value, error = _attempt(make) if rank() == 0 else (None, None)
    sent: list[Outcome] = [(value, _portable(error))]
    dist.broadcast_object_list(sent, src=0, group=group)
    value, elsewhere = sent[0]
    return _settled(value, error, [elsewhere])  # type: ignore[no-any-return]


def in_all(make: Callable[[], T]) -> T:
    """What `make()` returns in this process, where it succeeds in each of them; else the error, in all of them."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    value, error = _attempt(make)
    errors: list[Exception | None] = [None] * count()
    dist.all_gather_object(errors, _portable(error), group=_waiting_group())
    return _settled(value, error, errors)  # type: ignore[no-any-return]


@contextmanager
def together() -> Iterator[None]:
    """Let one process say why all of them end: the others, which only lost it, exit without a word."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if count() == 1:
            raise
        atexit.unregister(_leave)  # it could wait for the others
        if any(isinstance(found, _Elsewhere) for found in chain_of(error)) or not _speaks():
            time.sleep(SILENCE)
            raise SystemExit(EXIT_ELSEWHERE) from error
        if _is_lost_connection(error):
            raise RazorError(
                "Another process of this run died, most likely killed or out of memory: run the same command again, "
                "with fewer processes or a smaller --micro-batch."
            ) from error
        raise


_group: list[Any] = []


def _waiting_group() -> Any:
    """All processes, on the CPU: a GPU's collectives would keep the GPU busy, and give up after half an hour."""
    if not _group:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise RazorError(f"There are more processes than GPUs: set --nproc-per-node of torchrun to {gpus}.")
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)
        _group.append(dist.new_group(backend="gloo", timeout=WAIT))
    return _group[0]


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _attempt(make: Callable[[], Any]) -> Outcome:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _settled(value: Any, own: Exception | None, others: Sequence[Exception | None]) -> Any:
    """The value, unless this process or another has failed."""
    if own is not None:
        raise own
    for error in others:
        if error is not None:
            raise error from _Elsewhere()
    return value


def _portable(error: Exception | None) -> Exception | None:
    """The error, if another process can be told of it, else one that says as much."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _speaks() -> bool:
    """Whether this process is the first that has failed. Asked of torchrun itself, which outlives its processes."""
    import torch.distributed as dist

    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=20)
        )
        return bool(store.add(f"rlrazor/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return True
