"""torch's kernels for attention within the segments of a row, forward and backward, behind one interface.

All are causal: the last query of a segment attends to all of the segment's context, the one before to all but the last.
Where there is a window, a query attends to so many of them, the last of which is its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention

from utils.rows.segments import Segments

Tensors = tuple[torch.Tensor, ...]
CAUSAL_FROM_THE_END = 2
"""The mask in which the last query sees all keys, in the numbering of torch's efficient attention."""
LOG_SUM_MULTIPLE = 32
"""torch's efficient attention wants room for a multiple of so many queries' logarithmic sums."""


class Kernel(NamedTuple):
    """A way to compute attention, forward and backward, without autograd.

    Query is [length, heads, head_dim]; key and value are those of the segments' contexts, end to end,
    [places, kv_heads, head_dim].

    Attributes:
        forward: (query, key, value, segments, scale, window) -> output, in query's shape, and the softmax's logarithmic
            sums, [heads, length], or [0, length] where `backward` does without.
        backward: (grad_output, query, key, value, output, log_sum_exp, segments, scale, window) -> gradients of query,
            key and value.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]


def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The fastest kernel that does all segments of a row at once on such a device; None = there is none."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return FLASH
    return EFFICIENT if dtype == torch.float16 and capability >= (6, 0) else None


def _flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    # torch's own operator beneath varlen_attn, which costs a tenth of a millisecond of Python a call.
    output, log_sum_exp, *_unused = torch.ops.aten._flash_attention_forward(
        query, key, value, *segments.for_varlen, 0.0, window is None, False, scale=scale, **_flash_window(window)
    )
    return output, log_sum_exp


def _flash_window(window: int | None) -> dict[str, int]:
    """Flash attention's arguments for a window; with them its causal mask is left out, as torch's varlen_attn does."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _flash_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    dropout_state = torch.empty(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        log_sum_exp,
        *segments.for_varlen,
        0.0,
        window is None,
        dropout_state,
        dropout_state,
        scale=scale,
        **_flash_window(window),
    )


FLASH = Kernel(_flash_forward, _flash_backward)
"""Flash attention (Dao 2023), for Ampere and newer."""


# Operators of our own around torch's: its shape function for the backward pass lacks an argument (2.11 to 2.13).
@library.custom_op("llama2_chinese::efficient_attention", mutates_args=())
def _efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = query.shape[1]
    # The operator refuses more than the row has.
    longest, longest_of_keys = min(longest, len(query)), min(longest, len(key))
    output, log_sum_exp, *_unused = torch.ops.aten._efficient_attention_forward(
        query[None],
        _for_each_head(key, heads)[None],
        _for_each_head(value, heads)[None],
        None,
        bounds,
        key_bounds,
        longest,
        longest_of_keys,
        0.0,
        CAUSAL_FROM_THE_END,
        True,
        scale=scale,
    )
    # They come as [segments, heads, longest], which is far too much to keep where segments differ in length.
    segment, place = _places(bounds, len(query))
    return output[0], log_sum_exp[segment, :, place].t().contiguous()


@_efficient_attention.register_fake
def _efficient_attention_shapes(
    query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, *_more: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@library.custom_op("llama2_chinese::efficient_attention_backward", mutates_args=())
def _efficient_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, kv_heads = query.shape[1], key.shape[1]
    longest, longest_of_keys = min(longest, len(query)), min(longest, len(key))
    segment, place = _places(bounds, len(query))
    room = -(-longest // LOG_SUM_MULTIPLE) * LOG_SUM_MULTIPLE
    padded = log_sum_exp.new_full((len(bounds) - 1, heads, room), torch.inf)
    padded[segment, :, place] = log_sum_exp.t()
    no_dropout = torch.empty((), dtype=torch.int64, device=query.device)
    grad_query, grad_key, grad_value, _none = torch.ops.aten._efficient_attention_backward(
        grad_output[None],
        query[None],
        _for_each_head(key, heads)[None],
        _for_each_head(value, heads)[None],
        None,
        output[None],
        bounds,
        key_bounds,
        longest,
        longest_of_keys,
        padded,
        0.0,
        no_dropout,
        no_dropout,
        CAUSAL_FROM_THE_END,
        False,
        scale=scale,
    )
    grad_key, grad_value = (x[0].unflatten(1, (kv_heads, -1)).sum(2) for x in (grad_key, grad_value))
    return grad_query[0], grad_key, grad_value


@_efficient_attention_backward.register_fake
def _efficient_attention_backward_shapes(
    _grad_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_more: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _efficient_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    if _cuts(window, segments):
        return ONE_BY_ONE.forward(query, key, value, segments, scale, window)
    bounds, key_bounds, longest, _longest = segments.for_varlen
    return _efficient_attention(query, key, value, bounds, key_bounds, longest, scale)


def _efficient_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    if _cuts(window, segments):
        return ONE_BY_ONE.backward(grad_output, query, key, value, output, log_sum_exp, segments, scale, window)
    bounds, key_bounds, longest, _longest = segments.for_varlen
    return _efficient_attention_backward(
        grad_output, query, key, value, output, log_sum_exp, bounds, key_bounds, longest, scale
    )


def _cuts(window: int | None, segments: Segments) -> bool:
    """Whether a window leaves anything out. (torch's operator takes one, but its backward pass is wrong then: 2.11.)"""
    return window is not None and window < segments.longest


EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
"""Memory-efficient attention (xFormers; Rabe and Staats 2021), for Pascal, Volta and Turing."""


def _for_each_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values, [places, kv_heads, head_dim], repeated for the query heads that share them."""
    repeats = heads // states.shape[1]
    return states.repeat_interleave(repeats, dim=1) if repeats > 1 else states


def _places(cumulative: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of each of a row's tokens, and the token's place in it."""
    tokens = torch.arange(length, dtype=cumulative.dtype, device=cumulative.device)
    segment = torch.searchsorted(cumulative, tokens, right=True) - 1
    return segment, tokens - cumulative[segment]


def _each_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    return one_by_one(query, key, value, segments, scale, window), query.new_empty(0, query.shape[0])


def _each_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _output: torch.Tensor,
    _log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensors:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        attended, _none = _each_forward(*inputs, segments, scale, window)
        return torch.autograd.grad(attended, inputs, grad_output)


ONE_BY_ONE = Kernel(_each_forward, _each_backward)
"""Plain attention, segment after segment, for everything else."""


@torch.compiler.disable  # each number of segments would be code of its own
def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None = None,
    past_length: int = 0,
) -> torch.Tensor:
    """Causal attention of each segment to its context, after `past_length` positions that all of them attend to.

    Args:
        query: [length, heads, head_dim].
        key: of the past positions, then of the contexts, [past_length + places, kv_heads, head_dim]; value likewise.
        window: how many keys a query attends to at most, its own among them; None = all before it.
    """
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if len(segments.lengths) == 1 and not torch.is_grad_enabled():  # an answer's next token: no time to split and join
        return _attend(query, key, value, scale, window)[0].transpose(0, 1)
    context_lengths = segments.contexts.lengths if segments.contexts else segments.lengths

    def of_each(states: torch.Tensor) -> Sequence[torch.Tensor]:
        # Slices instead of a split would each have a gradient as long as the row.
        past, *own = states.split([past_length, *context_lengths], dim=2)
        return [torch.cat((past, part), dim=2) for part in own] if past_length else own

    parts = zip(query.split(segments.lengths, dim=2), of_each(key), of_each(value), strict=True)
    return torch.cat([_attend(*part, scale, window) for part in parts], dim=2)[0].transpose(0, 1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    """Causal attention of a segment to its context, which ends with the segment; [1, heads, length, head_dim]."""
    length, before, mask = query.shape[2], key.shape[2] - query.shape[2], None
    if window is not None and before >= window:  # not even the first query reaches back so far
        before = window - 1
        key, value = (x[:, :, -(before + length) :] for x in (key, value))
    is_windowed = window is not None and before + length > window
    if length > 1 and (before or is_windowed):
        mask = torch.ones(length, before + length, dtype=torch.bool, device=query.device).tril(before)
        mask = mask.triu(before + 1 - window) if is_windowed else mask
    is_causal, grouped = mask is None and length > 1, query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
