"""LoRA's layers that add before they round: the same numbers as PEFT's, but for what PEFT rounds away in bf16."""

import pytest
import torch
from helpers.settings import setup_of

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.machine.precision import Precision
from utils.machine.world import World
from utils.model.adapters import add_adapter, trainable_parameters
from utils.model.decoder import causal_lm, forward_hidden
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers
from utils.model.lora_forward import add_before_rounding
from utils.model.quantization import rounded_weight
from utils.model.weights import load_base_model
from utils.rows.segments import Segments
from utils.training.trainable import load_trainable

CPU = torch.device("cpu")
LENGTH = 512
KINDS = pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)


def adapted(folder, dtype=torch.float32, quantization=None, targets=("all-linear",), **lora):
    config = TrainingConfig(use_peft=True, lora_config=LoraConfig(target_modules=list(targets), **lora))
    return add_adapter(load_base_model(ModelFolder(folder), dtype, [CPU], quantization), config)


def set_b(model, size):
    """Every B as if Adam had taken its first step from zero, of `size`."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator).sign()


def hidden_of(model, run_layer=None):
    input_ids = torch.randint(3, 500, (LENGTH,), generator=torch.Generator().manual_seed(1))
    segments = Segments.of([LENGTH], CPU)
    return forward_hidden(model, input_ids, torch.arange(LENGTH), segments, run_layer=run_layer)


def arriving_share(model, added, run_layer=None, refresh=lambda: None):
    """How much of `added`, what small Bs add to the model's output in fp32, they add in bf16."""
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run_layer is None):
        for size in (0.0, 1e-4):
            set_b(model, size)
            refresh()
            outputs.append(hidden_of(model, run_layer).float())
    return (((outputs[1] - outputs[0]) * added).sum() / added.pow(2).sum()).item()


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
@KINDS
def test_in_bf16_small_updates_arrive(grouped_model, quantization, kind):
    exact = adapted(grouped_model, torch.float32, quantization, **kind)
    with torch.no_grad():
        set_b(exact, 0.0)
        without = hidden_of(exact)
        set_b(exact, 1e-4)
        added = hidden_of(exact) - without
    model = adapted(grouped_model, torch.bfloat16, quantization, **kind)
    assert arriving_share(model, added) < 0.6  # PEFT's own layers
    add_before_rounding(model)
    assert arriving_share(model, added) == pytest.approx(1.0, abs=0.15)
    for layer in causal_lm(model).model.layers:
        layer.compile(backend="aot_eager")
    assert arriving_share(model, added) == pytest.approx(1.0, abs=0.15)
    torch._dynamo.reset()
    if "use_dora" in kind:  # the fused layers have none
        return
    fused = FusedLayers(model, torch.bfloat16)
    assert arriving_share(model, added, fused, fused.refresh) == pytest.approx(1.0, abs=0.15)


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]], ids="+".join)
@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_in_fp32_outputs_and_gradients_are_pefts(grouped_model, quantization, targets, dropout, kind):
    model = adapted(grouped_model, quantization=quantization, targets=targets, lora_dropout=dropout, **kind).train()
    set_b(model, 0.02 if "use_rslora" in kind else 0.05)
    expected, expected_gradients = outputs_and_gradients(model)
    add_before_rounding(model)
    hidden, gradients = outputs_and_gradients(model)
    check_equal((hidden, gradients), (expected, expected_gradients))


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_dora_makes_rows_as_long_as_it_has_learnt(tiny_model, quantization):
    """Against the paper's formula; before the first step nothing is changed."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], use_dora=True)
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [CPU], quantization)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before = base.model.layers[1].mlp.up_proj(x)
    model = add_adapter(base, TrainingConfig(use_peft=True, lora_config=config))
    layer = causal_lm(model).model.layers[1].mlp.up_proj
    torch.testing.assert_close(layer(x), before)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.requires_grad and magnitude.dtype == torch.float32
    set_b(model, 0.05)
    magnitude.data *= torch.linspace(0.5, 1.5, len(magnitude))
    weight = dict(ModelFolder(tiny_model).tensors())["model.layers.1.mlp.up_proj.weight"]
    weight = rounded_weight(weight, quantization) if quantization else weight
    directed = weight + 6 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = x @ (magnitude[:, None] * directed / directed.square().sum(1, keepdim=True).sqrt()).t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    add_before_rounding(model)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@KINDS
def test_compiled_layers_give_the_same(grouped_model, kind):
    model = adapted(grouped_model, **kind)
    set_b(model, 0.05)
    expected, expected_gradients = outputs_and_gradients(model)
    add_before_rounding(model)
    for layer in causal_lm(model).model.layers:
        layer.compile(backend="aot_eager")
    hidden, gradients = outputs_and_gradients(model)
    check_equal((hidden, gradients), (expected, expected_gradients))
    torch._dynamo.reset()


def check_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_in_16_bits_has_such_layers(grouped_model, tmp_path, dtype):
    config = TrainingConfig(model_name=str(grouped_model), output_dir=str(tmp_path), use_peft=True)
    setup = setup_of(config, World(0, 1, [CPU]), precision=Precision(dtype, dtype, ""))
    module = load_trainable(config, setup, ModelFolder(grouped_model))
    forwards = [layer.forward for layer in module.modules() if hasattr(layer, "lora_A")]
    assert forwards
    assert {forward.__module__ == "utils.model.lora_forward" for forward in forwards} == {dtype != torch.float32}


def outputs_and_gradients(model):
    torch.manual_seed(3)  # of dropout
    hidden = hidden_of(model)
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
