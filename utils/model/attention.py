"""Attention of packed rows, in which several examples lie one after another and none may see another.

What stands before the row in a layer attends (`Past`): nothing, a learnt prefix, or a cache of keys and values
(inference/cache.py).
transformers' layers come here through `packed_attention`, registered under the name PACKED; layers that do without
autograd (utils/model/fused_layers.py) through `attention_forward` and `attention_backward`. On GPUs that have such a
kernel, all examples are done at once; elsewhere one by one.
"""

from typing import Any, Protocol

import torch

from utils.model.attention_kernels import ONE_BY_ONE, one_by_one, varlen_kernel
from utils.model.copy_after import copy_after
from utils.rows.segments import Contexts, Segments

PACKED = "packed"


class Past(Protocol):
    """What stands before the segments of a row in one of the decoder's layers, and so how their tokens attend."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention within each segment, after what stands before it.

        Args:
            query: of the row's tokens, [length, heads, head_dim]; key and value have kv_heads in place of heads.
            segments: where the row's examples or sequences lie.
            scale: of the scores; None = 1 / sqrt(head_dim).
            window: how many keys a query attends to at most, its own among them; None = all before it.

        Returns:
            The heads' outputs, in query's shape.
        """
        ...


class NoPast:
    """The past where there is none: before a segment stands at most a beginning that it shares, in the row itself."""

    length = 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See Past."""
        if varlen_kernel(query.device, query.dtype):
            return _Attention.apply(query, key, value, segments, scale, window)
        return attend_one_by_one(query, key, value, segments, scale, window)


NO_PAST = NoPast()


class Prefix:
    """Learnt keys and values of a layer (prefix tuning) before every segment, each [length, kv_heads, head_dim]."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value, self.length = key, value, len(key)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See Past."""
        key, value = torch.cat((self.key.to(key), key)), torch.cat((self.value.to(value), value))
        return attend_one_by_one(query, key, value, segments, scale, window, self.length)


def attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    past_length: int = 0,
) -> torch.Tensor:
    """Causal attention within each segment, one after another, on any device and in any dtype.

    Args:
        query: of the row's tokens, [length, heads, head_dim].
        key: of `past_length` positions that stand before every segment, and of the row's tokens,
            [past_length + length, kv_heads, head_dim]; value likewise.
    """
    if segments.contexts:
        key, value = (_in_contexts(x, segments.contexts, past_length) for x in (key, value))
    return one_by_one(query, key, value, segments, scale, window, past_length)


def _in_contexts(states: torch.Tensor, contexts: Contexts, past_length: int) -> torch.Tensor:
    """Keys or values of past positions and the row's tokens -> of past positions and the contexts' places."""
    if not past_length:
        return _GatherContexts.apply(states, contexts)
    past, own = states.split([past_length, len(states) - past_length])
    return torch.cat((past, _GatherContexts.apply(own, contexts)))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: Segments,
    past: Past = NO_PAST,
    sliding_window: int | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' layers call it, with the `segments` and `past` that `forward_hidden` gives to them.

    Args:
        query: [1, heads, length, head_dim]; key and value have kv_heads in place of heads.
        sliding_window: the layer's; None = it has none. See Past.attend.

    Returns:
        [1, length, heads, head_dim], and None in the place of attention weights.
    """
    # Over fp32 weights under autocast, queries and keys come in fp32 from their rotation; values don't.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return past.attend(query, key, value, segments, scaling, sliding_window)[None], None


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Causal attention within each segment, for a backward pass that is called by hand.

    Args:
        query: [length, heads, head_dim]; key and value have kv_heads in place of heads.
        window: see Past.attend.

    Returns:
        The output, in query's shape, and a tensor for `attention_backward`, see Kernel.
    """
    if segments.contexts:
        key, value = key[segments.contexts.tokens], value[segments.contexts.tokens]
    kernel = varlen_kernel(query.device, query.dtype) or ONE_BY_ONE
    return kernel.forward(query, key, value, segments, scale, window)


def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value; see `attention_forward`."""
    if segments.contexts:
        tokens = segments.contexts.tokens
        if torch.compiler.is_compiling():  # or the contexts' keys and values would be kept
            tokens = copy_after(tokens, grad_output)
        key, value = key[tokens], value[tokens]
    kernel = varlen_kernel(query.device, query.dtype) or ONE_BY_ONE
    grad_query, grad_key, grad_value = kernel.backward(
        grad_output, query, key, value, output, log_sum_exp, segments, scale, window
    )
    if segments.contexts:
        grad_key, grad_value = segments.contexts.add_up(grad_key), segments.contexts.add_up(grad_value)
    return grad_query, grad_key, grad_value


class _Attention(torch.autograd.Function):
    """Both passes for autograd. Keys and values of contexts are gathered anew for the backward pass, and not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        output, log_sum_exp = attention_forward(query, key, value, segments, scale, window)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grads = attention_backward(grad_output, *ctx.saved_tensors, ctx.segments, ctx.scale, ctx.window)
        return *grads, None, None, None


class _GatherContexts(torch.autograd.Function):
    """Keys or values of the row's tokens, [tokens, …] -> those of the segments' contexts, [places, …]."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, contexts: Contexts) -> torch.Tensor:
        ctx.contexts = contexts
        return states[contexts.tokens]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        return ctx.contexts.add_up(grad), None


def register() -> None:
    """Make `packed_attention` known to transformers, under the name PACKED."""
    from transformers import AttentionInterface

    # cuDNN's attention makes a new plan for every length, that is, for every token that is generated.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(PACKED, packed_attention)
