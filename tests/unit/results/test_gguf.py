import importlib
import json
import shutil
import signal
import weakref

import gguf
import numpy as np
import pytest
import torch
from helpers.disk import DiskRecord
from helpers.llama_cpp import write_byte_level_tokenizer
from helpers.tiny_models import TEXTS, make_model
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from configs.errors import UserError
from utils.model.folder import ModelFolder
from utils.results import gguf as writing
from utils.results.gguf import GgufFile
from utils.results.gguf_vocabulary import PRE_TOKENIZERS, read_vocabulary

pytestmark = pytest.mark.usefixtures("english")


@pytest.fixture
def base(grouped_model, tmp_path):
    """A copy of a Llama with biases and a tied head, in bf16: 4 heads of 16 for queries, 2 for keys."""
    return shutil.copytree(grouped_model, tmp_path / "base")


def settings(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def write(folder, output, kind="f32"):
    GgufFile(ModelFolder(folder), kind).write(output)
    reader = gguf.GGUFReader(output / "model.gguf")
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


def values(tensor):
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_the_weights_are_there_with_rotated_pairs_side_by_side(base, tmp_path):
    fields, tensors = write(base, tmp_path / "out")
    original = {name: tensor.float().numpy() for name, tensor in load_file(base / "model.safetensors").items()}
    assert len(tensors) == len(original) and "output.weight" not in tensors
    assert np.array_equal(values(tensors["token_embd.weight"]), original["model.embed_tokens.weight"])
    assert np.array_equal(values(tensors["blk.1.ffn_down.weight"]), original["model.layers.1.mlp.down_proj.weight"])
    for kind in ("weight", "bias"):
        for short, heads in (("q", 4), ("k", 2)):
            found = values(tensors[f"blk.0.attn_{short}.{kind}"])
            expected = original[f"model.layers.0.self_attn.{short}_proj.{kind}"]
            for head in range(heads):
                for number in range(8):
                    row = 16 * head + 2 * number
                    assert np.array_equal(found[row], expected[16 * head + number])
                    assert np.array_equal(found[row + 1], expected[16 * head + 8 + number])
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.dimension_count"] == 16
    assert fields["llama.context_length"] == 512 and fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.ggml.add_space_prefix"]


@pytest.mark.parametrize("kind, bits", [("q8_0", 8), ("q5_0", 5), ("q5_1", 5), ("q4_0", 4), ("q4_1", 4)])
def test_quantised_weights_are_within_their_rounding(base, tmp_path, kind, bits):
    fields, tensors = write(base, tmp_path / "out", kind)
    name, original_name = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    original = load_file(base / "model.safetensors")[original_name].float().numpy().reshape(-1, 32)
    found = values(tensors[name]).reshape(-1, 32)
    largest = np.abs(original).max(axis=1, keepdims=True)
    step = 2 * largest / (2**bits - 1)  # at most: a block may lie between two numbers
    assert (np.abs(found - original) <= step * 1.01).all() and not np.array_equal(found, original)
    assert tensors[name].tensor_type.name == kind.upper()
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision(base, tmp_path, kind):
    _fields, tensors = write(base, tmp_path / "out", kind)
    original = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = original.float() if kind == "bf16" else original.half().float()
    assert np.array_equal(values(tensors["blk.0.ffn_up.weight"]), expected.numpy())


def test_every_end_of_an_answer_has_its_place(base, tmp_path):
    (base / "generation_config.json").write_text('{"eos_token_id": [300, 2, 301]}')
    settings(base, pad_token_id=-1)  # as Llama 1 has it
    fields, _tensors = write(base, tmp_path / "out")
    ends = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [2, 300, 301]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        f'PARAMETER stop "{fields["tokenizer.ggml.tokens"][end]}"' for end in ends
    ]
    (base / "generation_config.json").write_text('{"eos_token_id": [300, 2, 301, 302]}')
    with pytest.raises(UserError, match="so many ends"):
        GgufFile(ModelFolder(base), "f32")


@pytest.mark.parametrize("template, adds", [("{{ bos_token }}a", True), ("a{{ messages }}", False), (None, True)])
def test_bos_is_added_where_a_chat_begins_with_it(base, tmp_path, template, adds):
    tokens = {"bos_token": {"content": "<s>"}, "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    fields, _tensors = write(base, tmp_path / "out")
    assert fields["tokenizer.ggml.add_bos_token"] is adds
    assert fields.get("tokenizer.chat_template") == template


def test_attention_that_reaches_back_less_far_limits_the_context(tmp_path):
    folder = make_model(tmp_path / "mistral", family="mistral", sliding_window=96)
    fields, _tensors = write(folder, tmp_path / "out")
    assert fields["llama.context_length"] == 96
    (note, _no_template) = GgufFile(ModelFolder(folder), "f32").notes
    assert "last 96 tokens" in note


def test_one_tensor_at_a_time_is_in_memory(base, tmp_path, monkeypatch):
    file = GgufFile(ModelFolder(base), "q8_0")
    seen = []

    def tensors():
        for name, tensor in ModelFolder(base).tensors():
            assert all(reference() is None for reference in seen[:-1])  # the last one's name is still bound
            seen.append(weakref.ref(tensor))
            yield name, tensor

    monkeypatch.setattr(file.folder, "tensors", tensors)
    file.write(tmp_path / "out")
    assert len(seen) > 20


def test_a_file_appears_whole_or_not_at_all(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors")
    output = tmp_path / "out"
    output.mkdir()
    (output / "other").write_text("stays")
    with pytest.raises(UserError, match=r"up_proj.weight .* too large.*bf16"):
        write(base, output, "f16")
    assert [file.name for file in output.iterdir()] == ["other"]
    write(base, output, "bf16")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert before.keys() == {"other", "model.gguf", "Modelfile"}
    with pytest.raises(UserError, match=r"model\.gguf is there already"):
        write(base, output, "bf16")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


@pytest.mark.parametrize("place", ["taken", "taken/out"])
def test_a_place_that_is_no_folder_is_refused(base, tmp_path, place):
    (tmp_path / "taken").write_text("stays")
    with pytest.raises(UserError, match=r"taken.* can't be written"):
        write(base, tmp_path / place)
    assert (tmp_path / "taken").read_text() == "stays"


def test_a_disk_that_is_full_leaves_nothing(base, tmp_path):
    """The limit of a file's size ends NumPy's writing within a weight, as a full disk does."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written \(\d+ requested and \d+ written\)"):
            write(base, tmp_path / "out", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_whole_file_is_on_the_disk_before_it_gets_its_name(base, tmp_path, monkeypatch):
    disk = DiskRecord(tmp_path, monkeypatch)
    file = GgufFile(ModelFolder(base), "f32")
    file.write(tmp_path / "out")
    moves = ["rename out/Modelfile.tmp -> out/Modelfile", "rename out/model.gguf.unfinished -> out/model.gguf"]
    assert [event for event in disk.events if event.startswith("rename")] == moves
    assert disk.flushed["out/model.gguf.unfinished"] == (tmp_path / "out" / "model.gguf").read_bytes()
    assert disk.flushed["out/Modelfile.tmp"] == (tmp_path / "out" / "Modelfile").read_bytes()
    assert file.size <= (tmp_path / "out" / "model.gguf").stat().st_size < file.size + 100_000


def test_a_small_disk_is_seen_before_anything_is_written(base, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "free_space", lambda folder: 1000)
    with pytest.raises(UserError, match="GB are needed"):
        write(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"hidden_act": "gelu"}, "llama, gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16,
                                 "original_max_position_embeddings": 64}},
            "rope_type yarn beta_fast",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused_by_name(base, changes, what):
    settings(base, **changes)
    with pytest.raises(UserError, match=f"llama.cpp has no {what}"):
        GgufFile(ModelFolder(base), "f32")


def test_llama_3_rotations_in_another_family_are_refused(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
    folder = make_model(tmp_path / "qwen", family="qwen2", rope_parameters=rope)
    with pytest.raises(UserError, match="rope_type llama3, qwen2"):
        GgufFile(ModelFolder(folder), "f32")


def _unigram(model):
    model.trainer_spec.model_type = 1


def _without_bytes(model):
    model.trainer_spec.byte_fallback = False


def _removing_spaces(model):
    model.normalizer_spec.remove_extra_whitespaces = True


def _user_defined(model):
    model.pieces[400].type = 4


@pytest.mark.parametrize(
    "change, why",
    [
        (_unigram, "does not merge byte pairs"),
        (_without_bytes, "no bytes for unknown characters"),
        (_removing_spaces, "removes spaces"),
        (_user_defined, "a space behind"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_reads_otherwise_is_refused(base, change, why):
    file = base / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f"other tokens .*: .*{why}"):
        read_vocabulary(base)


def test_added_special_tokens_and_rows_without_a_token(base, tmp_path):
    added = {"599": {"content": "<|im_start|>", "special": True}, "3": {"content": "plain", "special": False}}
    (base / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tensors = load_file(base / "model.safetensors")
    padded = torch.nn.functional.pad(tensors["model.embed_tokens.weight"], (0, 0, 0, 40))
    save_file(tensors | {"model.embed_tokens.weight": padded}, base / "model.safetensors")
    settings(base, vocab_size=640)
    fields, read = write(base, tmp_path / "out")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == 640
    assert read["token_embd.weight"].shape.tolist() == [64, 640]
    assert (tokens[599], types[599]) == ("<|im_start|>", 3) and (tokens[3], types[3]) == ("<0x00>", 6)
    assert (tokens[600], tokens[639]) == ("[PAD600]", "[PAD639]") and set(types[600:]) == {5}


def test_a_byte_level_tokenizer_is_known_by_how_it_splits(tmp_path):
    assert any(("Split", PRETOKENIZE_REGEX) in steps and name == "qwen2" for (steps, _), name in PRE_TOKENIZERS.items())
    write_byte_level_tokenizer(tmp_path, "qwen2", TEXTS, vocab_size=400)
    vocabulary = read_vocabulary(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (vocabulary.kind, vocabulary.splitting, vocabulary.adds_space) == ("gpt2", "qwen2", False)
    assert vocabulary.tokens == sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    assert vocabulary.types == [3] * 3 + [1] * 397
    assert vocabulary.merges == [" ".join(pair) for pair in content["model"]["merges"]]
    for path, value, why in (
        (
            ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"),
            r"\p{L}+",
            r"Split \+ ByteLevel\); known are llama",
        ),
        (("pre_tokenizer",), {"type": "Metaspace"}, "Metaspace"),
        (("normalizer",), {"type": "Lowercase"}, "Lowercase"),
        (("model", "byte_fallback"), True, "BPE"),
        (("model", "ignore_merges"), True, "BPE"),
        (("added_tokens", 0, "rstrip"), True, r"spaces beside <\|endoftext\|>"),
    ):
        changed = json.loads(json.dumps(content))
        place = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=why):
            read_vocabulary(tmp_path)


def test_the_command_converts_a_model_as_it_is(base, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    command = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights").main
    output = tmp_path / "out"
    with pytest.raises(UserError, match="nothing to merge; --format gguf"):
        command(base_model=base, peft_model="", output_dir=output)
    with pytest.raises(UserError, match="only what is merged is rounded"):
        command(base_model=base, peft_model="", output_dir=output, format="gguf", quantization="8bit")
    assert not output.exists()
    command(base_model=base, peft_model="", output_dir=output, format="gguf", gguf_type="q8_0")
    assert {file.name for file in output.iterdir()} == {"model.gguf", "Modelfile"}
    assert f"ollama create my-model -f {output}/Modelfile" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_before_a_merge_everything_is_known(base, tmp_path, monkeypatch):
    """Neither a model that can't become a GGUF file nor a disk too small for both is found out after the merge."""
    command = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights").main
    room = GgufFile(ModelFolder(base), "f16").size + ModelFolder(base).parameter_bytes
    arguments = {"base_model": base, "peft_model": tmp_path / "none", "output_dir": tmp_path / "out", "format": "gguf"}
    for free, complaint in ((room - 1, "GB are needed"), (room, "none")):
        monkeypatch.setattr(writing, "free_space", lambda folder, free=free: free)
        with pytest.raises(UserError, match=complaint):
            command(**arguments)
    settings(base, hidden_act="gelu")
    with pytest.raises(UserError, match="llama, gelu"):
        command(**arguments)
    assert not (tmp_path / "out").exists()
