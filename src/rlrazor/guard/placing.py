"""Where a trainer puts its model, and in what precision it multiplies: what a monitor has to know of it."""

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType

from rlrazor.errors import RazorError


def is_placed_later(args: Any, model: Any) -> bool:
    """Whether the trainer will move or cast the model as training begins: what is measured is what is trained."""
    device = getattr(args, "device", None)
    elsewhere = device is not None and next(model.parameters()).device.type != torch.device(device).type
    # By the trainer's own argument, or by `accelerate launch`.
    return elsewhere or any(getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin"))


def require_whole(args: Any, model: Any) -> None:
    """Raise RazorError where no process holds the whole model: FSDP, ZeRO-3, or distributed tensors."""
    by_fsdp = is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP
    parts = (hasattr(one, "ds_id") or type(one.data).__name__ == "DTensor" for one in model.parameters())
    if getattr(args, "fsdp", None) or by_fsdp or any(parts):
        raise RazorError(
            "ForgettingMonitor needs every process to hold the whole model, which FSDP and ZeRO-3 do not do. Use "
            "DistributedDataParallel or ZeRO-2, or measure the checkpoints afterwards with `razor compare`."
        )


def multiplies_in_half(args: Any, model: Any) -> bool:
    """Whether training multiplies in half precision on a GPU."""
    state = AcceleratorState() if is_initialized() else None
    # `accelerate launch` sets it beside the trainer's own arguments.
    half = getattr(state, "mixed_precision", "no") != "no" or any(
        getattr(args, name, False) for name in ("bf16", "fp16")
    )
    return bool(half) and next(model.parameters()).device.type == "cuda"
