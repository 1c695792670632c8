"""The table of families, against what transformers and PEFT know of them."""

import pytest
import torch
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import UserError
from configs.training import TrainingConfig
from utils.model.adapters import add_adapter
from utils.model.families import FAMILIES
from utils.planning.shape import Shape

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def model_of(family: str):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_key_value_heads=4, **SMALL))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_heads_are_normalised_as_the_table_says(name):
    model = model_of(name)
    assert hasattr(model.model.layers[0].self_attn, "q_norm") == FAMILIES[name].head_norms
    assert Shape.of(model.config.to_dict()).head_norms == FAMILIES[name].head_norms


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_adapter_is_for_the_families_that_peft_has_it_for(name):
    assert (name in TRANSFORMERS_MODEL_CONFIG) == FAMILIES[name].has_llama_adapter
    if not FAMILIES[name].has_llama_adapter:
        with pytest.raises(UserError, match=f"models of type llama, mistral, not for {name}.*--peft_method lora"):
            add_adapter(model_of(name), TrainingConfig(use_peft=True, peft_method="llama_adapter"))
