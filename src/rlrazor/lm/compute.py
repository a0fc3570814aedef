"""The one place that decides how a process computes: threads, device, autocast, and what is put back afterwards."""

import os
import random
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from rlrazor import cores
from rlrazor.errors import RazorError

THREADS = 1
"""Threads of a process of a sweep. One: its results must not depend on how many processes run beside it, and two
threads on a machine that is busy were ten times slower than one.
"""


def prepare_process(threads: int = THREADS) -> None:
    """Set the threads, and flush denormals to zero, which optimiser moments decay into. Call it before any tensor.

    RLRAZOR_THREADS overrides `threads`; raises RazorError where it is no number of threads.
    """
    asked = os.environ.get("RLRAZOR_THREADS")
    if asked is not None and not re.fullmatch("[1-9][0-9]{0,3}", asked):
        raise RazorError(f"RLRAZOR_THREADS is a number of threads, at least 1, not {asked!r}.")
    torch.set_num_threads(threads if asked is None else int(asked))
    torch.set_flush_denormal(True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def threads_alone() -> int:
    """Of a process that has the machine to itself: a thread per core, or as many as OMP_NUM_THREADS says if fewer."""
    limit, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    available = cores.available()
    return min(available, int(limit)) if limit.isdecimal() and int(limit) else available


def leave_progress_to_us() -> None:
    """No bars of transformers, for a command that draws its own: two bars on one terminal garble each other."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, or Python, raises where there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


@contextmanager
def memory_errors(sentence: str) -> Iterator[None]:
    """Raise RazorError with this sentence where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RazorError(sentence) from error


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(*, bf16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 over float32 weights, on any device; with `bf16` off, nothing."""
    return torch.autocast(device().type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in, frozen parts included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Put every random generator back into its state: what is measured must not shift what is trained on."""
    python, numpys = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)
