"""Where a trainer puts its model, and in what precision it multiplies: what a monitor has to know of it."""

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType

from rlrazor.errors import RazorError
from rlrazor.lm.quantised import scheme_of
from rlrazor.lm.shards import is_sharded

_SIZES = ("tp_size", "cp_size", "sp_size", "ep_size", "pp_size")  # of accelerate's and transformers' configs
_AFTERWARDS = (
    "Train without it, and measure the checkpoints as they are saved, from another process: "
    "`razor watch RUN_FOLDER --base MODEL --prompts FILE`."
)
_SPLIT = (
    "ForgettingMonitor cannot measure a model whose layers are split over processes ({how}), only one whose weights "
    "are (FSDP, ZeRO). " + _AFTERWARDS
)
_QUANTISED = "ForgettingMonitor cannot read a model that is both sharded and quantised ({how}). " + _AFTERWARDS


def is_placed_later(args: Any, model: Any) -> bool:
    """Whether the trainer will move, cast or shard the model as training begins: it is measured as it is trained."""
    if is_sharded(model) and not _by_deepspeed(args):  # by the user, or as it was loaded
        return False
    device = getattr(args, "device", None)
    elsewhere = device is not None and next(model.parameters()).device.type != torch.device(device).type
    # By the trainer's own argument, or by `accelerate launch`. Until then other processes than the first may have no
    # weights (cpu_ram_efficient_loading).
    state = AcceleratorState() if is_initialized() else None
    by_fsdp = bool(getattr(args, "fsdp", None)) or getattr(state, "distributed_type", None) == DistributedType.FSDP
    return elsewhere or by_fsdp or _by_deepspeed(args)


def _by_deepspeed(args: Any) -> bool:
    return any(getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin"))


def require_data_parallel(model: Any) -> None:
    """Raise RazorError where layers are split (tensor, pipeline, context or expert parallel), or packed bits."""
    if is_sharded(model) and (scheme := scheme_of(_config(model))):
        raise RazorError(_QUANTISED.format(how=scheme))
    state = AcceleratorState() if is_initialized() else None
    configs = [getattr(state, "parallelism_config", None), getattr(_config(model), "distributed_config", None)]
    sizes = {name: getattr(config, name, None) for config in configs if config is not None for name in _SIZES}
    found = [name.removesuffix("_size") for name, size in sizes.items() if isinstance(size, int) and size > 1]
    how = {"tp": "tensor", "cp": "context", "sp": "sequence", "ep": "expert", "pp": "pipeline"}
    if getattr(state, "distributed_type", None) == DistributedType.MEGATRON_LM:
        raise RazorError(_SPLIT.format(how="Megatron-LM"))
    if any(base.__name__ == "PipelineModule" for base in type(model).__mro__):
        raise RazorError(_SPLIT.format(how="pipeline parallel"))
    by_tensor = any(type(one.data).__name__ == "DTensor" for one in model.parameters()) and not is_sharded(model)
    if found or by_tensor or (getattr(model, "_tp_size", None) or 1) > 1:
        raise RazorError(_SPLIT.format(how=f"{how[found[0]] if found else 'tensor'} parallel"))


def _config(model: Any) -> Any:
    return getattr(model, "config", None)


def multiplies_in_half(args: Any, model: Any) -> bool:
    """Whether training multiplies in half precision on a GPU."""
    state = AcceleratorState() if is_initialized() else None
    # `accelerate launch` sets it beside the trainer's own arguments.
    half = getattr(state, "mixed_precision", "no") != "no" or any(
        getattr(args, name, False) for name in ("bf16", "fp16")
    )
    return bool(half) and next(model.parameters()).device.type == "cuda"
