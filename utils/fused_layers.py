"""Decoder layers over frozen weights with LoRA beside them, forward and backward written by hand.

`run_plain` (utils/llama.py) is what a layer computes; this computes the same with less memory and in less time, because
it knows what autograd can't: the weights take no gradient, layers that read the same input can be one matrix product,
and norms and activations are cheaper to compute again than to keep. Between the matrix products stand pure functions of
tensors, so that torch.compile makes one kernel of each run of small operations. A test holds both paths equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad, silu

from configs.messages import _
from configs.training import TrainingConfig
from utils.attention import Segments, attention_backward, attention_forward, has_varlen
from utils.llama import causal_lm
from utils.quantization import QuantizedLinear

Tensors = tuple[torch.Tensor, ...]
Factors = tuple[torch.Tensor, torch.Tensor]
MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Families whose layers are: norm, q/k/v, rotation, attention, o, residual, norm, gate/up, SiLU, down, residual."""


@dataclass(frozen=True)
class LayerShape:
    """The numbers of a layer's arithmetic."""

    heads: int
    key_value_heads: int
    head_dim: int
    epsilon: float
    softmax_scale: float


class Linears(NamedTuple):
    """Linear layers that read the same input; their outputs lie side by side.

    Attributes:
        dequantize: makes a weight [out, in] of a dtype from one member's stored tensors.
        stored: what each member stores.
        bias: [sum of out], or None.
        lora_a: A of each adapted member, [r, in].
        lora_b: B of each adapted member, [out, r].
        places: first output row and scaling of each adapted member.
        width: sum of out.
    """

    dequantize: Callable[..., torch.Tensor]
    stored: tuple[Tensors, ...]
    bias: torch.Tensor | None
    lora_a: Tensors
    lora_b: Tensors
    places: tuple[tuple[int, float], ...]
    width: int

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """All weights one under another, [sum of out, in]."""
        weights = [self.dequantize(dtype, *stored) for stored in self.stored]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def adapter(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The members' adapters as one: A, [sum of r, in], and B times scaling in blocks, [sum of out, sum of r]."""
        if not self.lora_a:
            return None
        blocks = [
            pad(b.to(dtype) * scaling, (0, 0, start, self.width - start - b.shape[0]))
            for b, (start, scaling) in zip(self.lora_b, self.places, strict=True)
        ]
        return torch.cat([a.to(dtype) for a in self.lora_a]), torch.cat(blocks, dim=1)

    def split_gradients(self, grad_a: torch.Tensor, grad_b: torch.Tensor) -> Tensors:
        """Each member's gradients of A, then each one's of B, from those of `adapter`."""
        grads_a, grads_b, column = [], [], 0
        for a, b, (start, scaling) in zip(self.lora_a, self.lora_b, self.places, strict=True):
            end = column + a.shape[0]
            grads_a.append(grad_a[column:end].to(a.dtype))
            grads_b.append(grad_b[start : start + b.shape[0], column:end].to(b.dtype) * scaling)
            column = end
        return (*grads_a, *grads_b)


class LayerWeights(NamedTuple):
    """All tensors of a layer."""

    input_norm: torch.Tensor
    query_key_value: Linears
    output: Linears
    post_attention_norm: torch.Tensor
    gate_up: Linears
    down: Linears

    @property
    def groups(self) -> tuple[Linears, ...]:
        """The four groups of linear layers, in the data's order."""
        return self.query_key_value, self.output, self.gate_up, self.down


class Saved(NamedTuple):
    """What the backward pass needs beside the layer's input; `narrow` are the groups' inputs times A, [length, r]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention: torch.Tensor
    log_sum_exp: torch.Tensor
    middle: torch.Tensor
    gate_up: torch.Tensor
    narrow: tuple[torch.Tensor | None, ...]


class Row(NamedTuple):
    """Where the row's tokens stand: rotation [length, head_dim] and segment bounds."""

    cos: torch.Tensor
    sin: torch.Tensor
    cumulative: torch.Tensor
    longest: int


def why_not(config: TrainingConfig, model: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """Why these layers can't stand in for those of a model with such a config.json; '' if they can."""
    if not has_varlen(device, dtype):
        return _("it needs bf16 or fp16 on an NVIDIA card of the Ampere generation or newer")
    if model["model_type"] not in MODEL_TYPES or model.get("hidden_act", "silu") not in ("silu", "swish"):
        return _("it does not know models of the type {type}", type=model["model_type"])
    if not config.use_peft or config.peft_method != "lora":
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

    The weights of layers that are computed together are laid together in memory, in place: each module's own weight
    becomes a part of the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[nn.Module, LayerWeights] = {}
        for layer in causal_lm(model).model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.weights[layer] = LayerWeights(
                layer.input_layernorm.weight,
                _linears(attention.q_proj, attention.k_proj, attention.v_proj),
                _linears(attention.o_proj),
                layer.post_attention_layernorm.weight,
                _linears(mlp.gate_proj, mlp.up_proj),
                _linears(mlp.down_proj),
            )
        config = causal_lm(model).config
        self.shape = LayerShape(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            layer.input_layernorm.variance_epsilon,
            attention.scaling,
        )
        self.functions = Functions(_forward, _backward)

    def compile(self) -> None:
        """Compile forward and backward; all layers share the code, whatever a row's length is."""
        # Halves and members are written where they belong; computed as one, both halves would be, everywhere.
        options: dict[str, Any] = {"max_pointwise_cat_inputs": 1, "size_asserts": False}
        self.functions = Functions(*(torch.compile(f, options=options) for f in (_forward, _backward)))

    def __call__(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        recompute: bool,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        **_plain: Any,
    ) -> torch.Tensor:
        """See run_plain."""
        weights = self.weights[layer]
        cos, sin = position_embeddings
        row = Row(cos[0], sin[0], segments.cumulative, segments.longest)
        adapters = [tensor for group in weights.groups for tensor in (*group.lora_a, *group.lora_b)]
        call = _Call(self.functions, self.shape, weights, row, recompute)
        return _FusedLayer.apply(hidden[0], call, *adapters).unsqueeze(0)


class Functions(NamedTuple):
    """The two functions below, compiled or not."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Call(NamedTuple):
    """What a layer's passes are made of, beside its input."""

    functions: Functions
    shape: LayerShape
    weights: LayerWeights
    row: Row
    recompute: bool


class _FusedLayer(torch.autograd.Function):
    """hidden -> hidden, [length, hidden_size]; the adapters' parameters are arguments because they take gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, call: _Call, *adapters: torch.Tensor) -> torch.Tensor:
        hidden = hidden.detach()  # whether it takes a gradient must not make other code
        _mark_length(hidden, *call.row[:3])
        output, saved = call.functions.forward(hidden, call.row, call.shape, call.weights, True)
        ctx.call, ctx.saved = call, None if call.recompute else saved
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,), call, saved = ctx.saved_tensors, ctx.call, ctx.saved
        ctx.saved = None
        _mark_length(hidden, *call.row[:3])
        if saved is None:
            _nothing, saved = call.functions.forward(hidden, call.row, call.shape, call.weights, False)
        (grad_output,) = grad_outputs
        _mark_length(grad_output, *saved[:4], saved.middle, saved.gate_up)
        _mark_length(*(narrow for narrow in saved.narrow if narrow is not None))
        torch._dynamo.maybe_mark_dynamic(saved.log_sum_exp, 1)
        grad_hidden, grads = call.functions.backward(
            grad_output.contiguous(), hidden, saved, call.row, call.shape, call.weights, ctx.needs_input_grad[0]
        )
        return grad_hidden, None, *grads


def _mark_length(*tensors: torch.Tensor) -> None:
    """Let compiled code take any length."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _linears(*modules: nn.Module) -> Linears:
    bases = [getattr(module, "base_layer", module) for module in modules]
    starts = [sum(base.out_features for base in bases[:i]) for i in range(len(bases))]
    adapted = [(m, start) for m, start in zip(modules, starts, strict=True) if hasattr(m, "lora_A")]
    bias = None
    if bases[0].bias is not None:
        bias = torch.cat([base.bias.detach() for base in bases])
    if isinstance(bases[0], QuantizedLinear):
        dequantize, stored = bases[0].dequantize_stored, tuple(base.stored() for base in bases)
    else:
        dequantize, stored = _as_stored, ((_lay_together(bases),),)
    return Linears(
        dequantize,
        stored,
        bias,
        tuple(module.lora_A["default"].weight for module, _start in adapted),
        tuple(module.lora_B["default"].weight for module, _start in adapted),
        tuple((start, module.scaling["default"]) for module, start in adapted),
        sum(base.out_features for base in bases),
    )


def _as_stored(_dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _lay_together(bases: Sequence[nn.Linear]) -> torch.Tensor:
    """One tensor of all weights, of which each module's becomes a view."""
    if len(bases) == 1:
        return bases[0].weight
    together = torch.cat([base.weight.detach() for base in bases])
    for base, part in zip(bases, together.split([base.out_features for base in bases]), strict=True):
        base.weight.data = part
    return together


# The layer's arithmetic. `length` is the row's number of tokens; tensors are [length, width] unless said otherwise.


def _forward(
    hidden: torch.Tensor, row: Row, shape: LayerShape, weights: LayerWeights, whole: bool
) -> tuple[torch.Tensor | None, Saved]:
    """The layer's output (not if not `whole`, which saves a matrix product), and what its backward pass needs."""
    normed = _rms_norm(hidden, weights.input_norm, shape.epsilon)
    together, narrow_qkv = _linear(normed, weights.query_key_value)
    query, key, value = _split_heads(together, shape)
    query, key = _rotate(query, row.cos, row.sin), _rotate(key, row.cos, row.sin)
    value = value.contiguous()  # as a view it would keep the unrotated queries and keys alive
    attention, log_sum_exp = attention_forward(query, key, value, row.cumulative, row.longest, shape.softmax_scale)
    attended, narrow_output = _linear(attention.flatten(1), weights.output)
    middle = hidden + attended
    gate_up, narrow_gate_up = _linear(_rms_norm(middle, weights.post_attention_norm, shape.epsilon), weights.gate_up)
    activation = _gated(gate_up)
    adapter = weights.down.adapter(activation.dtype)
    narrow_down = None if adapter is None else activation @ adapter[0].t()
    narrow = (narrow_qkv, narrow_output, narrow_gate_up, narrow_down)
    saved = Saved(query, key, value, attention, log_sum_exp, middle, gate_up, narrow)
    if not whole:
        return None, saved
    return middle + _wide(activation, narrow_down, adapter, weights.down), saved


def _backward(
    grad_output: torch.Tensor,
    hidden: torch.Tensor,
    saved: Saved,
    row: Row,
    shape: LayerShape,
    weights: LayerWeights,
    needs_grad_hidden: bool,
) -> tuple[torch.Tensor | None, Tensors]:
    """Gradients of the layer's input and of its adapters, in `LayerWeights.groups`' order."""
    narrow_qkv, narrow_output, narrow_gate_up, narrow_down = saved.narrow
    activation = _gated(saved.gate_up)
    grad_activation, grads_down = _linear_backward(grad_output, activation, narrow_down, weights.down)
    grad_gate_up = _gated_backward(grad_activation, saved.gate_up)
    normed = _rms_norm(saved.middle, weights.post_attention_norm, shape.epsilon)
    grad_normed, grads_gate_up = _linear_backward(grad_gate_up, normed, narrow_gate_up, weights.gate_up)
    grad_middle = grad_output + _rms_norm_backward(
        grad_normed, saved.middle, weights.post_attention_norm, shape.epsilon
    )
    grad_attention, grads_output = _linear_backward(
        grad_middle, saved.attention.flatten(1), narrow_output, weights.output
    )
    grad_query, grad_key, grad_value = attention_backward(
        grad_attention.view_as(saved.attention),
        saved.query,
        saved.key,
        saved.value,
        saved.attention,
        saved.log_sum_exp,
        row.cumulative,
        row.longest,
        shape.softmax_scale,
    )
    grad_query, grad_key = _rotate(grad_query, row.cos, -row.sin), _rotate(grad_key, row.cos, -row.sin)
    grad_qkv = torch.cat((grad_query, grad_key, grad_value), dim=1).flatten(1)
    normed = _rms_norm(hidden, weights.input_norm, shape.epsilon)
    grad_normed, grads_qkv = _linear_backward(grad_qkv, normed, narrow_qkv, weights.query_key_value, needs_grad_hidden)
    grad_hidden = None
    if grad_normed is not None:
        grad_hidden = grad_middle + _rms_norm_backward(grad_normed, hidden, weights.input_norm, shape.epsilon)
    return grad_hidden, (*grads_qkv, *grads_output, *grads_gate_up, *grads_down)


def _linear(x: torch.Tensor, linears: Linears) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W x + scaling B A x, and A x."""
    adapter = linears.adapter(x.dtype)
    narrow = None if adapter is None else x @ adapter[0].t()
    return _wide(x, narrow, adapter, linears), narrow


def _wide(
    x: torch.Tensor,
    narrow: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None,
    linears: Linears,
) -> torch.Tensor:
    """W x + scaling B A x, from x and A x."""
    y = _sum_of_products((x, linears.weight(x.dtype).t()), adapter and (narrow, adapter[1].t()))
    return y if linears.bias is None else y + linears.bias


def _linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    narrow: torch.Tensor | None,
    linears: Linears,
    needs_grad_x: bool = True,
) -> tuple[torch.Tensor | None, Tensors]:
    """Gradient of x, and of each member's A and then B."""
    adapter, grads, from_adapter = linears.adapter(grad.dtype), (), None
    if adapter is not None and narrow is not None:
        a, b = adapter
        grad_narrow = grad @ b
        from_adapter = (grad_narrow, a)
        grads = linears.split_gradients(grad_narrow.t() @ x, grad.t() @ narrow)
    if not needs_grad_x:
        return None, grads
    return _sum_of_products((grad, linears.weight(grad.dtype)), from_adapter), grads


def _sum_of_products(wide: Factors, thin: Factors | None) -> torch.Tensor:
    """The product of the wide factors, plus that of the thin ones."""
    if thin is None:
        return wide[0] @ wide[1]
    total = thin[0] @ thin[1]
    torch.ops.llama2_chinese.add_product_(total, *wide)
    return total


# The large product is added onto the small one by the matrix kernel itself. The compiler, left alone, would copy.
_library = torch.library.Library("llama2_chinese", "DEF")
_library.define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@torch.library.impl(_library, "add_product_", "CompositeExplicitAutograd")
def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total.addmm_(a, b)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide, grad = x.float(), grad.float() * weight.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (inverse * grad - wide * inverse.pow(3) * (grad * wide).mean(-1, keepdim=True)).to(x.dtype)


def _split_heads(together: torch.Tensor, shape: LayerShape) -> Tensors:
    """Queries, keys and values, each [length, heads, head_dim], from what the three layers gave."""
    heads = [shape.heads, shape.key_value_heads, shape.key_value_heads]
    return together.view(together.shape[0], sum(heads), shape.head_dim).split(heads, dim=1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of [length, heads, head_dim]; with -sin, its backward pass."""
    half = x.shape[-1] // 2
    sign = torch.where(torch.arange(x.shape[-1], device=x.device) < half, -1.0, 1.0)
    wide = x.float()
    return (wide * cos[:, None] + wide.roll(half, dims=-1) * (sin[:, None] * sign)).to(x.dtype)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate.float()) * up.float()).to(gate_up.dtype)


def _gated_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = (part.float() for part in gate_up.chunk(2, dim=-1))
    grad, sigmoid = grad.float(), gate.sigmoid()
    grad_gate, grad_up = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    return torch.cat((grad_gate.to(gate_up.dtype), grad_up.to(gate_up.dtype)), dim=-1)
