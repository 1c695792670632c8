"""Decoder layers over frozen weights with LoRA beside them, as utils/model/fused_arithmetic.py computes them.

`run_plain` (utils/model/decoder.py) is what a layer computes; these compute the same with less memory and in less time.
tests/parity/test_fused_layers.py holds both equal, in outputs and gradients.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from configs.messages import _
from configs.training import TrainingConfig
from utils.model import fused_arithmetic
from utils.model.activations import Activations
from utils.model.attention_kernels import varlen_kernel
from utils.model.decoder import causal_lm
from utils.model.families import FAMILIES
from utils.model.fused_arithmetic import Group, LayerShape, LayerWeights, Linear, Row, Saved
from utils.model.quantization import QuantizedLinear, as_stored
from utils.rows.segments import Segments

ALIGNED = 8
"""The matrix library's fast kernels want rows of a multiple of so many numbers."""


def why_plain(config: TrainingConfig, model: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """Why the fused layers can't stand in for those of a model with such a config.json; '' if they can."""
    if not varlen_kernel(device, dtype):
        return _("it needs bf16 or fp16 on an NVIDIA card, a P100 or newer")
    family = FAMILIES.get(model["model_type"])
    if not (family and family.has_fast_layers) or model.get("hidden_act", "silu") not in ("silu", "swish"):
        return _("it does not know models of the type {type}", type=model["model_type"])
    if config.method != "lora":
        return _("it is for LoRA over frozen weights")
    if config.lora_config.lora_dropout:
        return _("it has no dropout (--lora_config.lora_dropout 0)")
    if config.lora_config.use_dora:
        return _("it has no DoRA (--lora_config.use_dora False)")
    if not {*config.lora_config.modules_to_save} <= {"embed_tokens", "lm_head"}:
        return _("it does not train norms (--lora_config.modules_to_save)")
    if config.enable_fsdp:
        return _("FSDP gathers a layer's weights one by one")
    return ""


class AdapterCopy(NamedTuple):
    """A parameter of an adapter, and where the arithmetic reads it: in the compute dtype, times a factor."""

    parameter: nn.Parameter
    place: torch.Tensor
    factor: float


class AdaptedLinear:
    """A linear layer of the model with its LoRA adapter, if it has one, laid out for the arithmetic.

    Args:
        module: nn.Linear or QuantizedLinear, or PEFT's layer over one of them.
        a: the A of its group's adapters, see Group.
        columns: those of its adapter, see Linear.

    Attributes:
        linear: what the arithmetic reads.
        copies: A and B of the adapter, with their places in `a` and in the linear's `b`.
    """

    def __init__(self, module: nn.Module, a: torch.Tensor | None, columns: slice | None) -> None:
        base = getattr(module, "base_layer", module)
        b = weight_and_b = None
        scaling = 1.0
        self.copies: list[AdapterCopy] = []
        if a is not None and columns is not None:
            scaling = module.scaling["default"]
            b = a.new_zeros(base.out_features, len(a))
            if not isinstance(base, QuantizedLinear):
                weight_and_b = torch.cat((base.weight, b), dim=1)
                # The module's own weight is a view from here on, so that memory holds it once.
                base.weight.data, b = weight_and_b.split((base.in_features, len(a)), dim=1)
            self.copies = [
                AdapterCopy(module.lora_A["default"].weight, a[columns], 1.0),
                AdapterCopy(module.lora_B["default"].weight, b[:, columns], scaling),
            ]
        if isinstance(base, QuantizedLinear):
            dequantize, stored = base.dequantize_fused, base.stored()
        else:
            dequantize, stored = as_stored, (base.weight,)
        self.linear = Linear(dequantize, stored, base.bias, columns, b, weight_and_b, scaling)


class FusedLayers:
    """Stand-ins for all layers of a decoder, called in the place of `run_plain`.

    Args:
        model: with a LoRA adapter.
        dtype: to compute in.

    Attributes:
        weights: what the arithmetic reads of each layer.
        shapes: the numbers that it takes beside them.
        adapters: each layer's trained parameters, in the order of their gradients.
        kept_bytes: what a layer keeps of a token for its backward pass, tensor by tensor, but for a few narrow ones.
        functions: both passes of a layer.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights: dict[nn.Module, LayerWeights] = {}
        self.shapes: dict[nn.Module, LayerShape] = {}
        self.adapters: dict[nn.Module, list[nn.Parameter]] = {}
        self._copies: list[AdapterCopy] = []
        layers = causal_lm(model).model.layers
        for layer in layers:
            groups = [_adapted_group(modules, dtype) for modules in _linears_by_input(layer)]
            self.weights[layer] = LayerWeights(*_norm_weights(layer), *(group for group, _copies in groups))
            copies = [copy for _group, copies in groups for copy in copies]
            self.adapters[layer] = [copy.parameter for copy in copies]
            self._copies += copies
            epsilon, attention = layer.input_layernorm.variance_epsilon, layer.self_attn
            self.shapes[layer] = LayerShape(attention.head_dim, epsilon, attention.scaling, _window(attention))
        attention, mlp = layers[0].self_attn, layers[0].mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj)
        widths = [*(linear.out_features for linear in linears), attention.o_proj.in_features]
        self.kept_bytes = [width * dtype.itemsize for width in widths]
        self.functions = Functions(fused_arithmetic.forward, fused_arithmetic.backward)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters' parameters as they are now; to be called whenever they have changed."""
        parameters, places, factors = map(list, zip(*self._copies, strict=True))
        torch._foreach_copy_(places, torch._foreach_mul(parameters, factors))

    def compile(self) -> None:
        """Compile forward and backward; all layers share the code, whatever a row's length is."""
        self.functions = Functions(*map(torch.compile, self.functions))

    def __call__(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        activations: Activations,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        **_plain: Any,
    ) -> torch.Tensor:
        """See run_plain."""
        cos, sin = position_embeddings
        row = Row(cos[0], sin[0], segments)
        call = _Call(self.functions, self.shapes[layer], self.weights[layer], row, activations, torch.is_grad_enabled())
        # A trained embedding gives fp32.
        return _FusedLayer.apply(hidden[0].to(self.dtype), call, *self.adapters[layer]).unsqueeze(0)


def _linears_by_input(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """A layer's linear modules; those that read the same input together, as LayerWeights has them."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]


def _window(attention: nn.Module) -> int | None:
    """The sliding window that a layer's attention module hands on to its kernel; None = it has none."""
    has_one = FAMILIES[attention.config.model_type].one_window
    return attention.config.sliding_window if has_one else getattr(attention, "sliding_window", None)


def _norm_weights(layer: nn.Module) -> list[torch.Tensor | None]:
    """The weights of a layer's norms, in the order of LayerWeights; None = the layer lacks this one."""
    attention = layer.self_attn
    of_heads = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    norms = (layer.input_layernorm, *of_heads, layer.post_attention_layernorm)
    return [norm.weight if norm else None for norm in norms]


def _adapted_group(modules: tuple[nn.Module, ...], dtype: torch.dtype) -> tuple[Group, list[AdapterCopy]]:
    """Linear modules that read the same input, laid out for the arithmetic, and all copies of their adapters."""
    ranks = [module.r["default"] if hasattr(module, "lora_A") else 0 for module in modules]
    width = math.ceil(sum(ranks) / ALIGNED) * ALIGNED
    a = modules[0].weight.new_zeros(width, modules[0].in_features, dtype=dtype) if width else None
    columns = (slice(end - rank, end) if rank else None for rank, end in zip(ranks, accumulate(ranks), strict=True))
    linears = [AdaptedLinear(module, a, own) for module, own in zip(modules, columns, strict=True)]
    return Group(tuple(each.linear for each in linears), a), [copy for each in linears for copy in each.copies]


class Functions(NamedTuple):
    """A layer's forward and backward pass (utils/model/fused_arithmetic.py), compiled or not."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Call(NamedTuple):
    """What a layer's two passes take beside its input."""

    functions: Functions
    shape: LayerShape
    weights: LayerWeights
    row: Row
    activations: Activations
    has_backward: bool


class _FusedLayer(torch.autograd.Function):
    """hidden -> hidden, [length, hidden_size]; the adapters' parameters are arguments because they take gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, call: _Call, *adapters: torch.Tensor) -> torch.Tensor:
        hidden = hidden.detach()  # whether it takes a gradient must not make other code
        _mark_row(hidden, call.row)
        output, saved = call.functions.forward(hidden, call.row, call.shape, call.weights, True)
        if call.has_backward:
            call.activations.put(saved.tensors)
            ctx.call, ctx.narrow = call, saved.narrow
            ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,), call, narrow = ctx.saved_tensors, ctx.call, ctx.narrow
        ctx.narrow = None
        _mark_row(hidden, call.row)
        if tensors := call.activations.get():
            saved = Saved(*tensors, narrow)
        else:
            _nothing, saved = call.functions.forward(hidden, call.row, call.shape, call.weights, False)
        (grad_output,) = grad_outputs
        _mark_length(grad_output, *saved.tensors[:-1])
        _mark_length(*(narrow for narrow in saved.narrow if narrow is not None))
        torch._dynamo.maybe_mark_dynamic(saved.log_sum_exp, 1)
        grad_hidden, grads = call.functions.backward(
            grad_output.contiguous(), hidden, saved, call.row, call.shape, call.weights
        )
        return grad_hidden, None, *grads


def _mark_row(hidden: torch.Tensor, row: Row) -> None:
    """Let compiled code take any length of the row, and any number of segments."""
    _mark_length(hidden, row.cos, row.sin, row.segments.cumulative)
    if contexts := row.segments.contexts:
        _mark_length(contexts.cumulative, contexts.tokens, contexts.places_of_shared, contexts.places_of_own)
        torch._dynamo.maybe_mark_dynamic(contexts.places_of_shared, 1)


def _mark_length(*tensors: torch.Tensor) -> None:
    """Let compiled code take any length."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
