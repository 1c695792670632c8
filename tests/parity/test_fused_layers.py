"""The layers written by hand against transformers' and PEFT's own, in outputs and gradients."""

import peft
import pytest
import torch
from helpers.tiny_models import make_model
from helpers.trainers import make_trainer, project_logits, save_adapter, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.machine.precision import Precision
from utils.model.adapters import add_adapter, trainable_parameters
from utils.model.decoder import causal_lm, forward_hidden, run_plain
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers, why_plain
from utils.model.quantization import QUANTIZED_LINEARS, Int8Linear
from utils.model.weights import load_base_model
from utils.rows.segments import Segments
from utils.runs.checkpoint import read_checkpoint
from utils.training.step_plan import StepPlan

CPU = torch.device("cpu")
SEQUENCE = [1, 300, 301, 302, 555, 410, 333, 278, 599, 261, 480, 481]
LENGTHS = [5, 1, 9, 3]
TARGETS = [["all-linear"], ["q_proj", "v_proj"], ["o_proj", "down_proj"], ["k_proj", "up_proj"]]


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "deep", layers=6)


def adapted_model(folder, targets, quantization=None, dtype=torch.float32, **lora):
    """A model with an adapter whose B is not zero, so that A gets a gradient too."""
    config = TrainingConfig(use_peft=True, lora_config=LoraConfig(r=4, lora_alpha=6, target_modules=targets, **lora))
    model = add_adapter(load_base_model(ModelFolder(folder), dtype, [CPU], quantization), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def outputs_and_gradients(model, run_layer, step_plan):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 500, (sum(LENGTHS),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    activations = step_plan.activations(sum(LENGTHS), len(causal_lm(model).model.layers)) if step_plan else None
    hidden = forward_hidden(
        model, input_ids, positions, Segments.of(LENGTHS, CPU), activations=activations, run_layer=run_layer
    )
    model.zero_grad()
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def check_equal(model, step_plan=None):
    expected, expected_gradients = outputs_and_gradients(model, run_plain, None)
    fused = FusedLayers(model, torch.float32)
    fused.refresh()
    hidden, gradients = outputs_and_gradients(model, fused, step_plan)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


class Calls(TorchDispatchMode):
    """Writes down which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_memory_holds_a_weight_once_and_all_adapters_are_refreshed_together(grouped_model):
    model = adapted_model(grouped_model, ["all-linear"])
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    fused = FusedLayers(model, torch.float32)
    parameters = dict(model.named_parameters())
    held = {linear.weight_and_b.untyped_storage().data_ptr() for linear in linears_of(fused)}
    assert {parameters[name].untyped_storage().data_ptr() for name in before} == held
    assert len(held) == len(before) == 2 * 7
    assert all(torch.equal(parameters[name], weight) for name, weight in before.items())
    with Calls() as calls:
        fused.refresh()
    assert sorted(calls.names) == ["_foreach_copy_", "_foreach_mul"]


def linears_of(fused):
    groups = (group for weights in fused.weights.values() for group in weights[4:])
    return [linear for group in groups for linear in group.linears]


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("folder_name", ["tiny_model", "grouped_model", "mistral_model", "qwen3_model"])
def test_outputs_and_gradients_are_the_plain_layers(request, folder_name, targets):
    check_equal(adapted_model(request.getfixturevalue(folder_name), targets))


def test_the_scale_of_rslora_too(grouped_model):
    check_equal(adapted_model(grouped_model, ["all-linear"], use_rslora=True))


@pytest.mark.parametrize("kept_layers", [0, 1])
@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
@pytest.mark.parametrize("folder_name", ["grouped_model", "qwen3_model"])
def test_quantised_bases_and_recomputed_layers_too(request, folder_name, quantization, kept_layers):
    model = adapted_model(request.getfixturevalue(folder_name), ["all-linear"], quantization)
    check_equal(model, StepPlan(sum(LENGTHS), kept_layers))


@pytest.mark.parametrize(("kept_layers", "offload_every"), [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 4)])
def test_activations_that_waited_in_host_memory_too(deep_model, kept_layers, offload_every):
    step_plan = StepPlan(sum(LENGTHS), kept_layers, offload_every)
    check_equal(adapted_model(deep_model, ["all-linear"]), step_plan)


def test_biases_are_part_of_the_layers(grouped_model, tmp_path):
    """Qwen2 has them on q, k and v."""
    folder = tmp_path / "qwen2"
    config = Qwen2Config(
        vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    check_equal(adapted_model(folder, ["all-linear"]))


@pytest.mark.parametrize(
    ("settings", "dtype", "reason"),
    [
        ({}, torch.bfloat16, ""),
        ({}, torch.float32, "bf16 or fp16"),
        ({"enable_fsdp": True}, torch.bfloat16, "FSDP"),
        ({"lora_config": LoraConfig(lora_dropout=0.1)}, torch.bfloat16, "lora_dropout 0"),
        ({"lora_config": LoraConfig(modules_to_save=["lm_head"])}, torch.bfloat16, ""),
        ({"lora_config": LoraConfig(modules_to_save=["norm"])}, torch.bfloat16, "norms"),
        ({"lora_config": LoraConfig(use_dora=True)}, torch.bfloat16, "use_dora False"),
        ({"lora_config": LoraConfig(use_rslora=True)}, torch.bfloat16, ""),
        ({"peft_method": "prefix"}, torch.bfloat16, "LoRA"),
        ({"use_peft": False}, torch.bfloat16, "LoRA"),
    ],
)
def test_where_they_do_not_serve_the_reason_is_named(monkeypatch, settings, dtype, reason):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (8, 0))
    config = TrainingConfig(**{"use_peft": True, **settings})
    answer = why_plain(config, {"model_type": "llama", "hidden_act": "silu"}, torch.device("cuda"), dtype)
    assert reason in answer
    assert bool(reason) == bool(answer)
    assert why_plain(config, {"model_type": "llama"}, CPU, dtype)
    assert "gemma" in why_plain(config, {"model_type": "gemma"}, torch.device("cuda"), torch.bfloat16)


def test_in_bf16_a_trained_embedding_does_not_change_the_type(tiny_model):
    """It is fp32, as all that is trained; plain layers are under autocast then."""
    lora = LoraConfig(target_modules=["all-linear"], modules_to_save=["embed_tokens"])
    base = load_base_model(ModelFolder(tiny_model), torch.bfloat16, [CPU])
    model = add_adapter(base, TrainingConfig(use_peft=True, lora_config=lora))
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = outputs_and_gradients(model, run_plain, None)
    fused = FusedLayers(model, torch.bfloat16)
    fused.refresh()
    hidden, gradients = outputs_and_gradients(model, fused, None)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=0.1, atol=0.1)
    (embedding,) = (name for name in gradients if "embed_tokens" in name)
    difference = (gradients[embedding] - expected_gradients[embedding]).norm()
    assert difference < 0.1 * expected_gradients[embedding].norm()


def test_in_bf16_fifty_steps_stay_within_a_per_cent(deep_model, tmp_path, monkeypatch):
    bf16 = Precision(torch.bfloat16, torch.bfloat16, "test")
    monkeypatch.setattr("utils.training.setup.choose_precision", lambda *_arguments: bf16)
    settings = {"lora_config": LoraConfig(target_modules=["all-linear"]), "max_steps": 50, "lr": 1e-3}
    settings |= {"batch_size_training": 4, "num_epochs": 50}
    expected = train(make_trainer(deep_model, tmp_path / "plain", **settings))
    monkeypatch.setattr("utils.training.setup.why_plain", lambda *_arguments: "")
    losses = train(make_trainer(deep_model, tmp_path / "fused", **settings))
    assert losses == pytest.approx(expected, rel=0.01)
    assert losses != expected
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_a_run_learns_the_same_and_its_adapter_is_plain_pefts(grouped_model, tmp_path, monkeypatch, quantization):
    settings = {
        "quantization": quantization,
        "lora_config": LoraConfig(target_modules=["all-linear"]),
        "batch_size_training": 4,
        "max_steps": 12,
        "num_epochs": 6,
        "lr": 1e-2,
        "micro_batch_size": 2,
        "save_steps": 6,
    }
    plain = make_trainer(grouped_model, tmp_path / "plain", **settings)
    expected = train(plain)
    monkeypatch.setattr("utils.training.setup.why_plain", lambda *_arguments: "")
    trainer = make_trainer(grouped_model, tmp_path / "fused", **settings)
    assert trainer.stepper.loss_module.fused and not plain.stepper.loss_module.fused
    losses = train(trainer)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.95 * losses[0]

    checkpoint = read_checkpoint(tmp_path / "fused" / "checkpoints" / "step-6")
    resumed = make_trainer(grouped_model, tmp_path / "resumed", checkpoint=checkpoint, **settings)
    assert len(losses) == 12 and train(resumed) == losses[6:]

    if quantization is None:
        trained = project_logits(trainer.model.eval(), SEQUENCE)
        base = load_base_model(ModelFolder(grouped_model), torch.float32, [CPU])
        reference = LlamaForCausalLM.from_pretrained(grouped_model, dtype=torch.float32)
        with torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(reference, str(save_adapter(trainer)))
            logits = adapted(input_ids=torch.tensor([SEQUENCE])).logits[0]
        torch.testing.assert_close(trained, logits, rtol=1e-4, atol=1e-4)
        assert (trained - project_logits(base, SEQUENCE)).abs().max() > 0.1


def weight_of_a_plain_loop(layer) -> torch.Tensor:
    """The weight that a quantised layer stores, in fp32: a number after the other."""
    if isinstance(layer, Int8Linear):
        rows = zip(layer.weight.tolist(), layer.scale.flatten(), strict=True)
        return torch.stack([torch.stack([number * scale for number in row]) for row, scale in rows])
    numbers = []
    for byte in layer.weight.flatten().tolist():
        for code in (byte >> 4, byte & 15):
            block = len(numbers) // 64
            scale = layer.absmax_code[int(layer.absmax[block])] * layer.absmax_absmax[block // 256]
            numbers.append(layer.code[code] * (scale + layer.absmax_offset))
    return torch.stack(numbers).view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_dequantisation_compiled_or_not_is_a_plain_loops_bit_by_bit(quantization, monkeypatch):
    """Computed in fp32, and rounded once."""
    layer = QUANTIZED_LINEARS[quantization](nn.Linear(128, 20, bias=False, device="meta"), torch.float32)
    layer.quantize_(torch.randn(20, 128, generator=torch.Generator().manual_seed(0)) * 0.05)
    expected = weight_of_a_plain_loop(layer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer.dequantize_stored(dtype, *layer.stored()), expected.to(dtype))
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        assert torch.equal(layer.dequantize_fused(dtype, *layer.stored()), expected.to(dtype))
        monkeypatch.undo()
