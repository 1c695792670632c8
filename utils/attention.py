"""Attention over packed sequences, and the key-value cache of generation.

Several examples lie one after another in one row; none may see another, but for a beginning that several share, which
stands in the row once. `packed_attention` has the signature of transformers' attention functions and is registered
under the name PACKED. On GPUs that have it, torch's variable-length flash attention does all examples at once;
elsewhere plain scaled_dot_product_attention takes them one by one. `attention_forward` and `attention_backward` are the
same for layers that do without autograd (utils/fused_layers.py).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

PACKED = "packed"
ROW_MULTIPLE = 128
"""Rows on a GPU have a multiple of this many tokens: for every new length the matrix library looks for its fastest
kernels anew, which takes milliseconds for each product of a layer."""


@dataclass(frozen=True)
class Keys:
    """What the segments of a row see, where some begin with tokens that stand in the row once, before all segments.

    The keys of a segment are those of the shared tokens that it begins with, and its own, which come last.

    Attributes:
        lengths: how many each segment has, in order.
        cumulative: start of each segment's and their end, int32, shape [segments + 1].
        rows: [keys], int64: the row's token that each key is of.
        copies: [most, shared tokens], int64: which keys are those of each shared token; -1 where it has fewer.
        own: [other tokens], int64: which key is that of each token behind the shared ones.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    rows: torch.Tensor
    copies: torch.Tensor
    own: torch.Tensor

    def to(self, device: torch.device) -> "Keys":
        """The same, for a row on another device."""
        tensors = (self.cumulative, self.rows, self.copies, self.own)
        return Keys(self.lengths, *(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Segments:
    """Where the examples of one packed row lie, end to end.

    Attributes:
        lengths: of each segment, in order.
        cumulative: start of each segment and the row's end, int32, shape [segments + 1].
        longest: no segment sees more; the same number all through a run keeps compiled code valid.
        keys: what they see; None = each itself alone.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    longest: int
    keys: Keys | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, longest: int = 0, keys: Keys | None = None) -> "Segments":
        """Segments of these lengths, in order."""
        cumulative = bounds(lengths).to(device, non_blocking=True)
        longest = max(longest, *lengths, *(keys.lengths if keys else ()))
        return cls(list(lengths), cumulative, longest, keys.to(device) if keys else None)

    def to(self, device: torch.device) -> "Segments":
        """The same segments, for a row on another device."""
        keys = self.keys.to(device) if self.keys else None
        return Segments(self.lengths, self.cumulative.to(device), self.longest, keys)

    @property
    def for_flash(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Bounds of the segments and of what they see, and the most that one of either has, as flash attention asks."""
        return self.cumulative, self.keys.cumulative if self.keys else self.cumulative, self.longest, self.longest


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    """Where things of these lengths start, end to end, and their end; int32."""
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)


def keys_of_rows(states: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Keys or values [tokens, …] as the segments see them, [keys, …]."""
    return states.index_select(0, keys.rows)


def rows_of_keys(grad: torch.Tensor, keys: Keys) -> torch.Tensor:
    """The gradient of what `keys_of_rows` was given. (Adding up by index would be in no fixed order, and in bf16.)"""
    copies = grad[keys.copies.clamp(min=0)] * (keys.copies >= 0).view(*keys.copies.shape, *[1] * (grad.dim() - 1))
    return torch.cat((copies.sum(0), grad[keys.own]))


class _KeysOfRows(torch.autograd.Function):
    """`keys_of_rows` with `rows_of_keys` as its gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, keys: Keys) -> torch.Tensor:
        ctx.keys = keys
        return keys_of_rows(states, keys)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        return rows_of_keys(grad, ctx.keys), None


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


class KeyValueCache:
    """Room for `capacity` positions of one sequence, written in place."""

    def __init__(self, capacity: int, prefix: Prefix | None = None) -> None:
        self.capacity, self.prefix = capacity, prefix
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = prefix.length if prefix else 0
        """Positions that are filled; the caller advances it after each forward pass."""

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See PastKeyValues."""
        if layer not in self.layers:
            heads, head_dim = key.shape[1], key.shape[3]
            keys, values = (key.new_empty(1, heads, self.capacity, head_dim) for _ in range(2))
            if self.prefix:
                past_key, past_value = self.prefix.layers[layer]
                keys[:, :, : self.length], values[:, :, : self.length] = past_key, past_value
            self.layers[layer] = keys, values
        keys, values = self.layers[layer]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]


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
    shares = segments is not None and segments.keys is not None
    if past is not None:
        assert not shares, "what is before the row would not stand before its shared tokens"
        key, value = past.extend(module.layer_idx, key, value)
    elif shares:
        key, value = (
            _KeysOfRows.apply(x.squeeze(0).transpose(0, 1), segments.keys).transpose(0, 1).unsqueeze(0)
            for x in (key, value)
        )
    if segments is not None and past is None and has_varlen(query.device, query.dtype):
        return _varlen(query, key, value, segments, scaling), None

    past_length = 0 if past is None else key.shape[2] - query.shape[2]
    return _one_by_one(query, key, value, segments, scaling, past_length).transpose(1, 2), None


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Flash attention over variable lengths needs Ampere or newer and half precision."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # A window of (-1, 0) is causal attention: everything before, nothing after. (The last key is the last query's.)
    output = varlen_attn(query, key, value, *segments.for_flash, scale=scaling, window_size=(-1, 0))
    return output.unsqueeze(0)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each segment, for a backward pass that is called by hand.

    Args:
        query: [length, heads, head_dim]; key and value have kv_heads in place of heads.

    Returns:
        The output, in query's shape, and a tensor for `attention_backward`: the softmax's logarithmic sums,
        [heads, length], where flash attention is used.
    """
    if segments.keys:
        key, value = keys_of_rows(key, segments.keys), keys_of_rows(value, segments.keys)
    if not has_varlen(query.device, query.dtype):
        return _rows_one_by_one(query, key, value, segments, scale), query.new_empty(0, query.shape[0])
    # torch's own operator beneath varlen_attn, which costs a tenth of a millisecond of Python a call.
    output, log_sum_exp, *_unused = torch.ops.aten._flash_attention_forward(
        query, key, value, *segments.for_flash, 0.0, True, False, scale=scale
    )
    return output, log_sum_exp


def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; see `attention_forward`."""
    if segments.keys:
        key, value = keys_of_rows(key, segments.keys), keys_of_rows(value, segments.keys)
    if has_varlen(query.device, query.dtype):
        dropout_state = torch.empty(2, dtype=torch.uint64, device=query.device)
        grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            *segments.for_flash,
            0.0,
            True,
            dropout_state,
            dropout_state,
            scale=scale,
        )
    else:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            attended = _rows_one_by_one(*inputs, segments, scale)
            grad_query, grad_key, grad_value = torch.autograd.grad(attended, inputs, grad_output)
    if segments.keys:
        grad_key, grad_value = rows_of_keys(grad_key, segments.keys), rows_of_keys(grad_value, segments.keys)
    return grad_query, grad_key, grad_value


def _rows_one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    return _one_by_one(*(x.transpose(0, 1) for x in (query, key, value)), segments, scale).transpose(0, 1)


@torch.compiler.disable  # each number of segments would be code of its own
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments | None,
    scale: float | None,
    past_length: int = 0,
) -> torch.Tensor:
    """Causal attention within each segment, after `past_length` positions that all of them see.

    Args:
        query: [..., heads, length, head_dim]; key and value have kv_heads in place of heads, and past_length more, or
            are as the segments see them.
    """
    lengths = segments.lengths if segments is not None else [query.shape[-2]]
    key_lengths = segments.keys.lengths if segments is not None and segments.keys else lengths

    def of_each(states: torch.Tensor) -> Sequence[torch.Tensor]:
        if len(lengths) == 1:
            return [states]
        # Slices instead of a split would each have a gradient as long as the row.
        past, *own = states.split([past_length, *key_lengths], dim=-2)
        return [torch.cat((past, part), dim=-2) for part in own] if past_length else own

    outputs = []
    for q, k, v in zip(query.split(lengths, dim=-2), of_each(key), of_each(value), strict=True):
        length, before, mask = q.shape[-2], k.shape[-2] - q.shape[-2], None
        if before and length > 1:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=q.device).tril(before)
        is_causal, grouped = before == 0 and length > 1, q.shape[-3] != k.shape[-3]
        outputs.append(
            scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(outputs, dim=-2)


def register() -> None:
    """Make the name PACKED known to transformers."""
    from transformers import AttentionInterface

    # cuDNN's attention makes a new plan for every length, that is, for every token that is generated.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(PACKED, packed_attention)
