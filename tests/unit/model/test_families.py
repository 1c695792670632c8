"""The table of families, against what transformers and PEFT know of them."""

import pytest
import torch
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs.errors import UserError
from configs.training import TrainingConfig
from utils.model.adapters import add_adapter
from utils.model.families import FAMILIES, ROPE_KINDS, Rope
from utils.planning.shape import Shape

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}


def model_of(family: str):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_key_value_heads=4, **SMALL))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_heads_are_normalised_as_the_table_says(name):
    model = model_of(name)
    modules = dict(model.model.layers[0].self_attn.named_children())
    assert bool({"q_norm", "query_layernorm"} & modules.keys()) == FAMILIES[name].head_norms
    assert Shape.of(model.config.to_dict()).head_norms == FAMILIES[name].head_norms


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_adapter_is_for_the_families_that_peft_has_it_for(name):
    assert (name in TRANSFORMERS_MODEL_CONFIG) == FAMILIES[name].has_llama_adapter
    if not FAMILIES[name].has_llama_adapter:
        with pytest.raises(UserError, match=f"models of type llama, mistral, not for {name}.*--peft_method lora"):
            add_adapter(model_of(name), TrainingConfig(use_peft=True, peft_method="llama_adapter"))


@pytest.mark.parametrize(
    ("settings", "unscaled_length", "context"),
    [
        ({}, None, 100),
        ({"rope_scaling": None}, None, 100),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None, 100),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None, 100),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 100, 400),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None, 400),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}}, None, 100),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 25}}, 25, 100),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 20}, 20, 100),
        ({"rope_scaling": {"type": "longrope"}}, 100, 100),
    ],
    ids=str,
)
def test_what_a_config_says_of_its_rope(settings, unscaled_length, context):
    rope = Rope.of({"max_position_embeddings": 100, **settings})
    assert (rope.unscaled_length, rope.context) == (unscaled_length, context)


def test_the_kinds_of_rope_are_those_of_transformers_that_turn_whole_heads():
    assert {*ROPE_KINDS} - {"default"} == {*ROPE_INIT_FUNCTIONS} - {"proportional"}
