"""Quantised models: what they are called, and their weights as numbers.

Transformers loads a folder as its config says it was quantised. A quantised layer computes with numbers that its few
bits stand for; these are what is compared with other weights, not the bits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlrazor.lm.offloading import brought_weight

_METHODS = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "fp8": "FP8", "mxfp4": "MXFP4"}


def scheme_of(config: Any) -> str:
    """What a model's config (an object, or its JSON) says of how it is quantised, in words; "" where it does not."""
    said = (
        config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    )
    if not said:
        return ""
    if not isinstance(said, dict):
        said = said.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method")) or "quantised")[:40]
    if said.get("load_in_4bit") or said.get("_load_in_4bit"):
        return f"bitsandbytes, 4 bits ({str(said.get('bnb_4bit_quant_type') or 'fp4')[:10]})"
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return "bitsandbytes, 8 bits"
    bits = said.get("bits") or said.get("nbits") or said.get("w_bit")
    name = _METHODS.get(method, method.upper() if len(method) < 5 else method)
    return f"{name}, {bits} bits" if isinstance(bits, int) else name


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is not the numbers that it computes with."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    is_plain = weight.is_floating_point() and weight.itemsize > 1 and type(weight.data) is Tensor  # not FP8's
    return not is_plain


@torch.no_grad()
def plain_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's parameter as the numbers that it computes with: itself, where it is not quantised.

    Raises NotImplementedError for a quantisation that is not known here.
    """
    parameter: Any = module._parameters[name]
    if name != "weight" or not is_quantised(module):
        return brought_weight(module, name).detach()
    kind = type(parameter).__name__
    if kind == "Params4bit":
        from bitsandbytes import functional

        values: Tensor = functional.dequantize_4bit(parameter.data, parameter.quant_state)
        return values
    if kind == "Int8Params":
        scale = getattr(parameter, "SCB", None)
        held: Any = module.state
        scale = held.SCB if scale is None else scale
        rows: Tensor = parameter.data.float() * (scale.float()[:, None] / 127)
        return rows
    # Torchao's and quanto's tensors; a plain one has the method too, and FP8's scale is not in it.
    if type(parameter.data) is not Tensor and hasattr(parameter.data, "dequantize") and parameter.is_floating_point():
        numbers: Tensor = parameter.data.dequantize().detach()
        return numbers
    raise NotImplementedError(f"{kind} weights are not read as numbers")
