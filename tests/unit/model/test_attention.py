"""Packed attention against a plain softmax, one query at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.trainers import make_trainer
from helpers.varlen_on_cpu import use_varlen_on_cpu

from inference.cache import KeyValueCache
from utils.model import attention
from utils.model.attention import Prefix, attention_backward, attention_forward, packed_attention
from utils.model.attention_kernels import EFFICIENT, FLASH
from utils.model.decoder import forward_hidden
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.rows.segments import Contexts, Segments
from utils.training.response_loss import ResponseLoss

CPU = torch.device("cpu")
HEAD_DIM = 8
LAYER = SimpleNamespace(layer_idx=0)


def random_states(heads: int, kv_heads: int, length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, length, HEAD_DIM), (1, kv_heads, length, HEAD_DIM), (1, kv_heads, length, HEAD_DIM)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)


def plain_attention(query, key, value, lengths, prefix=None, scaling=None, window=0):
    """A loop over heads and positions; position p of a segment sees the prefix and 0..p of its segment.

    With a window it sees the last of them alone, so many.
    """
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    rows = []
    start = 0
    for length in lengths:
        for position in range(start, start + length):
            outputs = []
            for head in range(heads):
                keys = key[0, head // group, start : position + 1]
                values = value[0, head // group, start : position + 1]
                if prefix:
                    keys = torch.cat((prefix[0][0, head // group], keys))
                    values = torch.cat((prefix[1][0, head // group], values))
                keys, values = keys[-window:], values[-window:]
                scores = keys @ query[0, head, position] * (scaling or 1 / math.sqrt(HEAD_DIM))
                weights = scores.exp() / scores.exp().sum()
                outputs.append(weights @ values)
            rows.append(torch.stack(outputs))
        start += length
    return torch.stack(rows).unsqueeze(0)


SHAPES = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])


@SHAPES
@pytest.mark.parametrize("lengths", [[9], [4, 1, 4], [1, 1, 7], [3, 6]])
def test_each_segment_sees_itself_alone_and_nothing_ahead(heads, kv_heads, lengths):
    query, key, value = random_states(heads, kv_heads, 9)
    output, weights = packed_attention(LAYER, query, key, value, segments=Segments.of(lengths, CPU))
    assert weights is None
    assert output.shape == (1, 9, heads, HEAD_DIM)
    torch.testing.assert_close(output, plain_attention(query, key, value, lengths))


def test_without_segments_the_row_is_one(tiny_model):
    model, row = load_base_model(ModelFolder(tiny_model), torch.float32, [CPU]), torch.arange(3, 9)
    whole = forward_hidden(model, row, torch.arange(6))
    assert torch.equal(whole, forward_hidden(model, row, torch.arange(6), Segments.of([6], CPU)))
    assert not torch.allclose(whole, forward_hidden(model, row, torch.arange(6), Segments.of([3, 3], CPU)))


@pytest.mark.parametrize("use_peft", [True, False])
def test_over_fp32_weights_attention_gets_what_kernels_take(tiny_model, tmp_path, monkeypatch, use_peft):
    """They take 16 bits alone, and rotated queries over fp32 weights are fp32 under autocast."""
    trainer, asked = make_trainer(tiny_model, tmp_path, use_peft=use_peft), set()
    monkeypatch.setattr(attention, "varlen_kernel", lambda _device, dtype: asked.add(dtype))
    loss_module = ResponseLoss(trainer.model, torch.bfloat16)
    loss_module(trainer.setup.pack(trainer.data.training), 1.0).backward()
    assert asked == {torch.bfloat16}


def test_scaling_is_used():
    query, key, value = random_states(2, 2, 5)
    output, _ = packed_attention(LAYER, query, key, value, scaling=0.7, segments=Segments.of([5], CPU))
    torch.testing.assert_close(output, plain_attention(query, key, value, [5], scaling=0.7))


@SHAPES
def test_gradients(heads, kv_heads):
    lengths = [3, 1, 4]
    ours, plain = random_states(heads, kv_heads, 8), random_states(heads, kv_heads, 8)
    upstream = torch.randn(1, 8, heads, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (packed_attention(LAYER, *ours, segments=Segments.of(lengths, CPU))[0] * upstream).sum().backward()
    (plain_attention(*plain, lengths) * upstream).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# A row of <p0 p1> <a0 a1 a2> <b0> <c0 c1>, in which a and b begin with p.
SHARED = Segments.of(
    [2, 3, 1, 2],
    CPU,
    contexts=Contexts(
        [2, 5, 3, 2],
        torch.tensor([0, 2, 7, 10, 12], dtype=torch.int32),
        torch.tensor([0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7]),
        torch.tensor([[0, 1], [2, 3], [7, 8]]),
        torch.tensor([4, 5, 6, 9, 10, 11]),
    ),
)


@SHAPES
def test_segments_see_the_beginning_that_they_share(heads, kv_heads):
    """As if it stood before each of them; its gradient is what all of them ask of it."""
    ours, plain = random_states(heads, kv_heads, 8), random_states(heads, kv_heads, 8)
    upstream = torch.randn(1, 8, heads, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output, _ = packed_attention(LAYER, *ours, segments=SHARED)
    apart = plain_attention(*(x[:, :, SHARED.contexts.tokens] for x in plain), SHARED.contexts.lengths)
    expected = apart[:, [0, 1, 4, 5, 6, 9, 10, 11]]
    torch.testing.assert_close(output, expected)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


WINDOWS = pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 100])


@WINDOWS
@pytest.mark.parametrize("past", [0, 3])
def test_a_window_reaches_back_over_what_is_shared_and_what_stands_before(window, past):
    """So many keys, whichever of the three they belong to; with gradients."""
    ours, plain = [*random_states(4, 2, 8), *random_prefix(2)], [*random_states(4, 2, 8), *random_prefix(2)]
    upstream = torch.randn(1, 8, 4, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = {"past": prefix_of(ours[3:])} if past else {}
    output, _ = packed_attention(LAYER, *ours[:3], segments=SHARED, sliding_window=window, **before)
    apart = [x[:, :, SHARED.contexts.tokens] for x in plain[:3]]
    prefix = plain[3:] if past else None
    expected = plain_attention(*apart, SHARED.contexts.lengths, prefix, window=window)[:, [0, 1, 4, 5, 6, 9, 10, 11]]
    torch.testing.assert_close(output, expected)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        if mine.grad is not None or theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


@WINDOWS
@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=["flash", "efficient"])
def test_kernels_of_a_card_are_asked_for_the_same_window(kernel, window, monkeypatch):
    use_varlen_on_cpu(monkeypatch, kernel)
    for segments in (SHARED, Segments.of([3, 5], CPU), Segments.of([1, 6, 1], CPU, 40)):
        ours = [x.detach().bfloat16().requires_grad_() for x in random_states(4, 2, 8)]
        plain = [x.detach().double().requires_grad_() for x in ours]
        output, _ = packed_attention(LAYER, *ours, segments=segments, sliding_window=window)
        expected, _ = packed_attention(LAYER, *plain, segments=segments, sliding_window=window)
        torch.testing.assert_close(output, expected, check_dtype=False, rtol=0.02, atol=0.02)
        upstream = torch.randn(1, 8, 4, HEAD_DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
        output.backward(upstream)
        expected.backward(upstream.double())
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, check_dtype=False, rtol=0.03, atol=0.03)


@WINDOWS
@pytest.mark.parametrize("pieces", [[1] * 7, [4, 1, 1, 1], [2, 5], [7]])
def test_a_cache_gives_the_same_in_pieces_as_at_once_with_a_window(pieces, window):
    query, key, value = (x.detach() for x in random_states(4, 2, 7))
    cache, outputs = KeyValueCache(7), []
    for length in pieces:
        at = slice(cache.length, cache.length + length)
        states, segments = (x[:, :, at] for x in (query, key, value)), Segments.of([length], CPU)
        output, _ = packed_attention(LAYER, *states, segments=segments, past=cache, sliding_window=window)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), plain_attention(query, key, value, [7], window=window))


@SHAPES
def test_passes_called_by_hand_are_those_of_autograd(heads, kv_heads):
    for segments in (SHARED, Segments.of([3, 5], CPU)):
        states = random_states(heads, kv_heads, 8)
        upstream = torch.randn(1, 8, heads, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        output, _ = packed_attention(LAYER, *states, segments=segments)
        output.backward(upstream)
        by_rows = [x.detach()[0].transpose(0, 1) for x in states]
        by_hand, statistics = attention_forward(*by_rows, segments, 1 / math.sqrt(HEAD_DIM))
        torch.testing.assert_close(by_hand, output.detach()[0])
        gradients = attention_backward(upstream[0], *by_rows, by_hand, statistics, segments, 1 / math.sqrt(HEAD_DIM))
        for gradient, state in zip(gradients, states, strict=True):
            torch.testing.assert_close(gradient, state.grad[0].transpose(0, 1))


@SHAPES
@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=["flash", "efficient"])
def test_kernels_of_a_card_are_asked_for_the_same(heads, kv_heads, kernel, monkeypatch):
    """In bf16, by a formula in the place of the card's operators; with autograd, and by hand."""
    use_varlen_on_cpu(monkeypatch, kernel)
    for segments in (SHARED, Segments.of([3, 5], CPU), Segments.of([1, 6, 1], CPU, 40)):
        ours = [x.detach().bfloat16().requires_grad_() for x in random_states(heads, kv_heads, 8)]
        plain = [x.detach().double().requires_grad_() for x in ours]
        upstream = torch.randn(1, 8, heads, HEAD_DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
        output, _ = packed_attention(LAYER, *ours, segments=segments, scaling=0.3)
        expected, _ = packed_attention(LAYER, *plain, segments=segments, scaling=0.3)
        torch.testing.assert_close(output, expected, check_dtype=False, rtol=0.02, atol=0.02)
        output.backward(upstream)
        expected.backward(upstream.double())
        by_rows = [x.detach()[0].transpose(0, 1) for x in ours]
        by_hand = attention_backward(upstream[0], *by_rows, *attention_forward(*by_rows, segments, 0.3), segments, 0.3)
        for mine, hand, theirs in zip(ours, by_hand, plain, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, check_dtype=False, rtol=0.03, atol=0.03)
            assert torch.equal(mine.grad[0].transpose(0, 1), hand)


@SHAPES
@pytest.mark.parametrize("pieces", [[1] * 7, [4, 1, 1, 1], [3, 3, 1], [7]])
def test_cache_gives_the_same_in_pieces_as_at_once(heads, kv_heads, pieces):
    query, key, value = (x.detach() for x in random_states(heads, kv_heads, 7))
    cache = KeyValueCache(10)
    outputs = []
    for length in pieces:
        at = slice(cache.length, cache.length + length)
        states = (x[:, :, at] for x in (query, key, value))
        outputs.append(packed_attention(LAYER, *states, segments=Segments.of([length], CPU), past=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), plain_attention(query, key, value, [7]))


def test_layers_of_a_cache_are_kept_apart():
    first, second = (x.detach()[0].transpose(0, 1) for x in random_states(2, 2, 3)[1:])
    caches = KeyValueCache(4), KeyValueCache(4)
    caches[0].extend(first, first)
    keys, values = caches[1].extend(second, -second)
    torch.testing.assert_close(keys, second)
    torch.testing.assert_close(values, -second)
    assert [cache.length for cache in caches] == [3, 3]


def random_prefix(kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    key, value = (torch.randn(1, kv_heads, 3, HEAD_DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    return key.requires_grad_(), value.requires_grad_()


def prefix_of(states) -> Prefix:
    return Prefix(*(x[0].transpose(0, 1) for x in states))


@SHAPES
def test_every_segment_sees_the_whole_prefix(heads, kv_heads):
    lengths = [4, 1, 3]
    query, key, value = random_states(heads, kv_heads, 8)
    prefix = random_prefix(kv_heads)
    segments = Segments.of(lengths, CPU)
    output, _ = packed_attention(LAYER, query, key, value, segments=segments, past=prefix_of(prefix))
    torch.testing.assert_close(output, plain_attention(query, key, value, lengths, prefix))


def test_a_prefix_stands_before_shared_beginnings_too():
    """Each segment against one that has prefix and beginning before it alone; with gradients."""
    ours, plain = [*random_states(4, 2, 8), *random_prefix(2)], [*random_states(4, 2, 8), *random_prefix(2)]
    upstream = torch.randn(1, 8, 4, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output, _ = packed_attention(LAYER, *ours[:3], segments=SHARED, past=prefix_of(ours[3:]))
    apart = [x[:, :, SHARED.contexts.tokens] for x in plain[:3]]
    expected = plain_attention(*apart, SHARED.contexts.lengths, plain[3:])[:, [0, 1, 4, 5, 6, 9, 10, 11]]
    torch.testing.assert_close(output, expected)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("segments", [SHARED, Segments.of([2, 3, 1, 2], CPU)], ids=["shared", "apart"])
def test_several_continuations_of_what_a_cache_holds(segments):
    """As if each segment came alone after the cached tokens."""
    states = [x.detach() for x in random_states(4, 2, 5 + 8)]
    cache = KeyValueCache(13)
    for at, of_row in ((slice(5), Segments.of([5], CPU)), (slice(5, 13), segments)):
        output, _ = packed_attention(LAYER, *(x[:, :, at] for x in states), segments=of_row, past=cache)
    row, past = [x[:, :, 5:] for x in states], [x[:, :, :5] for x in states[1:]]
    rows = segments.contexts.tokens if segments.contexts else torch.arange(8)
    lengths = segments.contexts.lengths if segments.contexts else segments.lengths
    expected = plain_attention(*(x[:, :, rows] for x in row), lengths, past)
    torch.testing.assert_close(output, expected[:, [0, 1, 4, 5, 6, 9, 10, 11]] if segments.contexts else expected)


def test_gradients_reach_the_prefix():
    lengths = [4, 1, 3]
    query, key, value = random_states(4, 2, 8)
    ours, plain = random_prefix(2), random_prefix(2)
    segments = Segments.of(lengths, CPU)
    output, _ = packed_attention(LAYER, query, key, value, segments=segments, past=prefix_of(ours))
    output.square().sum().backward()
    plain_attention(query, key, value, lengths, plain).square().sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_cache_that_begins_with_a_prefix():
    query, key, value = (x.detach() for x in random_states(4, 2, 6))
    prefix = tuple(x.detach() for x in random_prefix(2))
    cache = KeyValueCache(3 + 6, prefix_of(prefix))
    assert cache.length == 3
    outputs = []
    for start, length in ((0, 4), (4, 1), (5, 1)):
        at = slice(start, start + length)
        states = (x[:, :, at] for x in (query, key, value))
        outputs.append(packed_attention(LAYER, *states, segments=Segments.of([length], CPU), past=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), plain_attention(query, key, value, [6], prefix))
