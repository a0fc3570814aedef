"""Models that do not fit on one device: placed over several by accelerate, on the CPU and on disk what is left over.

Of such a model a weight may not be in memory (it is on torch's `meta` device, which holds nothing) but in the hook that
accelerate has put around its layer, which brings it as the layer runs. What looks at weights asks here for them.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IN_PEFT = "base_model.model."  # what PEFT puts in front of a base's names
KEPT_FREE = 0.1  # of a device's memory: for activations, and for what a measurement keeps


def room() -> dict[int | str, int]:
    """Bytes that a model may take of each accelerator's memory, and of the machine's ("cpu")."""
    found: dict[int | str, int] = {}
    for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found[place] = int(torch.cuda.mem_get_info(place)[0] * (1 - KEPT_FREE))
    with suppress(Exception):  # of psutil's, by system
        import psutil

        found["cpu"] = int(psutil.virtual_memory().available * (1 - KEPT_FREE))
    return found


def placing(size: int, device: torch.device, *, quantised: bool) -> dict[str, Any]:
    """What `from_pretrained` is told of where a model of so many bytes goes: nothing, where it fits on the device.

    What is quantised is loaded where it stays, as not all of it can be moved.
    """
    there = room()
    first = there.get(device.index or 0) if device.type == "cuda" else there.get("cpu")
    if first is None or size <= first:
        return {"device_map": {"": device}} if quantised else {}
    return {"device_map": "auto", "max_memory": there, "offload_folder": tempfile.mkdtemp(prefix="rlrazor-")}


def forget_folder(model: Any, folder: str | None) -> None:
    """Remove what was offloaded into a folder when the model goes."""
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_placed(model: Any) -> bool:
    """Whether accelerate has placed it, so that it is not to be moved as a whole."""
    return len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1


@contextmanager
def left_placed(model: Any, adapter: Path) -> Iterator[dict[str, Any]]:
    """While PEFT puts the adapter of a file around it: what it is told so that a placed model stays where it is.

    The adapter's own weights are small, and in memory where their layers run: PEFT would leave them where the layers'
    weights are, which for offloaded ones is nowhere.
    """
    if not is_placed(model):
        yield {}
        return
    where = vars(model).pop("hf_device_map")
    try:
        yield {"low_cpu_mem_usage": True}
    finally:
        model.hf_device_map = where
    from safetensors.torch import load_file

    stored = {name.removeprefix(IN_PEFT): weight for name, weight in load_file(adapter).items()}
    for path, layer in model.named_modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        runs_on = next((hook.execution_device for hook in _hooks(layer.get_base_layer())), None)
        for name, parameter in list(layer.named_parameters()):
            saved_as = f"{path}.{name}".replace(".default", "")  # a DoRA's magnitude is a module, saved as a weight
            if (weight := stored.get(saved_as, stored.get(saved_as.removesuffix(".weight")))) is not None:
                inside, _, own = name.rpartition(".")
                weight = weight.to(runs_on or parameter.device, parameter.dtype)
                layer.get_submodule(inside)._parameters[own] = nn.Parameter(weight, requires_grad=False)
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            _bring_base_of(magnitude)


def _bring_base_of(magnitude: nn.Module) -> None:
    """Have the weights of the layer that DoRA rescales in memory while it does: it looks at them after that has run."""
    held = ExitStack()

    def before(_: nn.Module, given: Any, named: dict[str, Any]) -> None:
        held.enter_context(brought(named["base_layer"]))

    def after(*_: Any) -> None:
        held.close()

    magnitude.register_forward_pre_hook(before, with_kwargs=True)
    magnitude.register_forward_hook(after, always_call=True)


def device_of(model: Any) -> torch.device:
    """Where a model takes its tokens: where its first parameter is, or is brought to as it runs."""
    first = next(model.parameters())
    if first.device.type != "meta":
        return torch.device(first.device)
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return torch.device(first.device)


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """With the weights of a module, and of those in it, in memory."""
    with ExitStack() as stack:
        for part in module.modules():
            if any(weight.device.type == "meta" for weight in part.parameters(recurse=False)):
                from accelerate.utils.modeling import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def brought_weight(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, in memory: itself, or a copy of one that is offloaded."""
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.device.type != "meta":
        return parameter
    with brought(module):
        brought_in = module._parameters[name]
        assert brought_in is not None
        return brought_in.detach().clone()


def without_hooks(module: nn.Module) -> None:
    """Take accelerate's hooks off a copy of a layer whose weights have been brought in."""
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module, recurse=True)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
