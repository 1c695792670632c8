"""A merged model computes what base and adapter compute together."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from helpers.records import alpaca_encoder, alpaca_template
from helpers.tiny_models import make_model
from helpers.trainers import make_trainer, project_logits, save_adapter, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from configs.errors import UserError
from configs.peft import LoraConfig
from ft_datasets.conversation import messages_of
from ft_datasets.prompt import AlpacaWords
from ft_datasets.tokenizer import Tokenizer
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.results.adapter_folder import load_adapter
from utils.results.merging import merge, rounded_sum
from utils.results.model_files import copy_tokenizer

SEQUENCE = [1, 300, 301, 302, 555, 410, 333, 278, 599, 261, 480, 481]
ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])


def model_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([SEQUENCE])).logits[0]


def merged_logits(folder) -> torch.Tensor:
    """The merged folder, loaded as a stranger would."""
    return model_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"))


def base_with_adapter(folder, adapter) -> peft.PeftModel:
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, str(adapter)).eval()


def do_merge(base, adapter, output, shard_gb: float = 4.0, quantization=None) -> None:
    merge(ModelFolder(base), adapter, output, alpaca_template(base), shard_gb, quantization)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> dict:
    """Adapters of the default modules trained over each kind of base."""
    folders = {}
    for quantization in (None, "8bit", "4bit"):
        output = tmp_path_factory.mktemp(f"adapter-{quantization}")
        trainer = make_trainer(tiny_model, output, quantization=quantization, lr=0.02, num_epochs=4)
        train(trainer)
        folders[quantization] = save_adapter(trainer)
    return folders


@QUANTIZATIONS
def test_merged_into_the_original_weights_is_peft_over_the_original_base(tiny_model, adapters, tmp_path, quantization):
    do_merge(tiny_model, adapters[quantization], tmp_path / "merged")
    expected = model_logits(base_with_adapter(tiny_model, adapters[quantization]))
    base_alone = model_logits(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - base_alone).abs().max() > 0.1


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_merged_with_quantization_is_what_chat_computes_over_the_quantised_base(
    tiny_model, adapters, tmp_path, quantization
):
    adapter = adapters[quantization]
    do_merge(tiny_model, adapter, tmp_path / "rounded", quantization=quantization)
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [torch.device("cpu")], quantization)
    expected = project_logits(load_adapter(base, adapter, torch.float32), SEQUENCE)
    torch.testing.assert_close(merged_logits(tmp_path / "rounded"), expected, rtol=1e-4, atol=1e-4)

    do_merge(tiny_model, adapter, tmp_path / "original")
    assert (merged_logits(tmp_path / "original") - expected).abs().max() > 1e-3


def test_biases_and_a_tied_head_of_a_bf16_base(grouped_model, tmp_path):
    settings = LoraConfig(target_modules=ALL_LINEAR)
    trainer = make_trainer(grouped_model, tmp_path / "adapter", lora_config=settings, lr=0.02)
    train(trainer)
    adapter = save_adapter(trainer)
    do_merge(grouped_model, adapter, tmp_path / "merged")
    expected = model_logits(base_with_adapter(grouped_model, adapter))
    unmerged_base = model_logits(LlamaForCausalLM.from_pretrained(grouped_model, dtype=torch.float32))
    # The merged weights are rounded to bf16 once: 8 bits.
    error = (merged_logits(tmp_path / "merged") - expected).norm() / (expected - unmerged_base).norm()
    assert error < 0.05
    dtypes = {tensor.dtype for _name, tensor in ModelFolder(tmp_path / "merged").tensors()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(("size", "is_near"), [(1e-5, False), (3e-5, False), (1e-2, True)])
def test_small_updates_of_a_bf16_weight_are_not_rounded_away(size, is_near):
    generator = torch.Generator().manual_seed(5)
    weight = (0.02 * torch.randn(128, 512, generator=generator)).bfloat16().float()
    added = size * torch.randn(128, 4, generator=generator) @ torch.randn(4, 512, generator=generator) / 2
    merged = rounded_sum(weight, added, torch.bfloat16, seed=1)
    assert merged.dtype == torch.bfloat16
    change = merged.float() - weight
    arriving = (change * added).sum() / added.square().sum()
    assert arriving == pytest.approx(1.0, abs=0.03)
    last_bit = 2.0 ** (torch.frexp(weight + added).exponent.float() - 8)
    assert ((change - added).abs() <= last_bit).all()
    assert torch.equal(merged, (weight + added).bfloat16()) == is_near
    assert torch.equal(merged, rounded_sum(weight, added, torch.bfloat16, seed=1))
    assert torch.equal(rounded_sum(weight, torch.zeros_like(added), torch.bfloat16, seed=1).float(), weight)
    assert torch.equal(rounded_sum(weight, added, torch.float32, seed=1), weight + added)


def random_adapter(folder, base, **settings):
    """An adapter made by PEFT itself, its matrices random."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings():  # PEFT tells that it saves an adapted head's base weight too
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "target_modules": ALL_LINEAR, "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 6}},
        {"r": 4, "target_modules": ALL_LINEAR, "alpha_pattern": {"q_proj": 32, r".*\.0\.mlp\.(up|gate)_proj": 3}},
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj"],
            "use_rslora": True,
            "rank_pattern": {"o_proj": 9},
            "alpha_pattern": {"o_proj": 5},
        },
        {"r": 4, "target_modules": ALL_LINEAR, "use_dora": True},
        {"r": 4, "target_modules": ["v_proj"], "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
        {"r": 4, "target_modules": r".*\.1\.self_attn\.[qkv]_proj"},
        {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"r": 4, "target_modules": ["v_proj", "lm_head"]},
    ],
    ids=[
        "rank patterns",
        "alpha patterns",
        "rslora",
        "dora",
        "rslora and dora",
        "pattern of names",
        "some layers",
        "whole modules",
        "head",
    ],
)
def test_adapters_of_every_shape_merge_as_peft_computes_them(tiny_model, tmp_path, settings):
    adapter = random_adapter(tmp_path / "adapter", tiny_model, **settings)
    do_merge(tiny_model, adapter, tmp_path / "merged")
    expected = model_logits(base_with_adapter(tiny_model, adapter))
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


def test_trained_biases_merge_as_peft_computes_them(tmp_path):
    base = make_model(tmp_path / "base", family="qwen2", random_vectors=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], bias="all"))
    torch.manual_seed(7)
    for parameter in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    do_merge(base, tmp_path / "adapter", tmp_path / "merged")
    expected = model_logits(adapted.eval())
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),  # A and B are taken out of the base's weights
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),  # counts behind these tokens alone
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_more_than_a_sum_of_matrices_is_refused_by_name(tiny_model, tmp_path, settings, said):
    adapter = random_adapter(tmp_path / "adapter", tiny_model, r=4, target_modules=["v_proj"], **settings)
    with pytest.raises(UserError, match=f"adapters with {said} can't be merged here"):
        do_merge(tiny_model, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("changed", [{"lora_alpha": "8"}, {"lora_alpha": None}, {"alpha_pattern": {"[": 3}}], ids=str)
def test_alphas_that_are_none_are_refused(tiny_model, tmp_path, changed):
    adapter = random_adapter(tmp_path / "adapter", tiny_model, r=4, target_modules=["v_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=r"adapters with lora_alpha .*, alpha_pattern .* can't be merged here"):
        do_merge(tiny_model, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_vocabulary_that_has_grown_beside_the_adapter_is_refused(tiny_model, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.resize_token_embeddings(610, mean_resizing=False)
    with warnings.catch_warnings():  # PEFT tells that it saves embedding and head too
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])).save_pretrained(
            str(tmp_path / "adapter")
        )
    with pytest.raises(UserError, match=r"has shape \(600, 64\) in the base model and \(610, 64\) in the adapter"):
        do_merge(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merged_weights_of_dora_are_those_of_pefts_merge(tiny_model, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", tiny_model, r=4, target_modules=ALL_LINEAR, use_dora=True)
    do_merge(tiny_model, adapter, tmp_path / "merged")
    expected = base_with_adapter(tiny_model, adapter).merge_and_unload().state_dict()
    for name, tensor in ModelFolder(tmp_path / "merged").tensors():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}], ids=str)
@QUANTIZATIONS
def test_what_a_run_trains_is_chatted_with_and_merged_alike(tiny_model, tmp_path, quantization, kind):
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **kind)
    trainer = make_trainer(tiny_model, tmp_path / "adapter", quantization=quantization, lora_config=settings, lr=0.02)
    train(trainer)
    adapter = save_adapter(trainer)
    expected = project_logits(trainer.model, SEQUENCE)
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [torch.device("cpu")], quantization)
    chatted = project_logits(load_adapter(base, adapter, torch.float32), SEQUENCE)
    torch.testing.assert_close(chatted, expected, rtol=1e-4, atol=1e-4)
    do_merge(tiny_model, adapter, tmp_path / "merged", quantization=quantization)
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    base = load_base_model(ModelFolder(tiny_model), torch.bfloat16, [torch.device("cpu")], quantization)
    in_16_bits = project_logits(load_adapter(base, adapter, torch.bfloat16), SEQUENCE)
    assert (in_16_bits - expected).norm() < 0.1 * expected.norm()


def test_several_shards_hold_the_same_as_one(tiny_model, adapters, tmp_path):
    do_merge(tiny_model, adapters[None], tmp_path / "one")
    do_merge(tiny_model, adapters[None], tmp_path / "several", shard_gb=100e-6)
    files = sorted(tmp_path.glob("several/*.safetensors"))
    assert len(files) > 2
    # One tensor alone may be larger than a shard is meant to be: the embedding has 154 kB.
    assert max(file.stat().st_size for file in files) < 160_000
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert torch.equal(merged_logits(tmp_path / "several"), merged_logits(tmp_path / "one"))


@pytest.mark.parametrize(
    "config", [None, {"legacy": False}, {"add_bos_token": True, "legacy": False, "bos_token": "<s>"}]
)
def test_transformers_reads_chats_with_the_merged_folder_as_training_did(tiny_model, tmp_path, config):
    """Ids, not texts: how a special token is set apart from what follows it can't be seen in a text."""
    base, folder = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "merged"
    if config is not None:
        (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    folder.mkdir()
    encoder = alpaca_encoder(base)
    copy_tokenizer(base, folder, encoder.template)
    other = AutoTokenizer.from_pretrained(folder)
    for question in ("你好", "  两个空格", "第一行\n第二行", "a  b   c", "1+1=？", "🎉龘", "Below is", "\n", "</"):
        for history in ([], [("你是谁？", "我是助手。")]):
            turns = [text for turn in history for text in turn] + [question]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            found = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert found == encoder.prompt_ids(messages_of(question, history)), (question, history)


def test_merged_folder_brings_tokenizer_chat_template_and_stop_tokens(tiny_model, adapters, tmp_path):
    merged = tmp_path / "merged"
    do_merge(tiny_model, adapters[None], merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "你好，天气好吗？"}], tokenize=False)
    prompt = AlpacaWords().prompt("你好，天气好吗？")
    assert rendered == "<s>" + prompt
    text = prompt + "今天天气很好。"
    assert tokenizer(text).input_ids == Tokenizer(tiny_model).encode(text)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id in (2, [2])
    assert Tokenizer(merged).fingerprint == Tokenizer(tiny_model).fingerprint


def test_the_base_is_left_as_it_was_and_a_full_output_folder_is_refused(tiny_model, adapters, tmp_path):
    before = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    (tmp_path / "merged").mkdir()
    do_merge(tiny_model, adapters[None], tmp_path / "merged")
    assert {file.name: file.read_bytes() for file in tiny_model.iterdir()} == before
    with pytest.raises(UserError, match="not empty"):
        do_merge(tiny_model, adapters[None], tmp_path / "merged")


def test_an_adapter_of_another_shape_is_refused_and_leaves_nothing(tiny_model, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", tiny_model, r=4, target_modules=["v_proj"])
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"num_hidden_layers": 1}
    smaller = tmp_path / "smaller"
    LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).save_pretrained(smaller)
    (smaller / "tokenizer.model").write_bytes((tiny_model / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=r"model\.layers\.1"):
        do_merge(smaller, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "smaller"]


def test_a_name_that_no_folder_can_have_is_refused(tiny_model, adapters, tmp_path):
    with pytest.raises(UserError, match=r"can't be written \(File name too long\)"):
        do_merge(tiny_model, adapters[None], tmp_path / ("a" * 300))


def test_a_disk_without_room_is_told_before_anything_is_written(tiny_model, adapters, tmp_path, monkeypatch):
    base = ModelFolder(tiny_model)
    monkeypatch.setattr("utils.results.merging.free_space", lambda _folder: base.parameter_bytes - 1)
    monkeypatch.setattr("utils.results.merging.write_model", lambda *_arguments: pytest.fail("written"))
    with pytest.raises(UserError, match=r"The merged model needs 0\.0 GB, and the disk of .*merged has 0\.0 GB left"):
        do_merge(tiny_model, adapters[None], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_each_weight_is_rounded_by_random_numbers_of_its_own_that_are_always_the_same(
    tiny_model, adapters, tmp_path, monkeypatch
):
    seeds: list[list[int]] = []

    def watched(base, added, dtype, seed):
        seeds[-1].append(seed)
        return rounded_sum(base, added, dtype, seed)

    monkeypatch.setattr("utils.results.merging.rounded_sum", watched)
    for name in ("one", "two"):
        seeds.append([])
        do_merge(tiny_model, adapters[None], tmp_path / name)
    assert sorted(seeds[0]) == sorted(seeds[1]) and len(set(seeds[0])) == len(seeds[0]) == 4
