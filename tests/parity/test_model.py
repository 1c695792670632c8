"""The project's loading and forward pass against transformers' own, on the same folder."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model
from helpers.trainers import project_logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import UserError
from ft_datasets.tokenizer import Tokenizer
from inference.cache import KeyValueCache
from utils.model.decoder import forward_hidden, logits
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.rows.segments import Segments

CPU = torch.device("cpu")
FOLDERS = pytest.mark.parametrize("folder_name", ["tiny_model", "grouped_model", "mistral_model", "qwen3_model"])
SEQUENCES = [
    [1, 300, 301, 302, 303, 2],
    [1, 420],
    [1, 555, 410, 333, 278, 599, 261, 480, 481, 482, 2],
]


def load(folder: Path, **more):
    return load_base_model(ModelFolder(folder), torch.float32, [CPU], **more)


def reference_logits(folder: Path, input_ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([input_ids])).logits[0]


@pytest.fixture
def folder(request, folder_name) -> Path:
    return request.getfixturevalue(folder_name)


@FOLDERS
def test_logits_are_transformers_own(folder):
    model = load(folder)
    for input_ids in [*SEQUENCES, Tokenizer(folder).encode("今天天气很好，我们一起去公园散步。 Hello!")]:
        expected = reference_logits(folder, input_ids)
        torch.testing.assert_close(project_logits(model, input_ids), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1


@FOLDERS
def test_weights_are_the_files_own(folder):
    model, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_whose_weights_wait_in_host_memory_get_their_input_where_it_is(grouped_model):
    """As under FSDP with CPU offload, which fetches them; the meta device stands for the card."""
    model = load(grouped_model).to("meta")
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(layer.input_layernorm.weight.shape[0])
    devices = []

    def run_layer(_layer, hidden, _place, **arguments):
        devices.extend([hidden.device.type, *(x.device.type for x in arguments["position_embeddings"])])
        return hidden

    tokens = torch.arange(5, device="meta")
    assert forward_hidden(model, tokens, tokens, run_layer=run_layer).device.type == "meta"
    assert set(devices) == {"meta"}


def test_layers_are_laid_over_the_devices_in_equal_shares(tmp_path):
    folder = make_model(tmp_path / "model", layers=5)
    # No second card is needed to see where the weights go: the meta device takes them as well.
    model = load_base_model(ModelFolder(folder), torch.float32, [CPU, torch.device("meta")])
    places = [{parameter.device.type for parameter in layer.parameters()} for layer in model.model.layers]
    assert places == [{"cpu"}, {"cpu"}, {"cpu"}, {"meta"}, {"meta"}]
    assert model.model.embed_tokens.weight.device.type == "cpu"
    assert model.model.norm.weight.device.type == model.lm_head.weight.device.type == "meta"


@FOLDERS
def test_packed_examples_come_out_as_each_one_alone(folder):
    model = load(folder)
    lengths = [len(ids) for ids in SEQUENCES]
    row = torch.tensor([token for ids in SEQUENCES for token in ids])
    positions = torch.tensor([position for length in lengths for position in range(length)])
    with torch.no_grad():
        packed = logits(model, forward_hidden(model, row, positions, Segments.of(lengths, CPU)))
    for input_ids, part in zip(SEQUENCES, packed.split(lengths), strict=True):
        torch.testing.assert_close(part, reference_logits(folder, input_ids), rtol=1e-4, atol=1e-4)


@FOLDERS
def test_token_by_token_through_the_cache_is_the_same_as_at_once(folder):
    model, input_ids = load(folder), torch.tensor(SEQUENCES[2])
    caches, outputs = [KeyValueCache(len(input_ids)) for _layer in model.model.layers], []
    with torch.no_grad():
        for piece in input_ids.split([4, 1, 1, 1, 1, 1, 1, 1]):
            first = caches[0].length
            positions = torch.arange(first, first + len(piece))
            outputs.append(logits(model, forward_hidden(model, piece, positions, pasts=caches)))
    torch.testing.assert_close(torch.cat(outputs), reference_logits(folder, SEQUENCES[2]), rtol=1e-4, atol=1e-4)


class PastOfMany:
    """What a serving engine has before a row: of each segment's sequence, its own keys and values."""

    def __init__(self, capacity: int, sequences: int) -> None:
        self.caches = [KeyValueCache(capacity) for _sequence in range(sequences)]

    def attend(self, query, key, value, segments, scale, window):
        pieces = zip(*(x.split(segments.lengths) for x in (query, key, value)), strict=True)
        outputs = [
            cache.attend(*piece, Segments.of([len(piece[0])], CPU), scale, window)
            for cache, piece in zip(self.caches, pieces, strict=True)
        ]
        return torch.cat(outputs)


@FOLDERS
def test_a_row_may_hold_the_next_tokens_of_many_sequences(folder):
    """Segments and a past at once: one sequence comes in two halves, the others' last token after all before it."""
    model, rows = load(folder), [torch.tensor(sequence) for sequence in SEQUENCES]
    pasts = [PastOfMany(max(map(len, rows)), len(rows)) for _layer in model.model.layers]
    found = [[] for _row in rows]
    for cuts in ([slice(3), slice(1), slice(10)], [slice(3, 6), slice(1, 2), slice(10, 11)]):
        row = torch.cat([ids[cut] for ids, cut in zip(rows, cuts, strict=True)])
        positions = torch.cat([torch.arange(len(ids))[cut] for ids, cut in zip(rows, cuts, strict=True)])
        lengths = [cut.stop - (cut.start or 0) for cut in cuts]
        with torch.no_grad():
            hidden = forward_hidden(model, row, positions, Segments.of(lengths, CPU), pasts)
        for outputs, piece in zip(found, logits(model, hidden).split(lengths), strict=True):
            outputs.append(piece)
    for sequence, outputs in zip(SEQUENCES, found, strict=True):
        torch.testing.assert_close(torch.cat(outputs), reference_logits(folder, sequence), rtol=1e-4, atol=1e-4)


def copy_without_weights(folder: Path, target: Path) -> PreTrainedModel:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return AutoModelForCausalLM.from_pretrained(folder)


@FOLDERS
@pytest.mark.parametrize("form", ["several safetensors", "one .bin", "several .bin"])
def test_every_form_of_weight_files_loads_the_same(folder, form, tmp_path):
    target = tmp_path / "model"
    reference = copy_without_weights(folder, target)
    if form == "several safetensors":
        reference.save_pretrained(target, max_shard_size="100KB")
        assert len(list(target.glob("*.safetensors"))) > 2
    elif form == "one .bin":
        torch.save(reference.state_dict(), target / "pytorch_model.bin")
    else:
        state, weight_map = reference.state_dict(), {}
        for number in range(2):
            part = dict(list(state.items())[number::2])
            torch.save(part, target / f"pytorch_model-{number}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
        index = str({"metadata": {}, "weight_map": weight_map}).replace("'", '"')
        (target / "pytorch_model.bin.index.json").write_text(index)
    ours, theirs = load(target).state_dict(), load(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_without_one_weight_is_refused_by_its_name(tiny_model, tmp_path):
    target = tmp_path / "model"
    state = copy_without_weights(tiny_model, target).state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, target / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(target)


def test_a_weight_of_another_shape_is_refused_by_its_name(tiny_model, tmp_path):
    target = tmp_path / "model"
    state = copy_without_weights(tiny_model, target).state_dict()
    state["model.norm.weight"] = torch.ones(65)
    torch.save(state, target / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(65,\)"):
        load(target)


@FOLDERS
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_model_is_transformers_own_over_rounded_weights(folder, quantization):
    from utils.model.quantization import rounded_weight

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for module in reference.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded_weight(module.weight.data, quantization)
    with torch.no_grad():
        expected = reference(torch.tensor([SEQUENCES[2]])).logits[0]
    ours = project_logits(load(folder, quantization=quantization), SEQUENCES[2])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours - reference_logits(folder, SEQUENCES[2])).abs().max() > 1e-3


def test_layers_over_two_devices_never_meet_a_tensor_of_the_other(tiny_model):
    """The meta device stands for a second card: mixing it with CPU tensors raises, as two cards would."""
    devices = [CPU, torch.device("meta")]
    model = load_base_model(ModelFolder(tiny_model), torch.float32, devices)
    row, positions = torch.arange(3, 15), torch.cat([torch.arange(5), torch.arange(7)])
    with torch.no_grad():
        hidden = forward_hidden(model, row, positions, Segments.of([5, 7], CPU))
        assert hidden.device.type == "meta" and hidden.shape[0] == 12
        assert model.model.layers[0].mlp.up_proj.weight.device.type == "cpu"
        assert logits(model, hidden[-1:]).shape == (1, 600)
