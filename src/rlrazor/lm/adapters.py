"""Models with a PEFT adapter: the base without it, and the weights of either by the base's names.

Nothing here goes by the kind of an adapter: PEFT's layers say themselves what they were put around, and what they make
of it when they are merged.
"""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlrazor.errors import RazorError
from rlrazor.lm.offloading import brought, without_hooks
from rlrazor.lm.quantised import is_quantised, plain_weight
from rlrazor.lm.shards import inside, is_sharded

_off: "weakref.WeakSet[Any]" = weakref.WeakSet()  # models within `adapter_disabled`

_UNMERGED = "PEFT cannot merge this adapter into the weights: they are quantised."


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


def virtual_tokens(model: Any) -> int:
    """How many tokens an adapter puts in front of every prompt (prompt tuning and its kin); 0 for any other model."""
    config: Any = getattr(unwrapped(model), "active_peft_config", None) if is_adapted(model) else None
    return int(config.num_virtual_tokens or 0) if getattr(config, "is_prompt_learning", False) else 0


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """A PEFT model without its adapter, whatever that has learnt; any other model as it is.

    Whether that is the base is another matter: some adapters change the base's weights as they are put on.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    # PEFT, as it puts the adapter back, makes all of it trainable: what the user froze has to stay frozen.
    trained, on = [(parameter, parameter.requires_grad) for parameter in model.parameters()], model.forward
    own = inside(model)
    was_off = own in _off
    try:
        with model.disable_adapter(), _also_unwrapped(model, on):
            _off.add(own)
            # Also until then: what FSDP2 gathers first without gradients, it never computes gradients of.
            for parameter, before in trained:
                parameter.requires_grad_(before)
            yield
    finally:
        if not was_off:
            _off.discard(own)
        for parameter, before in trained:
            parameter.requires_grad_(before)


@contextmanager
def _also_unwrapped(model: Any, on: Any) -> Iterator[None]:
    """Where PEFT has put the base's forward in place of the model's, `on`, also in place of the one that accelerate has
    kept in preparing it, and that is measured (`compute.own_forward`)."""
    kept = vars(model).get("_original_forward")
    if kept is None or model.forward == on:
        yield
        return
    model._original_forward = vars(model.base_model).get("_original_forward", model.forward)
    try:
        yield
    finally:
        model._original_forward = kept


def is_adapter_off(model: Any) -> bool:
    """Whether this is within `adapter_disabled` of the model.

    The model does not say it in one way: of PEFT's layers `disable_adapters` is a property, of its models a method.
    """
    return inside(unwrapped(model)) in _off


class _Place(NamedTuple):
    """Where a parameter of the base is: the module it is of and its name there, the outermost module of PEFT's around
    it, and its name within that."""

    owner: nn.Module
    name: str
    around: nn.Module | None
    path: str

    def plain(self) -> Tensor:
        """The parameter as numbers, in memory; the bits themselves of a quantisation that is not known."""
        try:
            return plain_weight(self.owner, self.name)
        except NotImplementedError:
            parameter = self.owner._parameters[self.name]
            assert parameter is not None
            return parameter.detach()


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
        return {name: _Place(*_owner(model, name), None, name) for name, _ in model.named_parameters()}
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
                found[prefix + name] = _Place(module, name, around, path + name)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.", around, f"{path}{name}.")

    # Without one, transformers has put the adapter into the model itself (`add_adapter`).
    walk(without_wrapper(model), "", None, "")
    return found


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def base_parameters(model: Any, *, under_adapter: bool = False) -> Mapping[str, Tensor]:
    """The base's parameters as the modules of a sharded model have them, a part of each; of any other `BaseWeights`."""
    if not is_sharded(model):
        return BaseWeights(model, under_adapter=under_adapter)
    return {name: place.owner.get_parameter(place.name) for name, place in _chosen(model, under_adapter).items()}


def _chosen(model: Any, under_adapter: bool) -> dict[str, _Place]:
    places = _places(model).items()
    return {name: place for name, place in places if place.around is not None or not under_adapter}


class BaseWeights(Mapping[str, Tensor]):
    """The base's parameters by its names, as they are asked for: those under an adapter, and inside of a wrapper.

    The parameters themselves; of those that are quantised what they stand for, of those that are offloaded copies. Of
    parameters that PEFT keeps a trained copy of (`modules_to_save`), the originals. `under_adapter`: only those that an
    adapter, or a trained copy, was put around.
    """

    def __init__(self, model: Any, *, under_adapter: bool = False) -> None:
        self._places = _chosen(model, under_adapter)

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].plain()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class AdaptedWeights(Mapping[str, Tensor]):
    """A model's parameters by the base's names, adapters merged in, one at a time as they are asked for.

    Merged in a copy of the layer: taking an update away again would leave rounding errors in the base. Of modules that
    PEFT trains copies of, the copies. Asking for one that PEFT cannot merge raises RazorError.
    """

    def __init__(self, model: Any) -> None:
        self._places = _places(model)
        self._last: tuple[nn.Module | None, nn.Module | None] = None, None  # asked for one after another

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if (around := place.around) is None:
            return place.plain()
        if place.name == "weight" and is_quantised(place.owner) and not hasattr(around, "modules_to_save"):
            try:
                return plain_weight(place.owner, place.name) + _added(around)
            except NotImplementedError as error:
                raise RazorError(_UNMERGED) from error
        if self._last[0] is not around:
            with brought(around):
                self._last = around, _merged(around)
        assert self._last[1] is not None
        return self._last[1].get_parameter(place.path).detach()

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
    without_hooks(own)
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


@torch.no_grad()
def _added(module: nn.Module) -> Tensor:
    """What an adapter adds to a quantised weight: merged, it would be rounded to the few bits of the weight."""
    layer: Any = module
    if getattr(layer, "merged", False):
        raise RazorError(
            "An adapter is merged into quantised weights, so what it adds is not known: take it out (unmerge_adapter)."
        )
    if hasattr(layer, "get_delta_weight") and not any(getattr(layer, "use_dora", {}).values()):
        own = {name for held in layer.adapter_layer_names for name in getattr(layer, held, None) or ()}
        with suppress(RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError):
            parts = [layer.get_delta_weight(name) for name in layer.active_adapters if name in own]
            total: Tensor = torch.stack([part.float() for part in parts]).sum(dim=0) if parts else torch.zeros(())
            return total
    raise RazorError(_UNMERGED)


def weights_of(model: Any) -> dict[str, Tensor]:
    """A copy of all parameters, by the base's names, adapters merged in."""
    return {name: weight.clone() for name, weight in AdaptedWeights(model).items()}
