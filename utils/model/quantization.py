"""Frozen linear layers that hold their weights in int8 or NF4 and compute in the model's own dtype.

bitsandbytes defines the storage format; the arithmetic is the same everywhere: dequantise, then one matrix product,
forward and backward, in training, evaluation, chat and serving, on CPU and GPU. (bitsandbytes' own modules compute
another function in eval() than in train() on a CPU, and can't be sharded.) The weight is an ordinary parameter, so FSDP
can share it out; what is needed to dequantise it is small and lies in buffers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from utils.model.copy_after import copy_after

NF4_BLOCK = 64
"""Weights that share one scale (QLoRA's setting)."""
ABSMAX_BLOCK = 256
"""Scales that share one scale of their own (double quantisation)."""

Dequantize = Callable[..., torch.Tensor]
"""(dtype, *tensors that the layer stores) -> the weight in that dtype, shape [out_features, in_features]."""


def is_quantized(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is one that is quantised: the decoder's linear layers; embedding and head stay as they are."""
    return name.startswith("model.layers.") and name.endswith(".weight") and weight.dim() == 2


class FrozenMatmul(torch.autograd.Function):
    """y = x W^T for a frozen W that is dequantised when needed, so that no copy of it is kept between the passes.

    With an adapter's A x and scaling B it is y = x W^T + (A x) B^T, rounded once; see utils/model/fused_arithmetic.py.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        narrow: torch.Tensor | None,
        b: torch.Tensor | None,
        dequantize: Dequantize,
        *stored: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(narrow, b, *stored)
        weight = dequantize(x.dtype, *stored)
        if narrow is None or b is None:
            return x @ weight.t()
        return torch.cat((x, narrow), dim=-1) @ torch.cat((weight, b), dim=1).t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        narrow, b, *saved = ctx.saved_tensors
        stored = tuple(saved)
        grad_x = grad_narrow = grad_b = None
        if narrow is not None:
            grad_narrow = grad_output @ b
            grad_b = grad_output.flatten(0, -2).t() @ narrow.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if torch.compiler.is_compiling() and len(stored) > 1:  # or the weight would be kept, see copy_after
                stored = (stored[0], copy_after(stored[1], grad_output), *stored[2:])
            grad_x = grad_output @ ctx.dequantize(grad_output.dtype, *stored)
        return grad_x, grad_narrow, grad_b, None, *(None for _tensor in stored)


def as_stored(_dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """The weight of a layer that is not quantised, as it is stored; a `Dequantize`."""
    return weight


class QuantizedLinear(nn.Linear):
    """A frozen linear layer; a subclass of nn.Linear so that PEFT puts its adapters over it.

    Args:
        linear: the layer to stand in for; its weight may be on the meta device.
        compute_dtype: dtype of the products.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        self.weight, self.bias = nn.Parameter(self.empty_storage(), requires_grad=False), linear.bias

    @property
    def W_q(self) -> torch.Tensor:
        """The stored weight, under the name by which PEFT knows that `dequantize` gives the weight that DoRA needs."""
        return self.weight

    def empty_storage(self) -> torch.Tensor:
        """The weight's place before it is filled, on the meta device, in the shape and dtype that it is stored in."""
        raise NotImplementedError

    def quantize_(self, weight: torch.Tensor) -> None:
        """Store `weight`, shape [out_features, in_features], on the device that it is on."""
        raise NotImplementedError

    def stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that `dequantize_stored` takes."""
        raise NotImplementedError

    @staticmethod
    def dequantize_stored(dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
        """The weight in `dtype`, shape [out_features, in_features]."""
        raise NotImplementedError

    @classmethod
    def dequantize_fused(cls, dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
        """The weight in `dtype`, in operations that a compiler joins with others, and takes longer to compile."""
        return cls.dequantize_stored(dtype, *stored)

    def dequantize(self) -> torch.Tensor:
        """The weight in compute_dtype, shape [out_features, in_features]."""
        return self.dequantize_stored(self.compute_dtype, *self.stored())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b for x of shape [..., in_features]."""
        y = FrozenMatmul.apply(x.to(self.compute_dtype), None, None, self.dequantize_stored, *self.stored())
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Linear(QuantizedLinear):
    """A linear layer in int8 with one scale a row, bitsandbytes' LLM.int8() storage (Dettmers et al. 2022)."""

    def empty_storage(self) -> torch.Tensor:
        """See QuantizedLinear."""
        return torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")

    def quantize_(self, weight: torch.Tensor) -> None:
        """See QuantizedLinear."""
        weight = weight.float()
        absmax = weight.abs().amax(dim=1, keepdim=True)
        scaled = weight * (127 / absmax.clamp(min=torch.finfo(torch.float32).tiny))
        self.weight = nn.Parameter(scaled.round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", absmax / 127, persistent=False)

    def stored(self) -> tuple[torch.Tensor, ...]:
        """See QuantizedLinear."""
        return self.weight, self.scale

    @staticmethod
    def dequantize_stored(dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear."""
        weight, scale = stored
        return (weight * scale).to(dtype)


class Nf4Linear(QuantizedLinear):
    """A linear layer in 4-bit NormalFloat with double-quantised scales (QLoRA, Dettmers et al. 2023).

    The storage is bitsandbytes'.
    """

    def empty_storage(self) -> torch.Tensor:
        """See QuantizedLinear. Rows stay rows, so that FSDP shards them; two weights share a byte."""
        if self.in_features % 2:
            raise UserError(
                _("This model has a layer {width} wide; 4 bit needs even widths: use 8bit.", width=self.in_features)
            )
        return torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8, device="meta")

    def quantize_(self, weight: torch.Tensor) -> None:
        """See QuantizedLinear."""
        from bitsandbytes import functional

        # fp32 first: the same stored bits come out whatever dtype the weight file has.
        packed, state = functional.quantize_4bit(
            weight.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )
        assert state.state2.blocksize == ABSMAX_BLOCK
        self.weight = nn.Parameter(packed.view(self.out_features, -1), requires_grad=False)
        self.register_buffer("absmax", state.absmax, persistent=False)
        self.register_buffer("absmax_offset", state.offset, persistent=False)
        self.register_buffer("absmax_absmax", state.state2.absmax, persistent=False)
        self.register_buffer("absmax_code", state.state2.code, persistent=False)
        self.register_buffer("code", state.code, persistent=False)

    def stored(self) -> tuple[torch.Tensor, ...]:
        """See QuantizedLinear."""
        return self.weight, self.absmax, self.absmax_offset, self.absmax_absmax, self.absmax_code, self.code

    @staticmethod
    def dequantize_stored(dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear."""
        weight, absmax, offset, absmax_absmax, absmax_code, _code = stored
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        # bitsandbytes' kernel for CPUs lets a block end with its row; in what is stored it runs on.
        shape = (rows, columns) if columns % NF4_BLOCK == 0 else (1, rows * columns)
        kernels = torch.ops.bitsandbytes
        scales = kernels.dequantize_blockwise(absmax, absmax_absmax, absmax_code, ABSMAX_BLOCK, torch.float32) + offset
        return kernels.dequantize_4bit(weight.view(-1, 1), scales, NF4_BLOCK, "nf4", shape, dtype).view(rows, columns)

    @classmethod
    def dequantize_fused(cls, dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
        """See QuantizedLinear. The same numbers in plain operations, one pass over the memory once compiled."""
        weight, absmax, offset, absmax_absmax, absmax_code, code = stored
        if not torch.compiler.is_compiling() or 2 * weight.numel() % NF4_BLOCK:
            return cls.dequantize_stored(dtype, *stored)
        group = torch.arange(absmax.shape[0], device=absmax.device) // ABSMAX_BLOCK
        scales = absmax_code[absmax.int()] * absmax_absmax[group] + offset
        # The first of the two weights in a byte lies in its upper half.
        shift = 4 - 4 * torch.arange(2, device=weight.device)
        values = code[(weight.view(-1, NF4_BLOCK // 2, 1).int() >> shift) & 15]
        return (values * scales[:, None, None]).to(dtype).view(weight.shape[0], 2 * weight.shape[1])


QUANTIZED_LINEARS: dict[Quantization, type[QuantizedLinear]] = {"8bit": Int8Linear, "4bit": Nf4Linear}
"""The layer that stands in for nn.Linear, by the value of --quantization."""


def quantize_linears(module: nn.Module, quantization: Quantization, compute_dtype: torch.dtype) -> None:
    """Replace every linear layer within `module` by an empty quantised one, to be filled by `quantize_`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QUANTIZED_LINEARS[quantization](child, compute_dtype))
        else:
            quantize_linears(child, quantization, compute_dtype)


def rounded_weight(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """What `quantization` makes of a weight: quantised and dequantised again, fp32, same shape."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer = QUANTIZED_LINEARS[quantization](linear, torch.float32)
    layer.quantize_(weight)
    return layer.dequantize()
