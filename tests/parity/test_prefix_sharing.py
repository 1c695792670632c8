"""Rows in which examples share their beginning once, against rows in which each has its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.trainers import make_trainer, train
from helpers.varlen_on_cpu import use_varlen_on_cpu
from test_fused_layers import adapted_model
from torch._dynamo.utils import counters

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.model.adapters import add_adapter, prepare_full, trainable_parameters
from utils.model.attention_kernels import EFFICIENT, FLASH
from utils.model.folder import ModelFolder
from utils.model.fused_layers import Functions, FusedLayers
from utils.model.weights import load_base_model
from utils.rows.packing import pack
from utils.training.response_loss import ResponseLoss

CPU = torch.device("cpu")


def examples_with_prefixes(lengths=(7, 3, 0, 7, 3, 7, 9)) -> list[Example]:
    """Examples that share so many tokens each with those of the same number; 9 stands alone."""
    chooser = np.random.default_rng(3)
    beginnings = {length: chooser.integers(3, 600, length) for length in set(lengths)}
    made = []
    for number, length in enumerate(lengths, 1):
        own = chooser.integers(3, 600, 4 + 3 * number)
        ids = np.concatenate((beginnings[length], own)).astype(np.int32)
        # Of the first, the response's first token is the first that is not shared.
        made.append(Example(number, "", ids, learnt=((length + number, len(ids)),), shared_length=length))
    return made


def loss_and_gradients(loss_module, examples, device=CPU):
    parameters = trainable_parameters(loss_module.model)
    loss_module.model.zero_grad()
    loss = loss_module(pack(examples, device, longest=40), 1.0)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in parameters.items()}


def check_equal(loss_module):
    shared = examples_with_prefixes()
    apart = [replace(example, shared_length=0) for example in shared]
    assert len(pack(shared, CPU).input_ids) == len(pack(apart, CPU).input_ids) - 2 * 7 - 3
    loss, gradients = loss_and_gradients(loss_module, shared)
    expected, expected_gradients = loss_and_gradients(loss_module, apart)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("folder_name", ["tiny_model", "grouped_model", "qwen3_model"])
def test_lora_learns_the_same(request, folder_name, fused):
    model = adapted_model(request.getfixturevalue(folder_name), ["all-linear"])
    module = ResponseLoss(model, torch.float32, FusedLayers(model, torch.float32) if fused else None)
    module.refresh()
    check_equal(module)


def test_full_fine_tuning_and_llama_adapter_learn_the_same(grouped_model):
    def base():
        return load_base_model(ModelFolder(grouped_model), torch.float32, [CPU])

    check_equal(ResponseLoss(prepare_full(base()), torch.float32))
    model = add_adapter(base(), TrainingConfig(use_peft=True, peft_method="llama_adapter"))
    for name, parameter in trainable_parameters(model).items():
        if "gate" in name:
            parameter.data.fill_(0.7)  # at zero the adapter adds nothing, and learns nothing else
    check_equal(ResponseLoss(model, torch.float32))


def test_a_learnt_prefix_stands_before_shared_beginnings(grouped_model):
    """Though a run with prefix tuning does not share them."""
    base = load_base_model(ModelFolder(grouped_model), torch.float32, [CPU])
    check_equal(ResponseLoss(add_adapter(base, TrainingConfig(use_peft=True, peft_method="prefix")), torch.float32))


@pytest.mark.filterwarnings("ignore")  # of torch, about torch
@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=["flash", "efficient"])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_layers_take_any_number_of_examples_and_prefixes(grouped_model, monkeypatch, kernel, fused):
    """Full fine-tuning and LoRA in bf16, with a kernel for all examples at once."""
    use_varlen_on_cpu(monkeypatch, kernel)
    if fused:
        model = adapted_model(grouped_model, ["all-linear"], dtype=torch.bfloat16)
        module = ResponseLoss(model, torch.bfloat16, FusedLayers(model, torch.bfloat16))
    else:
        base = load_base_model(ModelFolder(grouped_model), torch.float32, [CPU])
        module = ResponseLoss(prepare_full(base), torch.bfloat16)
    module.refresh()
    rows = [(7, 7), (7, 3, 3, 0, 7), (3, 3, 3), (9, 9, 9, 9, 9, 0, 0)]
    expected = [loss_and_gradients(module, examples_with_prefixes(row)) for row in rows]
    torch._dynamo.reset()
    counters.clear()
    if fused:
        module.fused.functions = Functions(*(torch.compile(f, backend="aot_eager") for f in module.fused.functions))
    else:
        for layer in module.model.model.layers:
            layer.compile(dynamic=True, backend="aot_eager_decomp_partition")
    for row, (loss, gradients) in zip(rows, expected, strict=True):
        found, found_gradients = loss_and_gradients(module, examples_with_prefixes(row))
        assert found == pytest.approx(loss, rel=0.01)
        for name, gradient in gradients.items():
            assert (found_gradients[name] - gradient).norm() < 0.05 * gradient.norm(), name
    assert counters["stats"]["unique_graphs"] == (2 if fused else 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_a_run_learns_the_same(grouped_model, tmp_path, monkeypatch, data_file, micro_batch_size):
    settings = {
        "batch_size_training": 8, "max_steps": 6, "lr": 1e-2, "val_set_size": 4, "micro_batch_size": micro_batch_size,
        "lora_config": LoraConfig(target_modules=["all-linear"]),
    }  # fmt: skip
    trainer = make_trainer(grouped_model, tmp_path / "shared", data_file, **settings)
    assert all(example.shared_length > 10 for example in [*trainer.data.training, *trainer.data.held_out])
    losses, held_out = train(trainer), trainer.stepper.evaluate(trainer.data.held_out)
    monkeypatch.setattr("ft_datasets.loading.share_prefixes", list)
    apart = make_trainer(grouped_model, tmp_path / "apart", data_file, **settings)
    assert not any(example.shared_length for example in apart.data.training)
    assert losses == pytest.approx(train(apart), rel=1e-5)
    assert held_out == pytest.approx(apart.stepper.evaluate(apart.data.held_out), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [{"lora_config": LoraConfig(lora_dropout=0.1)}, {"peft_method": "prefix"}])
def test_where_examples_differ_by_chance_or_have_more_before_them_nothing_is_shared(
    tiny_model, tmp_path, data_file, settings
):
    trainer = make_trainer(tiny_model, tmp_path, data_file, **settings)
    assert not any(example.shared_length for example in trainer.data.training)
