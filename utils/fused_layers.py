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
from torch.nn.functional import silu

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


class Member(NamedTuple):
    """An adapted layer's place among those that read the same input: its rows of the output, its columns of A x."""

    rows: slice
    columns: slice
    scaling: float


class Linears(NamedTuple):
    """Linear layers that read the same input; their outputs lie side by side.

    Attributes:
        dequantize: makes a weight [out, in] of a dtype from one layer's stored tensors.
        stored: what each layer stores.
        bias: [sum of out], or None.
        a: the adapters' A one under another, [sum of r, in], in the compute dtype; None without adapters.
        b: their B times scaling, each in its own rows and columns, [sum of out, sum of r].
        members: the adapted layers.
    """

    dequantize: Callable[..., torch.Tensor]
    stored: tuple[Tensors, ...]
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    members: tuple[Member, ...]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """All weights one under another, [sum of out, in]."""
        weights = [self.dequantize(dtype, *stored) for stored in self.stored]
        return weights[0] if len(weights) == 1 else torch.cat(weights)


class LayerWeights(NamedTuple):
    """All tensors of a layer."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    query_key_value: Linears
    output: Linears
    gate_up: Linears
    down: Linears


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
    """Stand-ins for all layers of a decoder; called in the place of `run_plain`, after `refresh`.

    The weights of layers that are computed together are laid together in memory, in place: each module's own weight
    becomes a part of the whole.

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
        for layer in causal_lm(model).model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.adapters[layer] = []
            groups = [
                self._linears(layer, dtype, *modules)
                for modules in (
                    (attention.q_proj, attention.k_proj, attention.v_proj),
                    (attention.o_proj,),
                    (mlp.gate_proj, mlp.up_proj),
                    (mlp.down_proj,),
                )
            ]
            self.weights[layer] = LayerWeights(
                layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *groups
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

    def _linears(self, layer: nn.Module, dtype: torch.dtype, *modules: nn.Module) -> Linears:
        bases = [getattr(module, "base_layer", module) for module in modules]
        bias = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        if isinstance(bases[0], QuantizedLinear):
            dequantize, stored = bases[0].dequantize_stored, tuple(base.stored() for base in bases)
        else:
            dequantize, stored = _as_stored, ((_lay_together(bases),),)
        members, row, column = [], 0, 0
        for module, base in zip(modules, bases, strict=True):
            rows = slice(row, row := row + base.out_features)
            if hasattr(module, "lora_A"):
                columns = slice(column, column := column + module.r["default"])
                members.append((module, Member(rows, columns, module.scaling["default"])))
        if not members:
            return Linears(dequantize, stored, bias, None, None, ())
        a = bases[0].weight.new_empty(column, bases[0].in_features, dtype=dtype)
        b = bases[0].weight.new_zeros(row, column, dtype=dtype)
        for module, (rows, columns, scaling) in members:
            pair = [module.lora_A["default"].weight, module.lora_B["default"].weight]
            self.adapters[layer] += pair
            self._parameters += pair
            self._copies += [a[columns], b[rows, columns]]
            self._scalings += [1.0, scaling]
        return Linears(dequantize, stored, bias, a, b, tuple(member for _module, member in members))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters' parameters as they are now; once for every pass over the layers."""
        torch._foreach_copy_(self._copies, torch._foreach_mul(self._parameters, self._scalings))

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
        cos, sin = position_embeddings
        row = Row(cos[0], sin[0], segments.cumulative, segments.longest)
        call = _Call(self.functions, self.shape, self.weights[layer], row, recompute)
        return _FusedLayer.apply(hidden[0], call, *self.adapters[layer]).unsqueeze(0)


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
    narrow_down = _narrow(activation, weights.down)
    narrow = (narrow_qkv, narrow_output, narrow_gate_up, narrow_down)
    saved = Saved(query, key, value, attention, log_sum_exp, middle, gate_up, narrow)
    if not whole:
        return None, saved
    return middle + _wide(activation, narrow_down, weights.down), saved


def _backward(
    grad_output: torch.Tensor,
    hidden: torch.Tensor,
    saved: Saved,
    row: Row,
    shape: LayerShape,
    weights: LayerWeights,
    needs_grad_hidden: bool,
) -> tuple[torch.Tensor | None, Tensors]:
    """Gradients of the layer's input and of its adapters, group by group in the data's order, A before B."""
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
    narrow = _narrow(x, linears)
    return _wide(x, narrow, linears), narrow


def _narrow(x: torch.Tensor, linears: Linears) -> torch.Tensor | None:
    """A x."""
    return None if linears.a is None else x @ linears.a.t()


def _wide(x: torch.Tensor, narrow: torch.Tensor | None, linears: Linears) -> torch.Tensor:
    """W x + scaling B A x, from x and A x."""
    thin = None if narrow is None or linears.b is None else (narrow, linears.b.t())
    y = _sum_of_products((x, linears.weight(x.dtype).t()), thin)
    return y if linears.bias is None else y + linears.bias


def _linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    narrow: torch.Tensor | None,
    linears: Linears,
    needs_grad_x: bool = True,
) -> tuple[torch.Tensor | None, Tensors]:
    """Gradient of x, and of each member's A and B."""
    grads: list[torch.Tensor] = []
    thin = None
    if narrow is not None and linears.a is not None and linears.b is not None:
        grad_narrow = grad @ linears.b
        thin = (grad_narrow, linears.a)
        grad_a, grad_b = grad_narrow.t() @ x, grad.t() @ narrow
        for rows, columns, scaling in linears.members:
            grads += [grad_a[columns].float(), grad_b[rows, columns].float() * scaling]
    grad_x = _sum_of_products((grad, linears.weight(grad.dtype)), thin) if needs_grad_x else None
    return grad_x, tuple(grads)


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
