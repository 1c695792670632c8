"""What tells one base model from another: planted differences are found and named, the same weights never refused."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.model import digests
from utils.model.digests import in_background, sampled_digest, whole_digest
from utils.model.folder import ModelFolder
from utils.runs.base_model import BaseIdentity, differences

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
SAMPLED = {i * 599 // 63 for i in range(64)}
"""Rows of the embedding, which has 600, that are looked at where it is too large to be hashed whole."""


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that may be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def only_rows(monkeypatch) -> None:
    """Tensors are sampled as large ones are."""
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)


def change(folder: Path, changed: dict[str, torch.Tensor]) -> ModelFolder:
    """The model with other tensors."""
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return ModelFolder(folder)


def told(before: Path, now: ModelFolder) -> str:
    """What is said of the tensors that differ; '' where the one counts as the other."""
    base = ModelFolder(before)
    known = BaseIdentity(base.fingerprint(), base.digests)
    found = differences(known.digests, now.digests)
    assert known.is_of(now) == (not found)
    return found


def raw_bytes(file: Path) -> dict[str, bytes]:
    """The tensors' bytes, read by the format's own description."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: data[8 + length :][slice(*entry["data_offsets"])] for name, entry in header.items()}


def test_whole_hashes_are_those_of_the_files_bytes(tiny_model):
    expected = {
        name: hashlib.sha256(data).hexdigest() for name, data in raw_bytes(tiny_model / "model.safetensors").items()
    }
    assert in_background(ModelFolder(tiny_model).sha256).result(30) == ModelFolder(tiny_model).sha256() == expected


def test_what_goes_wrong_in_the_background_is_raised_where_the_result_is_asked_for():
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        in_background(fail).result(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (5000,), (63, 5), (64, 5), (65, 5), (600, 40), (600, 2, 20)])
def test_a_digest_is_over_64_rows_from_the_first_to_the_last(only_rows, shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    rows = tensor
    if tensor.nbytes > 1000 and len(tensor) > 64:
        rows = torch.stack([tensor[i * (len(tensor) - 1) // 63] for i in range(64)])
    content = rows.reshape(-1).view(torch.uint8).numpy().tobytes()
    words = sampled_digest(tensor).rsplit(" ", 1)
    assert words[1] == hashlib.sha256(content).hexdigest()
    assert words[0] == f"{str(dtype)[6:]} {'x'.join(map(str, shape))}"
    transposed = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    assert whole_digest(transposed) == whole_digest(tensor)  # however it lies in memory


def test_another_fine_tune_differs_in_every_tensor(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    noisy = {name: tensor + 1e-5 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    assert f"{len(tensors)} of {len(tensors)} tensors differ: " in told(tiny_model, change(folder, noisy))


def test_one_layer_of_another_model_is_named(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    other = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    found = told(tiny_model, change(folder, other))
    assert found.startswith(f"9 of {len(tensors)} tensors differ: model.layers.1.")
    assert "model.layers.0" not in found and found.count("model.layers.1.") == 4 and found.endswith(" and 5 more.")


@pytest.mark.parametrize("name", [UP, EMBEDDING])
@pytest.mark.parametrize("how", ["every row but the first", "swapped rows", "the last row", "first bit"])
@pytest.mark.parametrize("large", [False, True])
def test_changed_rows_are_seen(folder, tiny_model, monkeypatch, name, how, large):
    if large:
        monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    tensor = load_file(folder / "model.safetensors")[name]
    if how == "every row but the first":
        tensor[1:] = torch.randn_like(tensor[1:])
    elif how == "swapped rows":
        tensor[[0, len(tensor) - 1]] = tensor[[len(tensor) - 1, 0]]
    elif how == "the last row":
        tensor[-1, -1] += 1
    else:
        tensor.view(torch.int32)[0, 0] ^= 1
    assert told(tiny_model, change(folder, {name: tensor})) == f"1 of 21 tensors differ: {name}."


def test_a_small_tensor_is_looked_at_whole(folder, tiny_model):
    tensor = load_file(folder / "model.safetensors")[EMBEDDING]
    tensor[[1, 2]] = tensor[[2, 1]]
    assert not {1, 2} & SAMPLED
    assert EMBEDDING in told(tiny_model, change(folder, {EMBEDDING: tensor}))


def test_added_tokens_are_told_as_such(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    larger = {name: torch.cat((tensors[name], torch.zeros(40, 64))) for name in (EMBEDDING, "lm_head.weight")}
    found = told(tiny_model, change(folder, larger))
    assert found.startswith("2 of 21 tensors differ: ")
    assert f"{EMBEDDING} (600 -> 640 tokens)" in found and "lm_head.weight (600 -> 640 tokens)" in found


def test_another_dtype_shape_or_set_of_tensors_is_told(folder, tiny_model):
    tensors = load_file(folder / "model.safetensors")
    norm, down = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    other = {norm: tensors[norm].half(), down: tensors[down].t(), "model.layers.0.extra": torch.ones(3)}
    found = told(tiny_model, change(folder, other))
    for words in (f"{norm} (float32 64 -> float16 64)", f"{down} (float32 64x128 -> float32 128x64)", "extra (new)"):
        assert words in found
    flat = {EMBEDDING: "float32 600x64 1"}, {EMBEDDING: "float32 38400 1"}
    assert differences(*flat).endswith(f"{EMBEDDING} (float32 600x64 -> float32 38400).")
    assert "extra (missing)" in differences(ModelFolder(folder).digests, ModelFolder(tiny_model).digests)


@pytest.mark.parametrize("how", ["sharded", "pickled", "other order", "with rotary frequencies"])
def test_the_same_weights_in_other_files_are_the_same_model(folder, tiny_model, only_rows, how):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    if how == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "sharded":
        files = {name: f"model-{1 + number % 3:05}-of-00003.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        if how == "with rotary frequencies":  # files of earlier years hold them
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file({name: tensors[name] for name in sorted(tensors, reverse=True)}, folder / "model.safetensors")
    now = ModelFolder(folder)
    assert told(tiny_model, now) == ""
    assert now.fingerprint() == ModelFolder(tiny_model).fingerprint()
    assert now.sha256() == ModelFolder(tiny_model).sha256()


def test_a_tied_heads_second_copy_does_not_count(grouped_model, tmp_path):
    folder = shutil.copytree(grouped_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    with_copy = change(folder, {"lm_head.weight": tensors[EMBEDDING].clone()})
    assert told(grouped_model, with_copy) == "" and with_copy.sha256().keys() == tensors.keys()


def test_of_a_large_tensor_64_rows_are_hashed_and_not_the_rest(folder, only_rows, monkeypatch):
    hashed = []
    original = digests.whole_digest
    monkeypatch.setattr(digests, "whole_digest", lambda tensor: hashed.append(tuple(tensor.shape)) or original(tensor))
    assert ModelFolder(folder).digests
    assert len(hashed) == 21 and max(shape[0] for shape in hashed if len(shape) == 2) == 64
