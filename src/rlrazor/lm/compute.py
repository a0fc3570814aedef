"""The one place that decides how a process computes: threads, device, autocast, and what is put back afterwards."""

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from rlrazor.errors import RazorError

THREADS = 1
"""Threads of a process on a CPU. One: results must not depend on how many processes run beside it, and two threads on
a machine that is busy were ten times slower than one. `RLRAZOR_THREADS` overrides it, for one big model on an idle CPU.
"""


def prepare_process() -> None:
    """Set the threads, and flush denormals to zero, which optimiser moments decay into. Call it before any tensor."""
    torch.set_num_threads(int(os.environ.get("RLRAZOR_THREADS", THREADS)))
    torch.set_flush_denormal(True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
