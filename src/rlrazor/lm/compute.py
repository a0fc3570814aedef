"""The one place that decides how a process computes: threads, device, precision, and what is put back afterwards."""

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from rlrazor.errors import RazorError
from rlrazor.lm import offloading, shards
from rlrazor.system.cores import threads_asked

THREADS = 1
"""Threads of a process of a sweep over small models. Of larger ones they are a setting, `Config.threads`: either way
results depend neither on how many processes run beside it nor on the machine's cores.
"""

PRECISIONS = ("float32", "bfloat16", "float16")
"""What a model can be measured in, see `measuring`."""

_COMPARED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types whose values torch puts in order


def prepare_process(threads: int | None = None) -> None:
    """Set the threads, and flush denormals to zero, which optimiser moments decay into. Call it before any tensor.

    By default as many as RLRAZOR_THREADS says, else `THREADS`.
    """
    torch.set_num_threads(threads or threads_asked() or THREADS)
    torch.set_flush_denormal(True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


def free() -> None:
    """Give back what is no longer referred to, before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def device_of(model: Any) -> torch.device:
    """Where it takes its tokens: where its first parameter is, or is brought to; of FSDP where it computes."""
    return shards.computed_on(model) or offloading.device_of(model)


def has_bf16() -> bool:
    """Whether the device computes in bfloat16, faster than in float32: a CPU takes half as long again."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: by the least and the largest, which NaN is too where any value is.

    Asking each value takes 30 times as long in float32 and 200 times in bfloat16.
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # holds all that FP8 does, which torch asks nothing of
    if tensor.dtype in _COMPARED and tensor.numel():
        return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
    return bool(tensor.isfinite().all())


def spread(total: int, most: int) -> torch.Tensor:
    """Evenly spaced places among so many, the first and the last among them: `most`, or all where there are no more."""
    return torch.from_numpy(np.linspace(0, total - 1, min(total, most)).astype(np.int64))


def now(model: Any) -> float:
    """Seconds on a clock, once the model's device has done what it was given."""
    place = device_of(model)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def precision_of(model: Any) -> str:
    """Which of PRECISIONS a model computes in by itself: that of most of its weights, or what FSDP casts them to.

    Weights of other types do not count: eight bits are computed with in what the rest has, float64 is as good as
    float32.
    """
    sizes: dict[str, int] = {}
    cast_to = shards.computed_in(model)
    for weight in model.parameters():
        name = str(cast_to or weight.dtype).removeprefix("torch.")
        if name in PRECISIONS:
            sizes[name] = sizes.get(name, 0) + shards.size_of(weight)
    return max(sizes, key=lambda name: sizes[name]) if sizes else PRECISIONS[0]


@contextmanager
def measuring(model: Any, precision: str | None = None) -> Iterator[None]:
    """The one way in which models are measured, whatever surrounds it: a trainer's autocast, TF32, gradients.

    "float32": autocast is off, and so is TF32. "bfloat16" or "float16": under the autocast of that type, whether the
    weights are of it or not. None: as the weights are (`precision_of`). Without gradients and dropout; all of it is put
    back. Raises RazorError for half-precision weights that are to be measured in float32.
    """
    own = precision_of(model)
    precision = precision or own
    if precision == "float32" and own in PRECISIONS[1:]:
        raise RazorError(
            f"This is to be measured in float32, and the model's weights are {own}, whose rounding would count as "
            f"drift: load it in float32, or measure both sides in {own} (a law: calibrate with --dtype {own})."
        )
    half = getattr(torch, precision) if precision in PRECISIONS[1:] else None
    device = device_of(model).type
    products = torch.autocast(device, half) if half else float32_products(device)
    with torch.no_grad(), eval_mode(model), own_forward(model), products:
        yield


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Without the autocast that accelerate, in preparing a model, has put around its `forward` or that of a part."""
    wrapped = [module for module in model.modules() if {"forward", "_original_forward"} <= vars(module).keys()]
    before = [module.forward for module in wrapped]
    for module in wrapped:
        module.forward = module._original_forward
    try:
        yield
    finally:
        for module, forward in zip(wrapped, before, strict=True):
            module.forward = forward


@contextmanager
def float32_products(device: str) -> Iterator[None]:
    """Products of float32 matrices in float32: neither autocast nor TF32."""
    with torch.autocast(device, enabled=False), _without_tf32():
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Torch has two interfaces to this, and reading the older one can raise."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new one was used
        legacy = None
    places: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    products = [place.matmul for place in places if hasattr(place, "matmul")]
    backends = [backend for backend in products if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    try:
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


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
