"""The arithmetic of a decoder layer over frozen weights with LoRA beside them, forward and backward.

Autograd can't know that the weights take no gradient, that layers which read the same input can share the product with
the adapters' A, and that norms and activations are cheaper to compute again than to keep. Between the matrix products
stand pure functions of tensors, of which torch.compile makes one kernel each. `length` is a row's number of tokens;
tensors are [length, width] unless said otherwise.

W x + B A x is one product, of x and A x side by side with W and B side by side, and is rounded once. What an adapter
adds is at first smaller than the last bit of a bf16 number of W x's size: where W x is rounded before the sum, as it is
under PEFT's layers and where cuBLAS adds a product to a bf16 matrix, most of the first steps' effect is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import library
from torch.nn.functional import silu

from utils.model.attention import attention_backward, attention_forward
from utils.rows.segments import Segments

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LayerShape:
    """The numbers that a layer's arithmetic takes beside its tensors."""

    head_dim: int
    epsilon: float
    softmax_scale: float
    window: int | None = None


class Linear(NamedTuple):
    """A frozen linear layer, with what of its adapter the group does not hold.

    Attributes:
        dequantize: makes the weight [out, in] of a dtype from the stored tensors.
        stored: what the layer stores.
        bias: [out], or None.
        columns: where its adapter's A x lies in the group's; None without an adapter.
        b: the adapter's B times scaling, in its columns of [out, width of the group's A x], zero in the others'.
        weight_and_b: both side by side, if they are stored so.
        scaling: the adapter's, by which B A x is multiplied.
    """

    dequantize: Callable[..., torch.Tensor]
    stored: Tensors
    bias: torch.Tensor | None
    columns: slice | None
    b: torch.Tensor | None
    weight_and_b: torch.Tensor | None
    scaling: float


class Group(NamedTuple):
    """Linear layers that read the same input.

    Attributes:
        linears: the layers.
        a: their adapters' A one under another, [sum of r and some rows of zeros, in], in the compute dtype; None
            without adapters.
    """

    linears: tuple[Linear, ...]
    a: torch.Tensor | None


class LayerWeights(NamedTuple):
    """All tensors of a layer; the norms of each head's queries and keys are Qwen3's."""

    input_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    post_attention_norm: torch.Tensor
    query_key_value: Group
    output: Group
    gate_up: Group
    down: Group


class Saved(NamedTuple):
    """What a layer's backward pass needs beside its input; `narrow` are the groups' inputs times A.

    `query` and `key` are as attention takes them, or, where they are normalised, as they were before. `log_sum_exp` is
    [heads, length]; `narrow` are as wide as the groups' A are high.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention: torch.Tensor
    middle: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    log_sum_exp: torch.Tensor
    narrow: tuple[torch.Tensor | None, ...]

    @property
    def tensors(self) -> Tensors:
        """All tensors of a layer's activations but `narrow`, in order."""
        return self[:-1]


class Row(NamedTuple):
    """Positions of a row's tokens: cosines and sines of their rotation, [length, head_dim], and segments."""

    cos: torch.Tensor
    sin: torch.Tensor
    segments: Segments


def forward(
    hidden: torch.Tensor, row: Row, shape: LayerShape, weights: LayerWeights, whole: bool
) -> tuple[torch.Tensor | None, Saved]:
    """A layer's forward pass: its output, and what its backward pass needs.

    Without `whole` the output is None, which saves a matrix product.
    """
    normed = _rms_norm(hidden, weights.input_norm, shape.epsilon)
    outputs, narrow_qkv = _linear(normed, weights.query_key_value)
    query, key, value = (output.unflatten(1, (-1, shape.head_dim)) for output in outputs)
    placed_query = _place(query, weights.query_norm, row, shape)
    placed_key = _place(key, weights.key_norm, row, shape)
    attention, log_sum_exp = attention_forward(
        placed_query, placed_key, value, row.segments, shape.softmax_scale, shape.window
    )
    if weights.query_norm is None:
        query, key = placed_query, placed_key
    (attended,), narrow_output = _linear(attention.flatten(1), weights.output)
    middle = hidden + attended
    normed = _rms_norm(middle, weights.post_attention_norm, shape.epsilon)
    (gate, up), narrow_gate_up = _linear(normed, weights.gate_up)
    activation = _gated(gate, up)
    narrow_down = _narrow(activation, weights.down)
    narrow = (narrow_qkv, narrow_output, narrow_gate_up, narrow_down)
    saved = Saved(query, key, value, attention, middle, gate, up, log_sum_exp, narrow)
    if not whole:
        return None, saved
    (down,) = _wide(activation, narrow_down, weights.down)
    return middle + down, saved


def backward(
    grad_output: torch.Tensor,
    hidden: torch.Tensor,
    saved: Saved,
    row: Row,
    shape: LayerShape,
    weights: LayerWeights,
) -> tuple[torch.Tensor, Tensors]:
    """A layer's backward pass: gradients of its input, and of its adapters, group by group in the data's order.

    Of each adapter A's comes before B's.
    """
    narrow_qkv, narrow_output, narrow_gate_up, narrow_down = saved.narrow
    grad_activation, grad_narrow = _linear_backward((grad_output,), weights.down)
    # The activation is computed again beside its gradient, from the same reading of gate and up.
    activation, *grads_gated = _gated_backward(grad_activation, saved.gate, saved.up)
    grads_down = _adapter_gradients((grad_output,), grad_narrow, activation, narrow_down, weights.down)
    grad_normed, grad_narrow = _linear_backward(grads_gated, weights.gate_up)
    normed = _rms_norm(saved.middle, weights.post_attention_norm, shape.epsilon)
    grads_gate_up = _adapter_gradients(grads_gated, grad_narrow, normed, narrow_gate_up, weights.gate_up)
    grad_middle = grad_output + _rms_norm_backward(
        grad_normed, saved.middle, weights.post_attention_norm, shape.epsilon
    )
    grad_attention, grad_narrow = _linear_backward((grad_middle,), weights.output)
    grads_output = _adapter_gradients(
        (grad_middle,), grad_narrow, saved.attention.flatten(1), narrow_output, weights.output
    )
    placed_query, placed_key = saved.query, saved.key
    if weights.query_norm is not None:
        placed_query = _place(saved.query, weights.query_norm, row, shape)
        placed_key = _place(saved.key, weights.key_norm, row, shape)
    grad_query, grad_key, grad_value = attention_backward(
        grad_attention.view_as(saved.attention),
        placed_query,
        placed_key,
        saved.value,
        saved.attention,
        saved.log_sum_exp,
        row.segments,
        shape.softmax_scale,
        shape.window,
    )
    grad_query = _place_backward(grad_query, saved.query, weights.query_norm, row, shape)
    grad_key = _place_backward(grad_key, saved.key, weights.key_norm, row, shape)
    grads_heads = tuple(grad.flatten(1) for grad in (grad_query, grad_key, grad_value))
    grad_normed, grad_narrow = _linear_backward(grads_heads, weights.query_key_value)
    normed = _rms_norm(hidden, weights.input_norm, shape.epsilon)
    grads_qkv = _adapter_gradients(grads_heads, grad_narrow, normed, narrow_qkv, weights.query_key_value)
    grad_hidden = grad_middle + _rms_norm_backward(grad_normed, hidden, weights.input_norm, shape.epsilon)
    return grad_hidden, (*grads_qkv, *grads_output, *grads_gate_up, *grads_down)


def _linear(x: torch.Tensor, group: Group) -> tuple[Tensors, torch.Tensor | None]:
    """W x + scaling B A x of each layer, and the A x of all."""
    narrow = _narrow(x, group)
    return _wide(x, narrow, group), narrow


def _narrow(x: torch.Tensor, group: Group) -> torch.Tensor | None:
    """A x of all the group's adapters, side by side; None where there are none."""
    return None if group.a is None else x @ group.a.t()


def _wide(x: torch.Tensor, narrow: torch.Tensor | None, group: Group) -> Tensors:
    """W x + scaling B A x of each layer, from x and A x."""
    x_and_narrow = x if narrow is None else torch.cat((x, narrow), dim=1)
    outputs = []
    for linear in group.linears:
        if linear.weight_and_b is not None:
            y = x_and_narrow @ linear.weight_and_b.t()
        else:
            weight = linear.dequantize(x.dtype, *linear.stored)
            y = x @ weight.t() if linear.b is None else x_and_narrow @ torch.cat((weight, linear.b), dim=1).t()
        outputs.append(y if linear.bias is None else y + linear.bias)
    return tuple(outputs)


def _linear_backward(grads: Sequence[torch.Tensor], group: Group) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and of A x."""
    grad_x = grad_narrow = None
    if group.a is not None:
        adapted = [(linear, grad) for linear, grad in zip(group.linears, grads, strict=True) if linear.b is not None]
        grad_narrow = torch.cat([grad @ linear.b[:, linear.columns] for linear, grad in adapted], dim=1)
        grad_x = grad_narrow @ group.a[: grad_narrow.shape[1]]
    for linear, grad in zip(group.linears, grads, strict=True):
        weight = linear.dequantize(grad.dtype, *linear.stored)
        if grad_x is None:
            grad_x = grad @ weight
        else:
            torch.ops.llama2_chinese.add_product_(grad_x, grad, weight)
    assert grad_x is not None
    return grad_x, grad_narrow


def _adapter_gradients(
    grads: Sequence[torch.Tensor],
    grad_narrow: torch.Tensor | None,
    x: torch.Tensor,
    narrow: torch.Tensor | None,
    group: Group,
) -> Tensors:
    """Gradients of each adapted layer's A and B."""
    if grad_narrow is None or narrow is None:
        return ()
    parameters: list[torch.Tensor] = []
    grad_a = grad_narrow.t() @ x
    for linear, grad in zip(group.linears, grads, strict=True):
        if linear.columns is not None:
            grad_b = grad.t() @ narrow[:, linear.columns]
            parameters += [grad_a[linear.columns].float(), grad_b.float() * linear.scaling]
    return tuple(parameters)


# The large product is added onto the small one by the matrix kernel itself. The compiler, left alone, would copy.
# (What the small one loses by it is less than half of a gradient's last bit, and no update.)
_operators = library.Library("llama2_chinese", "DEF")
_operators.define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@library.impl(_operators, "add_product_", "CompositeExplicitAutograd")
def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total.addmm_(a, b)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide, grad = x.float(), grad.float() * weight.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (inverse * grad - wide * inverse.pow(3) * (grad * wide).mean(-1, keepdim=True)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of [length, heads, head_dim]; with -sin, its backward pass."""
    wide, cos, sin = x.float(), cos[:, None].float(), sin[:, None].float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _place(heads: torch.Tensor, norm: torch.Tensor | None, row: Row, shape: LayerShape) -> torch.Tensor:
    """Queries or keys [length, heads, head_dim] as attention takes them."""
    return _rotate(heads if norm is None else _rms_norm(heads, norm, shape.epsilon), row.cos, row.sin)


def _place_backward(
    grad: torch.Tensor, heads: torch.Tensor, norm: torch.Tensor | None, row: Row, shape: LayerShape
) -> torch.Tensor:
    """The gradient of what `_place` was given, where there is a norm: `heads`."""
    grad = _rotate(grad, row.cos, -row.sin)
    return grad if norm is None else _rms_norm_backward(grad, heads, norm, shape.epsilon)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def _gated_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Tensors:
    """What `_gated` gave, and the gradients of gate and up."""
    grad, gate_wide, up_wide, sigmoid = grad.float(), gate.float(), up.float(), gate.float().sigmoid()
    silu_gate = gate_wide * sigmoid
    grad_gate = grad * up_wide * sigmoid * (1 + gate_wide * (1 - sigmoid))
    return (silu_gate * up_wide).to(gate.dtype), grad_gate.to(gate.dtype), (grad * silu_gate).to(gate.dtype)
