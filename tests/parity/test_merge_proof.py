"""A merged folder is read again before it is handed over, and one that is not base + adapter is refused."""

import importlib
import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from helpers.chat_templates import chat_folder
from helpers.records import alpaca_encoder, record
from helpers.tiny_models import make_model, write_tokenizer_json
from helpers.trainers import make_trainer, save_adapter, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from configs.errors import UserError
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.loading import load_data
from ft_datasets.prompt import choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.model.folder import ModelFolder
from utils.model.quantization import rounded_weight
from utils.results.merge_ids import compare_ids
from utils.results.merge_measures import measure
from utils.results.merge_proof import prove
from utils.results.merging import LoraDelta, merge, write_model
from utils.runs.base_model import BaseIdentity
from utils.runs.description import describe_run, write_training_config

ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
pytestmark = pytest.mark.usefixtures("english")


def trained(base, data, folder, **settings):
    """A LoRA run's output folder: the adapter with its training_config.json, and what it held out."""
    settings = {"lr": 0.02, "num_epochs": 2, "val_set_size": 12, **settings}
    trainer = make_trainer(base, folder, data, **settings)
    train(trainer)
    write_training_config(folder, describe_run(trainer.config, alpaca_encoder(base), BaseIdentity("")))
    return SimpleNamespace(
        base=base, folder=save_adapter(trainer), config=trainer.config, encoder=alpaca_encoder(base), data=trainer.data
    )


@pytest.fixture(scope="module")
def run(tiny_model, data_file, tmp_path_factory):
    return trained(tiny_model, data_file, tmp_path_factory.mktemp("proof") / "adapter")


def merge_and_prove(run, output, quantization=None, save_quantized=None, count=8, **more) -> list[str]:
    """What the proof says."""
    said: list[str] = []
    base = ModelFolder(run.base)

    def check(folder):
        prove(folder, base, run.folder, run.encoder, quantization, save_quantized, count, said.append, **more)

    merge(base, run.folder, output, run.encoder.template, 4.0, quantization, save_quantized, check)
    return said


def report_of(folder) -> dict:
    return json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))


def whole(folder, quantized=None):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def answer_logits(model, examples) -> torch.Tensor:
    """Logits by a whole model of transformers at the positions before each answer token, all examples' end to end."""
    rows = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.input_ids).long()[None]).logits[0]
        rows += [logits[at - 1] for at in range(1, len(example)) if example.labels[at] != -100]
    return torch.stack(rows)


def loss_of(logits, examples) -> float:
    targets = [int(token) for example in examples for token in example.labels[1:] if token != -100]
    return float(np.mean([float(-row.log_softmax(-1)[target]) for row, target in zip(logits, targets, strict=True)]))


def test_the_report_has_what_whole_models_compute(run, tmp_path):
    merge_and_prove(run, tmp_path / "merged")
    report = report_of(tmp_path / "merged")
    held_out = {example.number: example for example in run.data.held_out}
    assert report["prompts"]["origin"] == "held out" and len(report["prompts"]["records"]) == 8
    examples = [held_out[number] for number in report["prompts"]["records"]]
    base = answer_logits(whole(run.base), examples)
    adapted = answer_logits(peft.PeftModel.from_pretrained(whole(run.base), str(run.folder)).eval(), examples)
    merged = answer_logits(whole(tmp_path / "merged"), examples)
    expected = {"base": base, "adapted": adapted, "merged": merged}
    assert report["loss"] == pytest.approx({name: loss_of(logits, examples) for name, logits in expected.items()}, 1e-4)
    assert report["loss"]["adapted"] < report["loss"]["base"] - 0.1
    assert report["logits"]["error"] < 1e-4 and report["logits"]["limit"] == 0.05
    told = report["likeliest_next_token"]
    same = adapted.argmax(-1) == merged.argmax(-1)
    assert (told["positions"], told["equal"]) == (len(merged), int(same.sum()))
    assert [(each["record"], each["positions"]) for each in told["prompts"]] == [
        (example.number, example.label_count) for example in examples
    ]
    assert report["ids"] == {"conversations": 8, "equal": 8, "spelling_a_special_token": 0, "spelling_equal": 0}
    assert report["verified"] is True


def test_the_errors_and_the_first_difference_are_those_of_whole_models(run, tmp_path):
    """Over a model that is no merge at all: half of what the adapter adds."""
    adapter = shutil.copytree(run.folder, tmp_path / "half")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
    base = ModelFolder(run.base)
    merge(base, adapter, tmp_path / "merged", run.encoder.template, 4.0)
    examples = run.data.held_out
    found = measure(
        base,
        run.folder,
        ModelFolder(tmp_path / "merged"),
        examples,
        quantization=None,
        reference="",
        budget_seconds=1e9,
    )
    plain = answer_logits(whole(run.base), examples)
    adapted = answer_logits(peft.PeftModel.from_pretrained(whole(run.base), str(run.folder)).eval(), examples)
    merged = answer_logits(whole(tmp_path / "merged"), examples)
    expected = ((merged - adapted).norm() / (adapted - plain).norm()).item()
    assert found.error("merged") == pytest.approx(expected, rel=1e-3) and expected > 0.2
    assert found.distance("merged", "base") == pytest.approx((merged - plain).norm().item(), rel=1e-3)
    moved = (adapted - plain).flatten()
    assert found.arrived() == pytest.approx(((merged - plain).flatten() @ moved / (moved @ moved)).item(), rel=1e-3)
    assert found.is_equal.tolist() == (adapted.argmax(-1) == merged.argmax(-1)).tolist()
    margins = [float(row.max() - row[other.argmax()]) for row, other in zip(adapted, merged, strict=True)]
    assert found.margins.tolist() == pytest.approx(margins, abs=1e-3) and max(margins) > 0.01


def half_scale(monkeypatch):
    scale = LoraDelta._scale
    monkeypatch.setattr(LoraDelta, "_scale", lambda *arguments: 0.5 * scale(*arguments))


def one_weight_scaled(monkeypatch):
    apply = LoraDelta.apply

    def scaled(delta, name, *arguments):
        return apply(delta, name, *arguments) * (1.5 if name == "model.layers.1.self_attn.o_proj.weight" else 1)

    monkeypatch.setattr(LoraDelta, "apply", scaled)


def not_merged(monkeypatch):
    monkeypatch.setattr(LoraDelta, "_scale", lambda *_arguments: 0.0)


def after_writing(monkeypatch, change):
    def write(base, tensors, folder, *arguments):
        size = write_model(base, tensors, folder, *arguments)
        change(folder)
        return size

    monkeypatch.setattr("utils.results.merging.write_model", write)


def other_settings(monkeypatch):
    def change(folder):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer", "legacy": False}), encoding="utf-8")
        (folder / "tokenizer.json").unlink()

    after_writing(monkeypatch, change)


def other_tokenizer(monkeypatch, other):
    after_writing(monkeypatch, lambda folder: shutil.copyfile(other, folder / "tokenizer.json"))


def other_template(monkeypatch):
    def change(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(file.read_text(encoding="utf-8").replace("### Response:", "### Response: "), encoding="utf-8")

    after_writing(monkeypatch, change)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (half_scale, "off by .* of what the adapter moves, and 5 % is the limit"),
        (one_weight_scaled, "off by .* of what the adapter moves, and 5 % is the limit"),
        (not_merged, "the merge changes nothing"),
        (other_settings, "8 of 8 conversations with it as other tokens"),
        (other_template, "8 of 8 conversations with it as other tokens"),
    ],
)
def test_a_merge_that_is_not_right_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch, sabotage, message):
    sabotage(monkeypatch)
    with pytest.raises(UserError, match=message):
        merge_and_prove(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_in_the_folder_is_refused(run, tmp_path, monkeypatch):
    from scripts.quickstart import train_sentencepiece

    (tmp_path / "other").mkdir()
    train_sentencepiece(
        ["请说出第一个数字。是一。" * 3, "天气很好。 Translate into English."] * 50, tmp_path / "other", 320
    )
    write_tokenizer_json(tmp_path / "other" / "tokenizer.model", tmp_path / "other" / "json")
    other_tokenizer(monkeypatch, tmp_path / "other" / "json" / "tokenizer.json")
    with pytest.raises(UserError, match="as other tokens"):
        merge_and_prove(run, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_untrained_adapter_is_refused(tiny_model, data_file, tmp_path):
    untrained = trained(tiny_model, data_file, tmp_path / "adapter", lr=0.0)
    with pytest.raises(UserError, match="the adapter changes nothing"):
        merge_and_prove(untrained, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_of_a_base_that_was_quantised_in_training_both_errors_are_told(tiny_model, data_file, tmp_path, quantization):
    quantized = trained(tiny_model, data_file, tmp_path / "adapter", quantization=quantization)
    for into in (None, quantization):
        said = merge_and_prove(quantized, tmp_path / f"into-{into}", into)
        report = report_of(tmp_path / f"into-{into}")
        own, other = (quantization, "original") if into else ("original", quantization)
        logits, loss = report["logits"], report["loss"]
        assert logits[f"error_over_{own}_base"] == logits["error"] < 1e-3 < logits[f"error_over_{other}_base"]
        assert loss["merged"] == pytest.approx(loss["quantized_adapted" if into else "adapted"], abs=1e-3)
        assert loss["quantized_base"] != loss["base"]
        precisions = ["its own precision", quantization]
        assert [line.split(":")[0] for line in said[-2:]] == [f"Over the base in {each}" for each in precisions]


def stored_by_transformers(folder, kind) -> dict[str, torch.Tensor]:
    """The tensors that transformers itself would write of a model that it has quantised with bitsandbytes."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "8bit" else BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).state_dict()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_stored_in_fewer_bits_it_is_what_transformers_writes_and_loads(tiny_model, data_file, tmp_path, kind):
    strong = trained(tiny_model, data_file, tmp_path / "adapter", lr=0.05, num_epochs=4)
    merge_and_prove(strong, tmp_path / "plain")
    merge_and_prove(strong, tmp_path / "stored", save_quantized=kind)
    found, expected = (
        load_file(tmp_path / "stored" / "model.safetensors"),
        stored_by_transformers(tmp_path / "plain", kind),
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.int8:  # which transformers takes from fp16
            assert (found[name].int() - tensor.int()).abs().max() <= 1, name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=0, msg=name)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert type(loaded.model.layers[1].mlp.up_proj).__name__ == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind]
    report = report_of(tmp_path / "stored")
    examples = [each for each in strong.data.held_out if each.number in report["prompts"]["records"]]
    # In eval mode bitsandbytes' int8 rounds activations as well, on a CPU.
    assert loss_of(answer_logits(loaded.eval(), examples), examples) == pytest.approx(
        report["loss"]["merged"], rel=0.02
    )
    assert report["logits"]["limit"] == 0.2
    assert report["logits"]["error"] == report["logits"][f"error_over_{kind}_base"] > 0

    rounded = whole(tmp_path / "plain")
    for module in rounded.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded_weight(module.weight.data, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stored")
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "请说出第7个数字。"}], add_generation_prompt=True, return_tensors="pt"
    )
    answers = [
        tokenizer.decode(model.generate(**question, max_new_tokens=12, do_sample=False)[0])
        for model in (loaded, rounded)
    ]
    assert answers[0] == answers[1]


def test_stored_in_too_few_bits_for_a_weak_adapter_it_is_refused(tiny_model, data_file, tmp_path):
    weak = trained(tiny_model, data_file, tmp_path / "adapter", lr=1e-4, num_epochs=1)
    with pytest.raises(UserError, match=r"20 % is the limit(.|\n)*In 4bit, too little is left"):
        merge_and_prove(weak, tmp_path / "stored", save_quantized="4bit")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("lr", "coarse"), [(1e-3, False), (5e-6, True)])
def test_in_bf16_the_error_is_held_to_what_rounding_does(data_file, tmp_path, monkeypatch, lr, coarse):
    base = make_model(tmp_path / "base", layers=3, dtype="bfloat16")
    adapter = trained(base, data_file, tmp_path / "adapter", lr=lr)
    said = merge_and_prove(adapter, tmp_path / "merged")
    logits = report_of(tmp_path / "merged")["logits"]
    assert logits["limit"] == max(0.05, 2 * logits["error_of_rounding"])
    assert logits["error"] == pytest.approx(logits["error_of_rounding"], rel=0.3)
    assert (logits["error"] > 0.1) == coarse
    assert any("what rounding to bf16 does" in line for line in said) == (logits["error"] > 0.05)
    assert logits["arrived"] == pytest.approx(1, abs=0.2)
    half_scale(monkeypatch)
    with pytest.raises(UserError, match=r"off by|has arrived"):
        merge_and_prove(adapter, tmp_path / "half")


def test_texts_that_spell_a_special_token_stand_apart(run, tmp_path):
    merge(ModelFolder(run.base), run.folder, tmp_path / "merged", run.encoder.template, 4.0)
    talks = [record(3, "你好</s>", "", "好。"), record(4, "你好", "今天", "好。"), record(5, "好", "", "是<s>的。")]
    found = compare_ids(tmp_path / "merged", talks, run.encoder)
    assert (found.total, found.equal, found.other, found.spelling) == (1, 1, (), 2)
    assert found.spelling_equal == 0


def test_prompts_are_those_that_the_run_held_out_or_other_ones(run, tiny_model, data_file, tmp_path):
    held_out = {example.number for example in load_data(run.config, run.encoder, print).held_out}
    merge_and_prove(run, tmp_path / "one", count=99)
    assert set(report_of(tmp_path / "one")["prompts"]["records"]) == held_out and len(held_out) == 12

    without = trained(tiny_model, data_file, tmp_path / "without", val_set_size=0)
    said = merge_and_prove(without, tmp_path / "two")
    assert any("held no examples out" in line for line in said)
    prompts = report_of(tmp_path / "two")["prompts"]
    assert prompts["origin"] == "training" and len(prompts["records"]) == 8

    described = json.loads((without.folder / "training_config.json").read_text(encoding="utf-8"))
    described["settings"]["alpaca_dataset"]["data_path"] = str(tmp_path / "gone.json")
    (without.folder / "training_config.json").write_text(json.dumps(described), encoding="utf-8")
    said = merge_and_prove(without, tmp_path / "three", count=99)
    assert any("gone.json is not there" in line and "built-in" in line for line in said)
    prompts = report_of(tmp_path / "three")["prompts"]
    assert prompts == {"origin": "built in", "data": "", "records": [*range(1, 13)], "left_out_for_time": []}


def test_where_time_is_short_fewer_prompts_are_compared(run, tmp_path):
    said = merge_and_prove(run, tmp_path / "merged", budget_seconds=0.0)
    prompts = report_of(tmp_path / "merged")["prompts"]
    assert len(prompts["records"]) == 1 and len(prompts["left_out_for_time"]) == 7
    assert any("All 8 prompts would take longer" in line and "1 are compared" in line for line in said)


def test_logits_in_pieces_are_those_in_one(run, tmp_path, monkeypatch):
    merge_and_prove(run, tmp_path / "one")
    monkeypatch.setattr("utils.model.streaming.LOGIT_BYTES", 5 * 600 * 4)  # five positions
    merge_and_prove(run, tmp_path / "several")
    one, several = (report_of(tmp_path / name) for name in ("one", "several"))
    assert one["loss"] == pytest.approx(several["loss"], rel=1e-6)
    assert one["likeliest_next_token"] == several["likeliest_next_token"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL_LINEAR, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ALL_LINEAR, "use_dora": True},
    ],
    ids=["patterns", "whole modules", "head", "dora"],
)
def test_adapters_of_every_shape_are_proved(run, tiny_model, tmp_path, settings):
    model = peft.get_peft_model(whole(tiny_model), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or "magnitude" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    with warnings.catch_warnings():  # PEFT tells that it saves an adapted head's base weight too
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "adapter"))
    shutil.copyfile(run.folder / "training_config.json", tmp_path / "adapter" / "training_config.json")
    one = SimpleNamespace(base=tiny_model, folder=tmp_path / "adapter", encoder=run.encoder)
    merge_and_prove(one, tmp_path / "merged")
    assert report_of(tmp_path / "merged")["logits"]["error"] < 1e-3


def test_the_command_verifies_unless_it_is_told_not_to(run, tmp_path, monkeypatch, capsys):
    command = importlib.import_module("inference.hf-text-generation-inference.merge_lora_weights").main
    # The run's own account of its base, which the command looks at before it merges.
    adapter = shutil.copytree(run.folder, tmp_path / "adapter")
    base = ModelFolder(run.base)
    identity = BaseIdentity(base.fingerprint(), base.digests, base.sha256())
    write_training_config(adapter, describe_run(run.config, run.encoder, identity))
    flags = {"base_model": str(run.base), "peft_model": str(adapter)}

    command(**flags, output_dir=str(tmp_path / "one"), verify_prompts=3)
    report = report_of(tmp_path / "one")
    assert report["verified"] is True and len(report["prompts"]["records"]) == 3
    out = capsys.readouterr().out
    assert all(line in out for line in report["verdict"])
    assert report["verdict"][0].startswith("Verified on 3 prompts held out of the data: transformers reads 3 of 3 ")

    command(**flags, output_dir=str(tmp_path / "two"), verify=False)
    assert report_of(tmp_path / "two") == {"verified": False, "verdict": ["Not verified: --verify False."]}
    assert "Not verified: --verify False." in capsys.readouterr().out

    half_scale(monkeypatch)
    with pytest.raises(UserError, match="is not kept: its logits are off by"):
        command(**flags, output_dir=str(tmp_path / "three"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "one", "two"]


@pytest.mark.parametrize("form", ["chatml", "qwen3", "llama3", "mistral"])
def test_conversations_in_the_models_own_template_are_proved(form, tmp_path):
    """Of several turns, with an `input` or a system message; in Qwen3's words each answer is an example of its own."""
    base = make_model(tmp_path / "base")
    (base / "tokenizer.model").unlink()
    shutil.copytree(chat_folder(tmp_path / "words", form), base, dirs_exist_ok=True)
    rows = [
        {
            "instruction": f"  第{number}个\n数字 ",
            "input": "前面的" * (number % 2),
            "output": f"是{number}。",
            "history": [["你是谁？", "我是<think>\n助手\n</think>\n\n小明。"]] * (number % 3),
        }
        for number in range(24)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    tokenizer = Tokenizer(base)
    encoder = ChatEncoder(choose_template("model", base, tokenizer, "2026-11-27"), tokenizer)
    model = peft.get_peft_model(whole(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"]))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    settings = TrainingConfig(model_name=str(base), output_dir=str(tmp_path / "adapter"), use_peft=True, val_set_size=9)
    settings.alpaca_dataset.data_path = str(tmp_path / "talks.json")
    write_training_config(tmp_path / "adapter", describe_run(settings, encoder, BaseIdentity("")))
    run = SimpleNamespace(base=base, folder=tmp_path / "adapter", encoder=encoder)
    merge_and_prove(run, tmp_path / "merged", count=99)
    report = report_of(tmp_path / "merged")
    assert report["prompts"]["origin"] == "held out"
    assert report["ids"] == {"conversations": 9, "equal": 9, "spelling_a_special_token": 0, "spelling_equal": 0}
    assert (len(report["prompts"]["records"]) > 9) == (form == "qwen3")
    assert report["logits"]["error"] < 1e-3
