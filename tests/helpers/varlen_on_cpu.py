"""torch's attention kernels over variable lengths where there is no card for them: operators, by a plain formula."""

import itertools

import pytest
import torch
from torch import library

from utils.model import attention, fused_layers
from utils.model.attention_kernels import CAUSAL_FROM_THE_END, FLASH, LOG_SUM_MULTIPLE, Kernel


def use_varlen_on_cpu(monkeypatch: pytest.MonkeyPatch, kernel: Kernel = FLASH) -> None:
    """Let a CPU in bf16 pass for a card that has this kernel; it computes from the operators' arguments alone."""
    operators = library.Library("aten", "IMPL")
    for operator in (
        _flash_attention_forward,
        _flash_attention_backward,
        _efficient_attention_forward,
        _efficient_attention_backward,
    ):
        operators.impl(operator.__name__, operator, "CPU")
    monkeypatch.setattr(attention, "_operators_of_tests", operators, raising=False)  # for as long as the test lasts

    def chosen(_device: torch.device, dtype: torch.dtype) -> Kernel | None:
        return kernel if dtype == torch.bfloat16 else None

    monkeypatch.setattr(attention, "varlen_kernel", chosen)
    monkeypatch.setattr(fused_layers, "varlen_kernel", chosen)


def _scores(query, key, bounds, key_bounds, scale, window):
    """[heads, queries, keys]; the last key of a segment is the last query's."""
    queries, keys = torch.arange(len(query), dtype=torch.int32), torch.arange(len(key), dtype=torch.int32)
    of_query, of_key = (torch.searchsorted(b, x, right=True) for b, x in ((bounds, queries), (key_bounds, keys)))
    to_end = bounds[of_query] - queries, key_bounds[of_key] - keys
    mask = (of_query[:, None] == of_key) & (to_end[0][:, None] <= to_end[1])
    mask &= to_end[1] - to_end[0][:, None] < (window or len(key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    return (torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale).masked_fill(~mask, -torch.inf), scale


def _forward(query, key, value, bounds, key_bounds, scale, window):
    scores, _scale = _scores(query, key, bounds, key_bounds, scale, window)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).float()
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return output.to(query.dtype).contiguous(), scores.logsumexp(-1)


def _backward(grad, query, key, value, output, log_sum_exp, bounds, key_bounds, scale, window):
    """As Dao et al. 2022 have it, appendix B."""
    kv_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
    scores, scale = _scores(query, key, bounds, key_bounds, scale, window)
    weights, grad = (scores - log_sum_exp[:, :, None]).exp(), grad.float()
    value = value.repeat_interleave(repeats, dim=1).float()
    grad_weights = torch.einsum("qhd,khd->hqk", grad, value)
    grad_scores = weights * (grad_weights - (grad * output.float()).sum(-1).t()[:, :, None]) * scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, key.repeat_interleave(repeats, dim=1).float())
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query.float())
    grad_value = torch.einsum("hqk,qhd->khd", weights, grad)
    of_heads = (x.unflatten(1, (kv_heads, repeats)).sum(2) for x in (grad_key, grad_value))
    return tuple(x.to(query.dtype).contiguous() for x in (grad_query, *of_heads))


def _check(query, key, bounds, key_bounds, longest, longest_of_keys, dropout):
    assert (bounds[-1], key_bounds[-1], dropout) == (len(query), len(key), 0)
    assert bounds.dtype == key_bounds.dtype == torch.int32
    assert bounds.diff().max() <= longest and key_bounds.diff().max() <= longest_of_keys


def _flash_window(is_causal, left, right):
    """How many keys the masks of flash attention leave to a query; None = all before it."""
    assert (left, right) == (None, None) if is_causal else (left >= 0 and right == 0)
    return None if is_causal else left + 1


def _flash_attention_forward(
    query,
    key,
    value,
    bounds,
    key_bounds,
    longest,
    longest_of_keys,
    dropout,
    is_causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **_more,
):
    _check(query, key, bounds, key_bounds, longest, longest_of_keys, dropout)
    assert not debug
    window = _flash_window(is_causal, window_size_left, window_size_right)
    output, log_sum_exp = _forward(query, key, value, bounds, key_bounds, scale, window)
    state = torch.empty(2, dtype=torch.uint64)
    return output, log_sum_exp, state, torch.empty((), dtype=torch.uint64), query.new_empty(0)


def _flash_attention_backward(
    grad,
    query,
    key,
    value,
    output,
    log_sum_exp,
    bounds,
    key_bounds,
    longest,
    longest_of_keys,
    dropout,
    is_causal,
    _state,
    _unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **_more,
):
    _check(query, key, bounds, key_bounds, longest, longest_of_keys, dropout)
    window = _flash_window(is_causal, window_size_left, window_size_right)
    return _backward(grad, query, key, value, output, log_sum_exp, bounds, key_bounds, scale, window)


def _efficient_attention_forward(
    query,
    key,
    value,
    bias,
    bounds,
    key_bounds,
    longest,
    longest_of_keys,
    dropout,
    mask_type,
    with_log_sums=False,
    *,
    scale=None,
    **_more,
):
    _check(query[0], key[0], bounds, key_bounds, longest, longest_of_keys, dropout)
    assert longest <= query.shape[1] and longest_of_keys <= key.shape[1]  # the card's operator refuses more
    assert "window_size" not in _more  # the backward pass of torch 2.11 is wrong then
    assert (bias, mask_type, with_log_sums, key.shape[2]) == (None, CAUSAL_FROM_THE_END, True, query.shape[2])
    output, log_sum_exp = _forward(query[0], key[0], value[0], bounds, key_bounds, scale, None)
    multiple = -(-longest // LOG_SUM_MULTIPLE) * LOG_SUM_MULTIPLE
    padded = log_sum_exp.new_full((len(bounds) - 1, len(log_sum_exp), multiple), torch.inf)
    for segment, (start, end) in enumerate(itertools.pairwise(bounds)):
        padded[segment, :, : end - start] = log_sum_exp[:, start:end]
    seed = torch.empty((), dtype=torch.int64)
    return output[None], padded, seed, seed.clone(), longest, longest_of_keys


def _efficient_attention_backward(
    grad,
    query,
    key,
    value,
    bias,
    output,
    bounds,
    key_bounds,
    longest,
    longest_of_keys,
    padded,
    dropout,
    _seed,
    _offset,
    mask_type,
    bias_requires_grad,
    *,
    scale=None,
    **_more,
):
    _check(query[0], key[0], bounds, key_bounds, longest, longest_of_keys, dropout)
    assert longest <= query.shape[1] and longest_of_keys <= key.shape[1]  # the card's operator refuses more
    assert (bias, mask_type, bias_requires_grad) == (None, CAUSAL_FROM_THE_END, False)
    lengths = bounds.diff().tolist()
    assert padded.shape[2] >= longest and padded.shape[2] % LOG_SUM_MULTIPLE == 0
    log_sum_exp = torch.cat([sums[:, :length] for sums, length in zip(padded, lengths, strict=True)], dim=1)
    assert padded.isfinite().sum() == log_sum_exp.numel()
    states = (grad[0], query[0], key[0], value[0], output[0])
    grads = _backward(*states, log_sum_exp, bounds, key_bounds, scale, None)
    return *(each[None] for each in grads), query.new_empty(0)
