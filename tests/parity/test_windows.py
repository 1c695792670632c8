"""Sliding windows, in sequences several windows long, against transformers' own models: all layers' or some layers'."""

import pytest
import torch
from helpers.references import (
    examples_that_begin_alike,
    generated_by_engine,
    generated_by_transformers,
    transformers_model,
)
from helpers.tiny_models import make_model
from helpers.trainers import make_trainer, project_logits

from configs.peft import LoraConfig
from inference.loading import load_engine
from utils.model.adapters import trainable_parameters
from utils.model.decoder import causal_lm, forward_hidden, logits
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers
from utils.model.weights import load_base_model
from utils.rows.packing import pack

CPU = torch.device("cpu")
WINDOW = 6
SOME_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "mistral": ({"family": "mistral", "sliding_window": WINDOW}, [True, True, True]),
    "qwen2": (
        {"family": "qwen2", "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        [False, False, True],
    ),
    "qwen2, not used": ({"family": "qwen2", "sliding_window": WINDOW, "max_window_layers": 0}, [False] * 3),
    "qwen3": (
        {"family": "qwen3", "sliding_window": WINDOW, "use_sliding_window": True, "layer_types": SOME_LAYERS},
        [True, False, True],
    ),
    "llama, which has none": ({"family": "llama", "sliding_window": WINDOW}, [False] * 3),
}
"""Settings of config.json, and which layers have a window by them."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    settings, _windows = KINDS[request.param]
    return make_model(tmp_path_factory.mktemp("model") / "model", layers=3, kv_heads=2, seed=4, **settings)


@pytest.fixture
def windows(request, folder) -> list[bool]:
    return KINDS[request.node.callspec.params["folder"]][1]


def test_logits_are_transformers_own_and_a_window_is_where_it_should_be(folder, windows):
    ids = examples_that_begin_alike()[0].input_ids.tolist()
    ours = load_base_model(ModelFolder(folder), torch.float32, [CPU])
    with torch.no_grad():
        expected = transformers_model(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(project_logits(ours, ids), expected, rtol=1e-4, atol=1e-4)
    # Far enough behind, the first token can't be noticed any more, unless a layer sees it.
    changed = project_logits(ours, [ids[0], 77, *ids[2:]])
    assert torch.equal(changed[2 + 3 * WINDOW :], project_logits(ours, ids)[2 + 3 * WINDOW :]) == all(windows)


def test_a_packed_rows_logits_and_gradients_are_those_of_each_example_alone(folder):
    """With a beginning that several share: positions count within the example."""
    model, reference = load_base_model(ModelFolder(folder), torch.float32, [CPU]), transformers_model(folder)
    for each in (model, reference):
        each.requires_grad_(True).zero_grad()
    batch = pack(examples_that_begin_alike(), CPU)
    assert batch.segments.contexts
    hidden = forward_hidden(model, batch.input_ids, batch.position_ids, batch.segments)
    rows = logits(model, hidden[batch.label_rows])
    loss = torch.nn.functional.cross_entropy(rows, batch.label_ids, reduction="sum")
    loss.backward()
    total = 0.0
    for example in examples_that_begin_alike():
        ids, start = torch.tensor(example.input_ids.tolist()), example.first_learnt
        scores = reference(ids[None]).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(scores, ids[start:], reduction="sum")
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_an_answer_several_windows_long_is_that_of_transformers_generate(folder):
    engine, model = load_engine(str(folder), "", None), transformers_model(folder)
    # (transformers' cache drops keys by a setting that its Llama does not read.)
    has_cache = model.config.model_type != "llama"
    for prompt_ids in (examples_that_begin_alike()[0].input_ids.tolist(), [1, 420]):  # longer than the window; shorter
        expected = generated_by_transformers(model, prompt_ids, 20, use_cache=has_cache)
        assert generated_by_engine(engine, prompt_ids, 20) == expected
    assert engine.context == 512  # the model's, not the window


def test_the_fast_layers_compute_them_too(folder, tmp_path, windows):
    trainer = make_trainer(folder, tmp_path, lora_config=LoraConfig(r=4, target_modules=["all-linear"]))
    model, found = trainer.model, []
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    batch = pack(examples_that_begin_alike(), CPU)
    fused = FusedLayers(model, torch.float32)
    fused.refresh()
    assert [fused.shapes[layer].window for layer in causal_lm(model).model.layers] == [
        WINDOW if has_one else None for has_one in windows
    ]
    upstream = torch.randn(len(batch.input_ids), 64, generator=torch.Generator().manual_seed(3))
    for run_layer in (None, fused):
        model.zero_grad()
        hidden = forward_hidden(model, batch.input_ids, batch.position_ids, batch.segments, run_layer=run_layer)
        (hidden * upstream).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in trainable_parameters(model).values())])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
