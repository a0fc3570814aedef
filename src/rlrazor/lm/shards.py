"""Models whose weights are spread over processes: which those are, and their weights whole, one at a time.

FSDP2 (`fully_shard`), FSDP1 (`FullyShardedDataParallel`) and DeepSpeed's ZeRO-3. All three gather a part's weights as
the part is called and let go of them afterwards, so a forward pass needs nothing of this; reading a weight does.
Left out: tensor and pipeline parallel, where no process ever computes a whole layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # in the names of parameters
Named = Callable[[Any], Mapping[str, Tensor]]


def is_sharded(model: Any) -> bool:
    """Whether no process has all of it whole."""
    return isinstance(model, nn.Module) and (
        any(_is_fsdp2(module) or _is_fsdp1(module) for module in model.modules()) or _is_zero3(model)
    )


def units(model: Any) -> list[tuple[Any, Any]]:
    """The parts that gather their weights as they are called, and the modules whose `forward` then runs, outer first.

    The model itself is among them, whether it gathers anything or not.
    """
    modules = list(model.modules())
    zero3 = _is_zero3(model)
    found = [(one, inside(one)) for one in modules if _is_fsdp2(one) or _is_fsdp1(one) or (zero3 and _is_called(one))]
    return found if found and found[0][0] is model else [(model, inside(model)), *found]


def inside(module: Any) -> Any:
    """The module inside of FSDP1's wrapper; any other itself."""
    return module._modules["_fsdp_wrapped_module"] if _is_fsdp1(module) else module


def name_of(model: Any) -> str:
    """The name of a model's class, without FSDP's."""
    return type(inside(model)).__name__.removeprefix("FSDP")


def computed_in(model: Any) -> torch.dtype | None:
    """What FSDP casts weights to as it gathers them; None where it does not."""
    if not isinstance(model, nn.Module):
        return None
    for module in map(_as_any, model.modules()):
        if _is_fsdp1(module) or _is_fsdp2(module):
            policy = module.mixed_precision if _is_fsdp1(module) else module._get_fsdp_state()._mp_policy
            return policy.param_dtype  # type: ignore[no-any-return]
    return None


def computed_on(model: Any) -> torch.device | None:
    """Where FSDP computes, which may keep weights elsewhere; None of other models."""
    for module in map(_as_any, model.modules() if isinstance(model, nn.Module) else ()):
        if _is_fsdp1(module) or _is_fsdp2(module):
            return torch.device(module.compute_device if _is_fsdp1(module) else module._get_fsdp_state()._device)
    return None


def size_of(weight: Tensor) -> int:
    """How many numbers a parameter has in all processes together; of FSDP1, those of this one."""
    return int(getattr(weight, "ds_numel", None) or weight.numel())


def let_go(model: Any) -> None:
    """Of the weights that FSDP2 keeps gathered after a forward pass, for a backward pass that will not come."""
    for module in model.modules():
        if _is_fsdp2(module):
            module.reshard()


def whole(model: Any, named: Named) -> Iterator[tuple[str, Tensor]]:
    """The parameters that `named` finds, each whole until the next is asked for; all processes have to ask alike."""
    let_go(model)
    seen: set[str] = set()
    for unit in (module for module in model.modules() if _is_fsdp1(module)):
        with _summoned(unit) as own:
            for name, weight in named(model).items():
                if id(weight) in own:
                    seen.add(plain(name))
                    yield plain(name), weight.detach()
    for name, weight in named(model).items():
        if plain(name) not in seen and "_flat_param" not in name:
            with _gathered(weight) as whole:
                yield plain(name), whole


@contextmanager
def _summoned(unit: Any) -> Iterator[set[int]]:
    """Ids of a unit of FSDP1's own parameters, while they are whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
        flat = unit._flat_param
        places = chain(flat._param_infos, flat._shared_param_infos) if flat is not None else ()
        yield {id(getattr(place.module, place.param_name)) for place in places}


@contextmanager
def _gathered(weight: Tensor) -> Iterator[Tensor]:
    if hasattr(weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        gathering = GatheredParameters([weight])
    else:
        gathering = nullcontext()
    with gathering:
        own: Any = weight
        yield (own.full_tensor() if type(weight.data).__name__ == "DTensor" else own).detach()


def _as_any(module: Any) -> Any:
    return module


def plain(name: str) -> str:
    """The name of a parameter, or of a module, without those of what is wrapped around its parts."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_fsdp2(module: Any) -> bool:
    # By name: transformers shards through an older path of the same class, and a torch without it has none.
    return any(one.__name__ == "FSDPModule" for one in type(module).__mro__)


def _is_fsdp1(module: Any) -> bool:
    return "_fsdp_wrapped_module" in getattr(module, "_modules", ())


def _is_called(module: Any) -> bool:
    """Not a mere list of others."""
    return type(module).forward is not nn.Module.forward


def _is_zero3(model: Any) -> bool:
    return any(hasattr(weight, "ds_id") for weight in model.parameters())
