"""LoRA's plain layers in 16 bits: what the adapter adds is not rounded away.

PEFT's own forward pass rounds W x first, or, compiled, W x and B A x; see utils/model/fused_arithmetic.py.
"""

import types

import torch
from torch import nn

from utils.model.quantization import FrozenMatmul, QuantizedLinear, as_stored


def add_before_rounding(model: nn.Module) -> None:
    """Let the LoRA layers of a model compute W x + scaling B A x as one product, rounded once, DoRA's as well.

    What PEFT can switch (other adapters, none, merged weights) they leave aside from here on.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = types.MethodType(_dora_forward if module.use_dora["default"] else _forward, module)


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """The 2-norm of each row of a weight [out, in], fp32, shape [out]."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    x = x.to(_dtype(base))
    y = _product(layer, x, layer.lora_dropout["default"](x))
    return y if base.bias is None else y + base.bias


def _dora_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The rows of W + scaling B A, made as long as the learnt magnitudes say, times x (Liu et al. 2024, equation 5)."""
    base, dropout = layer.base_layer, layer.lora_dropout["default"]
    x = x.to(_dtype(base))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # Their lengths take no gradient (section 4.3), and are rounded nowhere: what is learnt is small beside them.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        weight = base.dequantize() if isinstance(base, QuantizedLinear) else base.weight
        lengths = row_lengths(torch.addmm(weight.float(), b.float(), a.float(), alpha=layer.scaling["default"]))
    scale = layer.lora_magnitude_vector["default"].weight.float() / lengths
    if layer.training and not isinstance(dropout, nn.Identity):
        # As PEFT has it: what is dropped takes part as W x alone.
        dropped = dropout(x)
        y = _product(layer, dropped, dropped) * scale + base(x - dropped)
    else:
        y = _product(layer, x, x) * scale
        y = y if base.bias is None else y + base.bias
    return y.to(x.dtype)


def _dtype(base: nn.Module) -> torch.dtype:
    """The dtype that a base layer computes in."""
    return base.compute_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype


def _product(layer: nn.Module, x: torch.Tensor, of_adapter: torch.Tensor) -> torch.Tensor:
    """W x + scaling B A x, both x in the base's dtype; the adapter's may be another one."""
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        dequantize, stored = base.dequantize_stored, base.stored()
    else:
        dequantize, stored = as_stored, (base.weight,)
    a = layer.lora_A["default"].weight.to(x.dtype)
    b = (layer.lora_B["default"].weight * layer.scaling["default"]).to(x.dtype)
    return FrozenMatmul.apply(x, of_adapter @ a.t(), b, dequantize, *stored)
