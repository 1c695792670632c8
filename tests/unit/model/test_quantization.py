"""Quantised linear layers: bitsandbytes' stored bits, and a plain matrix product with the dequantised weight."""

import pytest
import torch
from bitsandbytes import functional
from torch import nn

from utils.model.quantization import QUANTIZED_LINEARS, QuantizedLinear, quantize_linears, rounded_weight

SHAPES = [(32, 64), (33, 66), (7, 100), (1, 64), (128, 24), (64, 96), (5, 96), (3, 32)]
"""Rows that are no whole number of NF4's blocks among them; they hold whole bytes: an even number of weights."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("quantization", ["8bit", "4bit"])


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def quantized_layer(
    quantization: str, weight: torch.Tensor, compute: torch.dtype = torch.float32, bias: torch.Tensor | None = None
) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer = QUANTIZED_LINEARS[quantization](linear, compute)
    layer.quantize_(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def bitsandbytes_weight(quantization: str, weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' own functions make of a weight.

    For NF4 of one long row: the kernel for CPUs begins a block with every row that is a multiple of 32 wide, though
    what is stored runs on across rows (0.50.2; the one for GPUs reads what is stored).
    """
    shape, weight = weight.shape, weight.float()
    if quantization == "8bit":
        stored, absmax, _outliers = functional.int8_vectorwise_quant(weight)
        return functional.int8_vectorwise_dequant(stored, absmax)
    row = weight.reshape(1, -1)
    stored, state = functional.quantize_4bit(row, blocksize=64, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(stored, state).view(shape)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_is_the_one_that_bitsandbytes_dequantises(quantization, shape, dtype):
    weight = random_weight(shape, dtype)
    layer = quantized_layer(quantization, weight)
    expected = bitsandbytes_weight(quantization, weight)
    assert layer.dequantize().shape == shape
    torch.testing.assert_close(layer.dequantize(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 63)], ids=str)
def test_stored_int8_are_bitsandbytes_own(shape):
    weight = random_weight(shape)
    stored, absmax, _outliers = functional.int8_vectorwise_quant(weight)
    layer = quantized_layer("8bit", weight)
    assert torch.equal(layer.weight, stored)
    torch.testing.assert_close(layer.scale.flatten() * 127, absmax.flatten())
    torch.testing.assert_close(layer.dequantize(), bitsandbytes_weight("8bit", weight), rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_weights_are_those_of_a_plain_loop(shape):
    """Two to a byte, the first in its upper half; 64 to a scale, whatever the rows are."""
    weight = random_weight(shape)
    stored, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = []
    for byte in stored.flatten().tolist():
        for number in (byte >> 4, byte & 15):
            expected.append(state.code[number].item() * scales[len(expected) // 64].item())
    found = quantized_layer("4bit", weight).dequantize()
    torch.testing.assert_close(found, torch.tensor(expected)[: weight.numel()].view(shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_nf4_bits_are_bitsandbytes_own(shape):
    weight = random_weight(shape)
    stored, _state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(quantized_layer("4bit", weight).weight.flatten(), stored.flatten())


@pytest.mark.parametrize("shape", [(128, 256), (128, 96), (129, 24)], ids=str)
@pytest.mark.parametrize(("quantization", "error"), [("8bit", 0.01), ("4bit", 0.11)])
def test_rounding_error_is_what_so_many_bits_allow(quantization, error, shape):
    weight = random_weight(shape)
    relative = (rounded_weight(weight, quantization) - weight).norm() / weight.norm()
    assert error / 4 < relative < error


@BOTH
def test_a_row_of_zeros_stays_zero(quantization):
    weight = random_weight((8, 64))
    weight[3] = 0
    rounded = rounded_weight(weight, quantization)
    assert torch.isfinite(rounded).all()
    # NF4's scales are themselves quantised around their mean, so a zero block keeps its exact code for zero.
    assert torch.equal(rounded[3], torch.zeros(64))


@BOTH
@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_backward_are_a_plain_product_with_the_dequantised_weight(quantization, compute, with_bias):
    weight = random_weight((48, 80))
    bias = torch.linspace(-1, 1, 48) if with_bias else None
    layer = quantized_layer(quantization, weight, compute, bias)
    x = torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(1)).to(compute).requires_grad_()
    plain_x = x.detach().clone().requires_grad_()
    plain_weight = bitsandbytes_weight(quantization, weight).to(compute)

    output = layer(x)
    expected = plain_x @ plain_weight.t()
    expected = expected + bias.to(compute) if with_bias else expected
    assert output.dtype == compute
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if compute == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output, expected, **tolerance)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(compute)
    output.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, plain_x.grad, **tolerance)


@BOTH
def test_train_and_eval_compute_the_same_function(quantization):
    layer = quantized_layer(quantization, random_weight((64, 64)))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [layer.train()(x), layer.eval()(x), layer.train()(x)]
    with_gradient = layer(x.clone().requires_grad_())
    for other in (*outputs[1:], with_gradient.detach()):
        assert torch.equal(outputs[0], other)


@BOTH
def test_training_after_an_evaluation_still_gives_gradients(quantization):
    layer = quantized_layer(quantization, random_weight((64, 64)))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(2):
        once = x.clone().requires_grad_()
        layer.train()(once).square().sum().backward()
        gradients.append(once.grad)
        with torch.inference_mode():
            layer.eval()(x)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


@BOTH
def test_input_of_another_dtype_is_computed_in_the_layers_own(quantization):
    layer = quantized_layer(quantization, random_weight((32, 64)), torch.bfloat16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), layer(x.bfloat16()))


@BOTH
def test_weight_is_frozen_and_small(quantization):
    layer = quantized_layer(quantization, random_weight((128, 256)))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    bytes_a_weight = {"8bit": 1.0, "4bit": 0.5}[quantization]
    assert layer.weight.nbytes == 128 * 256 * bytes_a_weight
    extra = sum(buffer.nbytes for name, buffer in layer.named_buffers() if "code" not in name)
    assert extra < 0.05 * layer.weight.nbytes


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_weight_is_the_layers_weight_in_fp32(quantization, dtype):
    weight = random_weight((33, 66), dtype)
    rounded = rounded_weight(weight, quantization)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, quantized_layer(quantization, weight).dequantize())
    assert not torch.equal(rounded, weight.float())


@BOTH
def test_every_linear_layer_within_is_replaced(quantization):
    module = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU())})
    quantize_linears(module, quantization, torch.float32)
    kinds = {name: type(child) for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    assert kinds == {"a": QUANTIZED_LINEARS[quantization], "b.0": QUANTIZED_LINEARS[quantization]}
