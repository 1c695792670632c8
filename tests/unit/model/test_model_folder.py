"""A model folder: what is read from it, and what is said of one that can't be used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from utils.model.folder import ModelFolder


def complaint(path) -> str:
    """What is said about a folder that can't be used."""
    with pytest.raises(UserError) as caught:
        ModelFolder(path)
    return str(caught.value)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that may be broken."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def sharded(folder):
    """The same model in three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors, reverse=True), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        weight_map |= dict.fromkeys(names[number::3], file)
        save_file({name: tensors[name] for name in names[number::3]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_holds_the_weights(folder, tiny_model):
    expected, found = load_file(tiny_model / "model.safetensors"), dict(ModelFolder(folder).tensors())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert ModelFolder(folder).fingerprint() == ModelFolder(tiny_model).fingerprint()


def test_one_file(folder, tiny_model):
    assert_holds_the_weights(folder, tiny_model)
    assert ModelFolder(folder).parameter_bytes == (folder / "model.safetensors").stat().st_size


def test_shards(sharded, tiny_model):
    assert_holds_the_weights(sharded, tiny_model)


def test_pickled_weights(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_holds_the_weights(folder, tiny_model)


def test_another_model_of_the_same_shape_has_another_fingerprint(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ModelFolder(folder).fingerprint() != ModelFolder(tiny_model).fingerprint()


@pytest.mark.parametrize(
    ("path", "repo_id"),
    [
        ("./models/SomeOne/Some-7b", "SomeOne/Some-7b"),
        ("models/SomeOne/Some-7b/", "SomeOne/Some-7b"),
        ("elsewhere", "NousResearch/Llama-2-7b-hf"),
    ],
)
def test_a_missing_folder_names_the_command_that_brings_it(path, repo_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = complaint(path)
    assert f"python model_download.py --repo_id {repo_id}" in message.split("\n")[1]
    assert str(tmp_path) in message


def test_folders_that_hold_something_else(tmp_path):
    assert "is not a model folder: it has no config.json" in complaint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a base model" in complaint(tmp_path)


@pytest.mark.parametrize("content", ["", '{"model_type": "llama"', "[]", '"llama"'])
def test_a_broken_configuration(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in complaint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["type gpt2", "llama, mistral"]),
        ({"model_type": None}, ["type None"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized already", "--quantization", "--load_8bit"]),
    ],
)
def test_models_of_a_kind_that_can_not_be_used(folder, change, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert all(word in complaint(folder) for word in words)


def cut(file, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    message = complaint(folder)
    assert "model.safetensors missing" in message
    assert f"model_download.py --repo_id … --local_dir {folder}" in message


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = complaint(sharded)
    assert "model-00002-of-00003.safetensors missing" in message
    assert "model-00001" not in message


def test_a_shard_that_is_cut_short_is_named(sharded):
    shard = sharded / "model-00003-of-00003.safetensors"
    cut(shard, shard.stat().st_size - 1)
    message = complaint(sharded)
    assert "model-00003-of-00003.safetensors missing or cut short" in message
    assert "model-00001" not in message


@pytest.mark.parametrize("size", [0, 5, 100, 50_000, -1])
def test_one_file_that_is_cut_short(folder, size):
    cut(folder / "model.safetensors", size)
    assert "model.safetensors missing or cut short" in complaint(folder)


def test_a_file_longer_than_it_says_is_no_download(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"<html>")
    assert "model.safetensors missing or cut short" in complaint(folder)


@pytest.mark.parametrize("size", [0, 100, 50_000, -1])
def test_pickled_weights_that_are_cut_short(folder, size):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin", size)
    assert "pytorch_model.bin missing or cut short" in complaint(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json missing or cut short" in complaint(sharded)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model):
    folder = ModelFolder(tiny_model)
    folder.check_vocabulary(600)
    with pytest.raises(UserError, match="601 tokens, the model 600"):
        folder.check_vocabulary(601)


def test_to_freeze_all_layers_is_refused(tiny_model):
    folder = ModelFolder(tiny_model)
    folder.check_frozen_layers(1)
    with pytest.raises(UserError, match="--num_freeze_layers 2: the model has 2 layers"):
        folder.check_frozen_layers(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        {"rope_scaling": {"rope_type": "yarn"}},  # its factor lacks
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        {"partial_rotary_factor": 0.5},
        {"layer_types": ["chunked_attention"]},
        {"rope_scaling": [1]},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"sliding_window": "8"},
        {"sliding_window": -3},
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_its_key_and_value(folder, settings):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    ((key, value),) = settings.items()
    assert f"{key}: {json.dumps(value)}" in complaint(folder)


@pytest.mark.parametrize(("kind", "scaled"), [("linear", False), ("dynamic", True)])
def test_which_lengths_a_texts_angles_depend_on(folder, kind, scaled):
    settings = {"max_position_embeddings": 300, "rope_scaling": {"type": kind, "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    assert not ModelFolder(folder).depends_on_length(300)
    assert ModelFolder(folder).depends_on_length(301) == scaled


def test_weights_that_were_pickled_as_parameters_are_plain_tensors(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    parameters = {name: torch.nn.Parameter(t) for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(parameters, folder / "pytorch_model.bin")
    assert not any(tensor.requires_grad for _name, tensor in ModelFolder(folder).tensors())
