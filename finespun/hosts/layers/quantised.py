"""The one accessor for quantised weights: everything else in Finespun sees floats."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in less than a floating point number each."""
    weight: Any = layer._parameters.get("weight")
    if weight is None or hasattr(weight, "full_tensor"):  # a shard is no quantised weight
        return False
    return (
        (type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"))
        or not weight.is_floating_point()
        or getattr(weight, "quant_state", None) is not None
    )


def dequantise(layer: nn.Module, weight: Any) -> Tensor:
    """The weight (out, in) as floats: torchao's tensors through their own `dequantize`,
    bitsandbytes' 4-bit through their quantisation state, its int8 as CB · SCB / 127."""
    if getattr(weight, "quant_state", None) is not None:
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype == torch.int8 and hasattr(weight, "SCB"):
        state = getattr(layer, "state", None)
        scale = weight.SCB if weight.SCB is not None else state.SCB  # type: ignore[union-attr]
        values = weight.CB if weight.CB is not None else weight.data
        return values.float() * scale.float().view(-1, 1) / 127.0
    if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
        return weight.dequantize()
    return weight.data
