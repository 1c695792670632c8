"""An adapter and a checkpoint are used over the base model that they were trained over, and over no other one."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_runs import call_main, readme_flags
from helpers.environment import ROOT
from helpers.records import alpaca_template
from safetensors.torch import load_file, save_file

import api_stream
import generate
import llama_finetuning
from configs.errors import UserError
from ft_datasets.tokenizer import Tokenizer
from utils.model import digests
from utils.model.folder import ModelFolder
from utils.results.adapter_folder import template_of
from utils.results.consolidating import consolidate
from utils.results.merging import merge
from utils.runs.base_model import BaseIdentity
from utils.runs.checkpoint import read_checkpoint
from utils.runs.description import read_training_config, write_training_config

_spec = importlib.util.spec_from_file_location(
    "merge_lora_weights", ROOT / "inference" / "hf-text-generation-inference" / "merge_lora_weights.py"
)
merge_lora_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(merge_lora_weights)

EMBEDDING = "model.embed_tokens.weight"
BY_EARLIER_VERSION = "was written by an earlier version"


def complaint(main, *argv: object) -> str:
    """What a script says when it refuses to go on."""
    with pytest.raises(UserError) as caught:
        call_main(main, *argv)
    return str(caught.value)


def changed(model: Path, folder: Path, how: str) -> Path:
    """A base model with the same tokenizer and other weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    if how == "another fine-tune":
        tensors = {name: tensor + 1e-5 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    elif how == "every row but the first":
        tensors = {name: torch.cat((tensor[:1], torch.randn_like(tensor[1:]))) for name, tensor in tensors.items()}
    elif how == "two rows swapped":
        tensors[EMBEDDING][[1, 2]] = tensors[EMBEDDING][[2, 1]]
    elif how == "40 added tokens":
        for name in (EMBEDDING, "lm_head.weight"):
            tensors[name] = torch.cat((tensors[name], torch.randn(40, 64)))
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 640}
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("another fine-tune", ["21 of 21 tensors differ: "]),
        ("every row but the first", ["21 of 21 tensors differ: "]),
        ("two rows swapped", [f"1 of 21 tensors differ: {EMBEDDING}."]),
        ("40 added tokens", ["2 of 21 tensors differ: ", f"{EMBEDDING} (600 -> 640 tokens)"]),
    ],
)
def test_every_command_names_the_tensors_that_differ(tiny_model, finished, data_file, tmp_path, how, words):
    base, (adapter, _run) = changed(tiny_model, tmp_path / "base", how), finished
    folders = ("--base_model", base, "--lora_weights", adapter)
    for main, *argv in [
        (generate.main, "--prompt", "a", *folders),
        (api_stream.main, "--port", 0, *folders),
        (merge_lora_weights.main, *folders[:2], "--peft_model", adapter, "--output_dir", tmp_path / "merged"),
    ]:
        message = complaint(main, *argv)
        assert all(word in message for word in ["another base model", f"trained over {tiny_model}", *words]), message
    assert not (tmp_path / "merged").exists()

    output = shutil.copytree(adapter, tmp_path / "output")
    before = (output / "training_config.json").read_bytes()
    message = complaint(llama_finetuning.main, *readme_flags(base, data_file, output))
    assert all(word in message for word in ["base_model: rows64:", *words, "--resume none"]), message
    assert (output / "training_config.json").read_bytes() == before


def test_a_run_leaves_digests_and_hashes_of_its_base(tiny_model, finished):
    base, described = ModelFolder(tiny_model), read_training_config(finished[0])
    assert described["base_model_fingerprint"] == base.fingerprint()
    assert described["base_model_digests"] == base.digests
    assert described["base_model_sha256"] == base.sha256() != {}


def describe_base(folder: Path, identity: BaseIdentity) -> None:
    write_training_config(folder, read_training_config(folder) | identity.to_dict())


def test_merging_sees_what_rows_can_not_tell(tiny_model, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)  # so that the embedding counts as a large tensor
    adapter, own = shutil.copytree(finished[0], tmp_path / "adapter"), ModelFolder(tiny_model)
    describe_base(adapter, BaseIdentity(own.fingerprint(), own.digests, own.sha256()))
    other = ModelFolder(changed(tiny_model, tmp_path / "base", "two rows swapped"))
    before = sorted(tmp_path.iterdir())
    assert template_of(adapter, other, Tokenizer(other.path)) == alpaca_template(other.path)
    with pytest.raises(UserError, match=f"another base model.*{tiny_model}.* 1 of 21 tensors differ: {EMBEDDING}"):
        merge(other, adapter, tmp_path / "merged", alpaca_template(other.path), 4.0)
    assert sorted(tmp_path.iterdir()) == before
    merge(own, adapter, tmp_path / "merged", alpaca_template(own.path), 4.0)


def test_a_run_goes_on_over_its_own_base_only_and_remembers_it(tiny_model, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    output = tmp_path / "run"
    flags = ["--alpaca_dataset.data_path", data_file, "--output_dir", output, "--use_peft", "--save_steps", 1]
    call_main(llama_finetuning.main, *flags, "--model_name", tiny_model, "--max_steps", 1)
    known = read_training_config(output)["base_model_sha256"]
    other = changed(tiny_model, tmp_path / "base", "two rows swapped")
    longer = [*flags, "--model_name", other, "--max_steps", 2]
    assert f"1 of 21 tensors differ: {EMBEDDING}" in complaint(llama_finetuning.main, *longer)
    assert read_training_config(output)["base_model_sha256"] == known
    call_main(llama_finetuning.main, *longer, "--accept_changes")
    assert read_training_config(output)["base_model_sha256"] == ModelFolder(other).sha256() != known


def test_files_that_hold_rotary_frequencies_too_are_the_same_base(tiny_model, finished, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    tensors = load_file(folder / "model.safetensors") | frequencies
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = ModelFolder(folder)
    assert template_of(finished[0], base, Tokenizer(folder)) == alpaca_template(folder)
    merge(base, finished[0], tmp_path / "merged", alpaca_template(base.path), 4.0)


def test_an_adapter_of_an_earlier_version_is_compared_by_first_rows_and_says_so(tiny_model, finished, tmp_path, capsys):
    adapter, own = shutil.copytree(finished[0], tmp_path / "adapter"), ModelFolder(tiny_model)
    describe_base(adapter, BaseIdentity(own.first_row_fingerprint()))
    same_first_rows = ModelFolder(changed(tiny_model, tmp_path / "same first rows", "every row but the first"))
    for base in (own, same_first_rows):
        assert template_of(adapter, base, Tokenizer(base.path)) == alpaca_template(base.path)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(adapter) in line and BY_EARLIER_VERSION in line
        merge(base, adapter, tmp_path / "merged" / base.path.name, alpaca_template(base.path), 4.0)
    other = ModelFolder(changed(tiny_model, tmp_path / "other", "another fine-tune"))
    with pytest.raises(UserError, match="another base model"):
        template_of(adapter, other, Tokenizer(other.path))


def test_a_converter_takes_frozen_layers_from_the_runs_own_base_only(tiny_model, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    output = tmp_path / "run"
    flags = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output]
    call_main(llama_finetuning.main, *flags, "--freeze_layers", "--max_steps", 1, "--save_model", False)
    checkpoint = read_checkpoint(output / "checkpoints" / "step-1")
    other = ModelFolder(changed(tiny_model, tmp_path / "base", "two rows swapped"))
    assert other.fingerprint() == ModelFolder(tiny_model).fingerprint()
    with pytest.raises(UserError, match=f"another base model.*{tiny_model}.* 1 of 10 tensors differ: {EMBEDDING}"):
        consolidate(checkpoint, other, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    fine_tuned = ModelFolder(changed(tiny_model, tmp_path / "fine-tuned", "another fine-tune"))
    with pytest.raises(UserError, match=f"another base model.*{tiny_model}.* 21 of 21 tensors differ"):
        consolidate(checkpoint, fine_tuned, tmp_path / "converted")
    consolidate(checkpoint, ModelFolder(tiny_model), tmp_path / "converted")
    described = read_training_config(tmp_path / "converted")
    assert described["base_model_sha256"] == ModelFolder(tiny_model).sha256()


def test_a_moved_run_still_names_tensors(tiny_model, finished, data_file, tmp_path):
    """The run's account of its base is found above the checkpoint that --resume names."""
    moved = shutil.copytree(finished[0], tmp_path / "moved")
    base = changed(tiny_model, tmp_path / "base", "40 added tokens")
    newest = max((moved / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    flags = [*readme_flags(base, data_file, tmp_path / "elsewhere"), "--resume", newest]
    assert "(600 -> 640 tokens)" in complaint(llama_finetuning.main, *flags)
