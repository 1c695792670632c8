"""A model without weights, as it is sharded."""

import pytest
import torch

from configs.training import TrainingConfig
from utils.model.adapters import add_adapter, trainable_parameters
from utils.model.folder import ModelFolder
from utils.model.weights import empty_base_model, load_weights


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_loras_first_weights_are_the_same_over_an_empty_model(tiny_model, quantization):
    def first_weights(seed: int, *, empty: bool) -> dict[str, torch.Tensor]:
        config = TrainingConfig(use_peft=True, seed=seed)
        model = empty_base_model(ModelFolder(tiny_model), torch.float32, quantization)
        if not empty:
            load_weights(model, ModelFolder(tiny_model), [torch.device("cpu")])
        return trainable_parameters(add_adapter(model, config))

    over_empty, over_loaded = first_weights(1, empty=True), first_weights(1, empty=False)
    other_seed = first_weights(2, empty=True)
    assert over_empty.keys() == over_loaded.keys() and len(over_empty) == 8
    for name, weight in over_empty.items():
        assert torch.equal(weight, over_loaded[name]) and weight.dtype == torch.float32
        if ".lora_A." in name:  # Kaiming-uniform with a = sqrt(5), nn.Linear's own: 1 / sqrt(inputs) at most
            assert 0.9 / 64**0.5 < weight.abs().max() <= 1 / 64**0.5
            assert not torch.equal(weight, other_seed[name])
        else:
            assert weight.eq(0).all()


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_an_empty_model_takes_no_memory(tiny_model, quantization):
    model = empty_base_model(ModelFolder(tiny_model), torch.float32, quantization)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
