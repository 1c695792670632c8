"""Every family of models against transformers: settings as real models have them, small and random."""

import pytest
import torch
from helpers.references import (
    examples_that_begin_alike,
    generated_by_engine,
    generated_by_transformers,
    transformers_model,
)
from helpers.tiny_models import make_model
from test_fused_layers import adapted_model, check_equal

from inference.loading import load_engine
from utils.model.decoder import forward_hidden, logits
from utils.model.families import FAMILIES
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.rows.packing import pack

CPU = torch.device("cpu")


def rope(theta: float, **settings) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **settings}}


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SOME_LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
REAL = {
    "Llama 2": {"family": "llama", "rms_norm_eps": 1e-5, "kv_heads": 4},
    "Llama 3.2": {
        "family": "llama",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **rope(5e5, factor=32.0, original_max_position_embeddings=16, **LLAMA3),
    },
    "SmolLM2": {"family": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "kv_heads": 1, **rope(1e5)},
    "Yi": {"family": "llama", "rms_norm_eps": 1e-5, **rope(5e6)},
    "Llama with biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "Mistral 7B": {"family": "mistral", "rms_norm_eps": 1e-5, "sliding_window": 8, **rope(1e4)},
    "Mistral Nemo": {"family": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 8, **rope(1e6)},
    "Ministral 8B": {"family": "ministral", "sliding_window": 8, "layer_types": SOME_LAYERS, **rope(1e8)},
    "Qwen 2.5": {"family": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "kv_heads": 1, **rope(1e6)},
    "Qwen 2.5, long": {"family": "qwen2", **rope(1e6, rope_type="yarn", factor=4.0)},
    "Qwen 3": {"family": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 32, **rope(1e6)},
    "SmolLM3": {"family": "smollm3", "tie_word_embeddings": True, "no_rope_layer_interval": 2, **rope(5e6)},
    "Hunyuan": {
        "family": "hunyuan_v1_dense",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        "positions": 16,  # beyond them a plain dynamic kind would change its angles
        **rope(1e4, rope_type="dynamic", alpha=1000.0, factor=1.0),
    },
    "ERNIE 4.5": {"family": "ernie4_5", "tie_word_embeddings": True, "use_bias": False, "head_dim": 32, **rope(5e5)},
}
"""What config.json says, but for sizes."""


@pytest.fixture(scope="module", params=REAL)
def folder(request, tmp_path_factory):
    settings = {"kv_heads": 2, "layers": 4, "random_vectors": True, **REAL[request.param]}
    return make_model(tmp_path_factory.mktemp("model") / "model", seed=5, **settings)


def test_every_family_is_held():
    assert {settings["family"] for settings in REAL.values()} == {*FAMILIES}


def test_a_packed_rows_logits_and_a_steps_gradients(folder):
    """Of examples that share their beginning; each stands alone before transformers' model."""
    model, reference = load_base_model(ModelFolder(folder), torch.float32, [CPU]), transformers_model(folder).train()
    model.requires_grad_(True).train()
    batch = pack(examples_that_begin_alike(), CPU)
    hidden = forward_hidden(model, batch.input_ids, batch.position_ids, batch.segments)
    rows = logits(model, hidden[batch.label_rows])
    torch.nn.functional.cross_entropy(rows, batch.label_ids).backward()
    expected = []
    for example in examples_that_begin_alike():
        ids = torch.tensor(example.input_ids.tolist())
        expected.append(reference(ids[None]).logits[0, example.first_learnt - 1 : -1])
    torch.testing.assert_close(rows, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.nn.functional.cross_entropy(torch.cat(expected), batch.label_ids).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert theirs[name].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_an_answer_is_that_of_transformers_generate(folder):
    engine, prompt_ids = load_engine(str(folder), "", None), examples_that_begin_alike()[0].input_ids.tolist()[:-1]
    expected = generated_by_transformers(transformers_model(folder), prompt_ids, 12)
    assert generated_by_engine(engine, prompt_ids, 12) == expected


def test_the_fast_layers_where_there_are_some(folder):
    if FAMILIES[ModelFolder(folder).config["model_type"]].has_fast_layers:
        check_equal(adapted_model(folder, ["all-linear"]))
