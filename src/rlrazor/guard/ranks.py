"""One process or many: what all of them have to agree on, so that none waits for another that has failed.

In the process group that the user's trainer has made, whoever launched it; `system.processes` is of runs of our own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rlrazor.errors import RazorError
from rlrazor.lm import lockstep

T = TypeVar("T")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Of this process; 0 where it is alone."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def count() -> int:
    """Processes."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def everywhere(work: Callable[[], T], model: Any = None) -> list[T]:
    """What `work` returns in every process, once it has in all; where it fails in one of them, all raise.

    `work` must not wait for another process, but by calling `model`, which may be sharded over all of them. Raises its
    own error where it was raised, elsewhere RazorError.
    """
    own: Exception | None = None
    value: Any = None
    try:
        value = work() if model is None else lockstep.run(model, work)
    except Exception as error:
        own = error
    said = "" if own is None else f"{'' if isinstance(own, RazorError) else type(own).__name__ + ': '}{own}"
    outcome = (own is not None, said, value)
    found: list[Any] = [outcome] * count()
    if count() > 1:
        torch.distributed.all_gather_object(found, outcome)
    if own is not None:
        raise own
    for number, (failed, said, _) in enumerate(found):
        if failed:
            raise RazorError(f"Process {number} has failed, and all end with it. {said}")
    return [value for _, _, value in found]


def together(work: Callable[[], T], model: Any = None) -> T:
    """The same, returning this process's own value."""
    return everywhere(work, model)[rank()]
