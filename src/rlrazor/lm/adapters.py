"""Models with a PEFT adapter: the base without it, and the weights of either by the base's names.

Nothing here goes by the kind of an adapter: PEFT's layers say themselves what they were put around, and what they make
of it when they are merged.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlrazor.errors import RazorError


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel and torch.compile; FSDP1's wrapper gathers weights, and stays."""
    while (
        "_fsdp_wrapped_module" not in getattr(model, "_modules", ())
        and (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None
    ):
        model = inner
    return model


def without_wrapper(model: Any) -> Any:
    """The model inside of a PEFT model, with the adapter in its layers; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_adapted(model: Any) -> bool:
    """Whether this is a PEFT model, whose adapter can be switched off."""
    return hasattr(unwrapped(model), "disable_adapter")


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """A PEFT model without its adapter, whatever that has learnt; any other model as it is.

    Whether that is the base is another matter: some adapters change the base's weights as they are put on.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    # PEFT, as it puts the adapter back, makes all of it trainable: what the user froze has to stay frozen.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            # Also until then: what FSDP2 gathers first without gradients, it never computes gradients of.
            for parameter, before in trained:
                parameter.requires_grad_(before)
            yield
    finally:
        for parameter, before in trained:
            parameter.requires_grad_(before)


class _Place(NamedTuple):
    """Where a parameter of the base is: itself, the outermost module of PEFT's around it, and its name within that."""

    parameter: Tensor
    around: nn.Module | None
    path: str


def _inside(module: nn.Module) -> nn.Module | None:
    """What one of PEFT's modules was put around; None for any other module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        return getattr(module, "base_layer", None)
    if hasattr(module, "modules_to_save") or hasattr(module, "token_adapter"):
        return getattr(module, "original_module", None)
    return None


def _places(model: Any) -> dict[str, _Place]:
    """The base's parameters by its names, tied ones once, as `named_parameters` of the base gave them."""
    model = unwrapped(model)
    if not getattr(model, "peft_config", None):
        return {name: _Place(parameter, None, name) for name, parameter in model.named_parameters()}
    found: dict[str, _Place] = {}
    seen: set[int] = set()
    repeats = any(getattr(config, "layer_replication", None) for config in model.peft_config.values())

    def walk(module: nn.Module, prefix: str, around: nn.Module | None, path: str) -> None:
        while (inner := _inside(module)) is not None:
            around, path = (module, "") if around is None else (around, path)
            module = inner
        for name, parameter in module._parameters.items():
            # Tied weights are one, but layers that PEFT has repeated are several: each has an adapter of its own.
            if parameter is not None and (id(parameter) not in seen or (repeats and around is not None)):
                seen.add(id(parameter))
                found[prefix + name] = _Place(parameter, around, path + name)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.", around, f"{path}{name}.")

    # Without one, transformers has put the adapter into the model itself (`add_adapter`).
    walk(without_wrapper(model), "", None, "")
    return found


def base_parameters(model: Any) -> dict[str, Tensor]:
    """The base's parameters as the modules have them, which of a sharded model is a part of each."""
    return {name: place.parameter for name, place in _places(model).items()}


def base_weights(model: Any) -> dict[str, Tensor]:
    """The base's parameters themselves, by its names: those under an adapter, and inside of a wrapper.

    Parameters that PEFT keeps a trained copy of (`modules_to_save`) are the originals.
    """
    return {name: place.parameter.detach() for name, place in _places(model).items()}


def base_weights_under_adapter(model: Any) -> dict[str, Tensor]:
    """Of the base's parameters those that an adapter, or a trained copy, was put around."""
    return {name: place.parameter.detach() for name, place in _places(model).items() if place.around is not None}


class AdaptedWeights(Mapping[str, Tensor]):
    """A model's parameters by the base's names, adapters merged in, one at a time as they are asked for.

    Merged in a copy of the layer: taking an update away again would leave rounding errors in the base. Of modules that
    PEFT trains copies of, the copies. Asking for one that PEFT cannot merge raises RazorError.
    """

    def __init__(self, model: Any) -> None:
        self._places = _places(model)
        self._last: tuple[nn.Module | None, nn.Module | None] = None, None  # asked for one after another

    def __getitem__(self, name: str) -> Tensor:
        parameter, around, path = self._places[name]
        if around is None:
            return parameter.detach()
        if self._last[0] is not around:
            self._last = around, _merged(around)
        assert self._last[1] is not None
        return self._last[1].get_parameter(path).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@torch.no_grad()
def _merged(module: nn.Module) -> Any:
    """What one of PEFT's modules stands for: a copy of the one that it is around, with what it has learnt."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    copies: Any = getattr(module, "modules_to_save", None)
    if copies is not None:
        active = [copies[name] for name in getattr(module, "active_adapters", ()) if name in copies]
        trained: Any = active[0] if active else module.original_module
        return trained
    own = copy.deepcopy(module)
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in own.parameters()):
        own.float()  # in half precision a small update would be lost, which the model adds to outputs, not to weights
    for layer in own.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            try:
                layer.merge()
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                raise RazorError(f"PEFT cannot merge this adapter into the weights: {error}") from error
    inner: nn.Module | None = own
    while inner is not None:
        own, inner = inner, _inside(inner)
    return own


def weights_of(model: Any) -> dict[str, Tensor]:
    """A copy of all parameters, by the base's names, adapters merged in."""
    return {name: weight.clone() for name, weight in AdaptedWeights(model).items()}
