"""LoRA's plain layers in 16 bits: what the adapter adds is not rounded away.

PEFT's own forward pass rounds W x first, or, compiled, W x and B A x; see utils/model/fused_arithmetic.py.
"""

import types

import torch
from torch import nn

from utils.model.quantization import FrozenMatmul, QuantizedLinear, as_stored


def add_before_rounding(model: nn.Module) -> None:
    """Let the LoRA layers of a model that is trained compute W x + scaling B A x as one product, rounded once.

    What PEFT can switch (other adapters, none, merged weights) they leave aside from here on.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = types.MethodType(_forward, module)


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        dtype, dequantize, stored = base.compute_dtype, base.dequantize_stored, base.stored()
    else:
        dtype, dequantize, stored = base.weight.dtype, as_stored, (base.weight,)
    x = x.to(dtype)
    a = layer.lora_A["default"].weight.to(dtype)
    b = (layer.lora_B["default"].weight * layer.scaling["default"]).to(dtype)
    y = FrozenMatmul.apply(x, layer.lora_dropout["default"](x) @ a.t(), b, dequantize, *stored)
    return y if base.bias is None else y + base.bias
