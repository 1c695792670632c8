"""Decoder layers over frozen weights with LoRA beside them, as utils/model/fused_arithmetic.py computes them.

`run_plain` (utils/model/decoder.py) is what a layer computes; these compute the same with less memory and in less time.
tests/parity/test_fused_layers.py holds both equal, in outputs and gradients.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from configs.messages import _
from configs.training import TrainingConfig
from utils.model import fused_arithmetic
from utils.model.activations import Activations
from utils.model.attention_kernels import varlen_kernel
from utils.model.decoder import causal_lm
from utils.model.fused_arithmetic import Group, LayerShape, LayerWeights, Linear, Row, Saved
from utils.model.quantization import QuantizedLinear, as_stored
from utils.rows.segments import Segments

ALIGNED = 8
"""The matrix library's fast kernels want rows of a multiple of so many numbers."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers are: norm, q/k/v, perhaps norms of q's and k's heads, rotation, attention, o, residual, norm,
gate/up, SiLU, down, residual."""


def why_plain(config: TrainingConfig, model: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """Why these layers can't stand in for those of a model with such a config.json; '' if they can."""
    if not varlen_kernel(device, dtype):
        return _("it needs bf16 or fp16 on an NVIDIA card, a P100 or newer")
    if model["model_type"] not in MODEL_TYPES or model.get("hidden_act", "silu") not in ("silu", "swish"):
        return _("it does not know models of the type {type}", type=model["model_type"])
    if config.method != "lora":
        return _("it is for LoRA over frozen weights")
    if config.lora_config.lora_dropout:
        return _("it has no dropout (--lora_config.lora_dropout 0)")
    if not {*config.lora_config.modules_to_save} <= {"embed_tokens", "lm_head"}:
        return _("it does not train norms (--lora_config.modules_to_save)")
    if config.enable_fsdp:
        return _("FSDP gathers a layer's weights one by one")
    return ""


class FusedLayers:
    """Stand-ins for all layers of a decoder; called in the place of `run_plain`.

    Args:
        model: with a LoRA adapter.
        dtype: to compute in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.weights: dict[nn.Module, LayerWeights] = {}
        self.adapters: dict[nn.Module, list[nn.Parameter]] = {}
        self._parameters: list[nn.Parameter] = []
        self._copies: list[torch.Tensor] = []
        self._scalings: list[float] = []
        layers = causal_lm(model).model.layers
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.adapters[layer] = []
            groups = [
                self._group(layer, dtype, *modules)
                for modules in (
                    (attention.q_proj, attention.k_proj, attention.v_proj),
                    (attention.o_proj,),
                    (mlp.gate_proj, mlp.up_proj),
                    (mlp.down_proj,),
                )
            ]
            norms = (
                layer.input_layernorm,
                getattr(attention, "q_norm", None),
                getattr(attention, "k_norm", None),
                layer.post_attention_layernorm,
            )
            self.weights[layer] = LayerWeights(*(norm.weight if norm else None for norm in norms), *groups)
        self.dtype = dtype
        first = layers[0]
        self.shape = LayerShape(
            first.self_attn.head_dim, first.input_layernorm.variance_epsilon, first.self_attn.scaling
        )
        linears = (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj, first.self_attn.o_proj)
        widths = [linear.out_features for linear in (*linears, first.mlp.gate_proj, first.mlp.up_proj)]
        self.kept_bytes = [width * dtype.itemsize for width in (*widths, first.self_attn.o_proj.in_features)]
        """What a layer keeps of a token for its backward pass, tensor by tensor, but for a few narrow ones."""
        self.functions = Functions(fused_arithmetic.forward, fused_arithmetic.backward)

    def _group(self, layer: nn.Module, dtype: torch.dtype, *modules: nn.Module) -> Group:
        adapted = [module for module in modules if hasattr(module, "lora_A")]
        ranks = [module.r["default"] for module in adapted]
        starts = [sum(ranks[:i]) for i in range(len(adapted))]
        width = math.ceil(sum(ranks) / ALIGNED) * ALIGNED
        a = modules[0].weight.new_zeros(width, modules[0].in_features, dtype=dtype) if adapted else None
        linears = []
        for module in modules:
            base = getattr(module, "base_layer", module)
            is_quantized = isinstance(base, QuantizedLinear)
            columns = b = weight_and_b = None
            scaling = 1.0
            if module in adapted:
                start, rank = starts[adapted.index(module)], ranks[adapted.index(module)]
                columns, scaling = slice(start, start + rank), module.scaling["default"]
                if is_quantized:
                    b = a.new_zeros(base.out_features, width)
                else:
                    weight_and_b = torch.cat((base.weight, a.new_zeros(base.out_features, width)), dim=1)
                    base.weight.data, b = weight_and_b.split((base.in_features, width), dim=1)
                pair = [module.lora_A["default"].weight, module.lora_B["default"].weight]
                self.adapters[layer] += pair
                self._parameters += pair
                self._copies += [a[columns], b[:, columns]]
                self._scalings += [1.0, scaling]
            dequantize, stored = (base.dequantize_fused, base.stored()) if is_quantized else (as_stored, (base.weight,))
            linears.append(Linear(dequantize, stored, base.bias, columns, b, weight_and_b, scaling))
        return Group(tuple(linears), a)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters' parameters as they are now; to be called whenever they have changed."""
        torch._foreach_copy_(self._copies, torch._foreach_mul(self._parameters, self._scalings))

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
        call = _Call(self.functions, self.shape, self.weights[layer], row, activations, torch.is_grad_enabled())
        # A trained embedding gives fp32.
        return _FusedLayer.apply(hidden[0].to(self.dtype), call, *self.adapters[layer]).unsqueeze(0)


class Functions(NamedTuple):
    """Those of utils/model/fused_arithmetic.py, compiled or not."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Call(NamedTuple):
    """What a layer's passes are made of, beside its input."""

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
