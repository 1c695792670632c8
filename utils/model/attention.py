"""Attention over packed sequences, and the key-value cache of generation.

Several examples lie one after another in one row; none may see another, but for a beginning that several share, which
stands in the row once. `packed_attention` has the signature of transformers' attention functions and is registered
under the name PACKED. `attention_forward` and `attention_backward` are the same for layers that do without autograd
(utils/model/fused_layers.py). On GPUs that have such a kernel, all examples are done at once; elsewhere one by one.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from utils.model.attention_kernels import ONE_BY_ONE, one_by_one, varlen_kernel
from utils.model.copy_after import copy_after
from utils.rows.segments import Keys, Segments, keys_of_rows, rows_of_keys

PACKED = "packed"


class PastKeyValues(Protocol):
    """Keys and values from before the row: what packed_attention asks of a cache."""

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Past and given keys and values of a layer together, each [1, kv_heads, past + length, head_dim]."""
        ...


class Prefix:
    """Learnt keys and values (prefix tuning) before every segment; one (key, value) a layer."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers
        self.length = layers[0][0].shape[2]

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See PastKeyValues."""
        past_key, past_value = self.layers[layer]
        return torch.cat((past_key.to(key), key), dim=2), torch.cat((past_value.to(value), value), dim=2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    past: PastKeyValues | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment (without segments, the whole row is one), after what `past` holds.

    Args:
        query: [1, heads, length, head_dim]; key and value have kv_heads in place of heads.

    Returns:
        [1, length, heads, head_dim], and None in the place of attention weights.
    """
    # Over fp32 weights under autocast, queries and keys come in fp32 from their rotation; values don't.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if segments is not None and past is None and varlen_kernel(query.device, query.dtype):
        by_token = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return _Attention.apply(*by_token, segments, scaling).unsqueeze(0), None

    past_length = 0
    if past is not None:
        assert segments is None or segments.keys is None, "the past would not stand before the shared tokens"
        key, value = past.extend(module.layer_idx, key, value)
        past_length = key.shape[2] - query.shape[2]
    elif segments is not None and segments.keys:
        key, value = (
            _KeysOfRows.apply(x.squeeze(0).transpose(0, 1), segments.keys).transpose(0, 1).unsqueeze(0)
            for x in (key, value)
        )
    return one_by_one(query, key, value, segments, scaling, past_length).transpose(1, 2), None


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float | None
) -> tuple[torch.Tensor, ...]:
    """Causal attention within each segment, for a backward pass that is called by hand.

    Args:
        query: [length, heads, head_dim]; key and value have kv_heads in place of heads.

    Returns:
        The output, in query's shape, and a tensor for `attention_backward`, see Kernel.
    """
    if segments.keys:
        key, value = keys_of_rows(key, segments.keys.rows), keys_of_rows(value, segments.keys.rows)
    kernel = varlen_kernel(query.device, query.dtype) or ONE_BY_ONE
    return kernel.forward(query, key, value, segments, scale)


def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value; see `attention_forward`."""
    if segments.keys:
        rows = segments.keys.rows
        if torch.compiler.is_compiling():  # or what the segments see would be kept
            rows = copy_after(rows, grad_output)
        key, value = keys_of_rows(key, rows), keys_of_rows(value, rows)
    kernel = varlen_kernel(query.device, query.dtype) or ONE_BY_ONE
    grad_query, grad_key, grad_value = kernel.backward(
        grad_output, query, key, value, output, log_sum_exp, segments, scale
    )
    if segments.keys:
        grad_key, grad_value = rows_of_keys(grad_key, segments.keys), rows_of_keys(grad_value, segments.keys)
    return grad_query, grad_key, grad_value


class _Attention(torch.autograd.Function):
    """Both for autograd. What the segments see is put together anew for the backward pass, and not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
    ) -> torch.Tensor:
        output, log_sum_exp = attention_forward(query, key, value, segments, scale)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.segments, ctx.scale = segments, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        return *attention_backward(grad_output, *ctx.saved_tensors, ctx.segments, ctx.scale), None, None


class _KeysOfRows(torch.autograd.Function):
    """`keys_of_rows` with `rows_of_keys` as its gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, keys: Keys) -> torch.Tensor:
        ctx.keys = keys
        return keys_of_rows(states, keys.rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        return rows_of_keys(grad, ctx.keys), None


def register() -> None:
    """Make the name PACKED known to transformers."""
    from transformers import AttentionInterface

    # cuDNN's attention makes a new plan for every length, that is, for every token that is generated.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(PACKED, packed_attention)
