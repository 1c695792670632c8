"""The files of a result, written without ever holding all of it."""

import json
import shutil
import weakref

import pytest
import torch
from helpers.disk import DiskRecord
from helpers.trainers import make_trainer
from safetensors.torch import load_file, save_file

from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.model.folder import ModelFolder
from utils.results import model_files, saving
from utils.runs.base_model import BaseIdentity
from utils.runs.description import describe_run


def test_the_writer_of_weight_files_holds_one_file_at_a_time(tmp_path, monkeypatch):
    alive, most = set(), 0

    def tensors():
        nonlocal most
        for number in range(9):
            tensor = torch.full((10,), float(number))
            alive.add(number)
            most = max(most, len(alive))
            yield f"t{number}", tensor

    def save(shard, *arguments, **more):
        alive.difference_update(int(name[1:]) for name in shard)
        save_file(shard, *arguments, **more)

    monkeypatch.setattr(model_files, "save_file", save)
    assert model_files.write_shards(tensors(), tmp_path, shard_bytes=80) == 360
    assert most == 3  # two of 40 bytes, and the one that does not fit any more
    index = json.loads((tmp_path / model_files.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 5
    for number in range(9):
        assert load_file(tmp_path / index[f"t{number}"])[f"t{number}"].eq(number).all()


def test_a_model_is_saved_without_ever_being_whole_in_memory(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, use_peft=False)
    expected = dict(trainer.model.named_parameters())
    largest, alive, most = max(parameter.nbytes for parameter in expected.values()), weakref.WeakSet(), 0

    def tensors():
        nonlocal most
        for name, parameter in expected.items():
            tensor = parameter.detach().clone()
            alive.add(tensor)
            most = max(most, sum(other.nbytes for other in alive))
            yield name, tensor

    monkeypatch.setattr(saving, "SHARD_BYTES", largest)
    description = describe_run(trainer.config, Tokenizer(tiny_model), PromptTemplate(), BaseIdentity(""))
    saving.save_result(trainer.config, trainer.model, tensors(), description, "")
    assert most <= 2 * largest < sum(parameter.nbytes for parameter in expected.values()) / 2
    saved = dict(ModelFolder(tmp_path).tensors())
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in expected.items())


@pytest.mark.parametrize("use_peft", [True, False])
def test_what_says_that_a_result_is_whole_comes_after_it(tiny_model, tmp_path, monkeypatch, use_peft):
    """training_config.json: its `trained_steps` makes a run a finished one. A power cut must not leave it alone."""
    trainer = make_trainer(tiny_model, tmp_path, use_peft=use_peft)
    description = describe_run(trainer.config, Tokenizer(tiny_model), PromptTemplate(), BaseIdentity(""))
    disk = DiskRecord(tmp_path, monkeypatch)
    tensors = ((name, parameter.detach()) for name, parameter in trainer.parameters.items())
    saving.save_result(trainer.config, trainer.model, tensors, {**description, "trained_steps": 3}, "the card")
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    if not use_peft:
        expected = "README.md config.json generation_config.json model.safetensors".split()
        expected += "tokenizer.json tokenizer.model tokenizer_config.json".split()
    written_before = disk.events.index(next(event for event in disk.events if event.startswith("flush")))
    handing_over = [event for event in disk.events[written_before:] if event != "remove .saving"]
    of_each_file = [handing_over[start : start + 3] for start in range(0, len(handing_over), 3)]
    assert [*sorted(of_each_file[:-1]), of_each_file[-1]] == [
        [f"flush .saving/{name}", f"rename .saving/{name} -> {name}", "flush ."]
        for name in [*expected, "training_config.json"]
    ]
    for name in [*expected, "training_config.json"]:
        assert disk.flushed[f".saving/{name}"] == (tmp_path / name).read_bytes()
    assert not (tmp_path / ".saving").exists()


def test_a_saved_model_stops_at_every_end_that_its_base_names(tiny_model, tmp_path):
    base, saved = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "saved"
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9], "temperature": 0.6}')
    saved.mkdir()
    model_files.copy_tokenizer(base, saved, PromptTemplate())
    settings = json.loads((saved / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [2, 7, 9], "temperature": 0.6}
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))
    model_files.copy_tokenizer(base, saved, PromptTemplate())
    assert json.loads((saved / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
