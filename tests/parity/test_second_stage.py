"""Runs that start from an adapter's weights (--from_adapter)."""

import json
import shutil

import peft
import pytest
import torch
from helpers.command_runs import call_main
from helpers.tiny_models import make_model
from helpers.trainers import project_logits
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import llama_finetuning
from configs.errors import UserError
from utils.files import sha256
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.results.adapter_folder import load_adapter
from utils.results.consolidating import consolidate
from utils.runs.checkpoint import read_checkpoint
from utils.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("english")

LORA = "--lora_config.r 4 --lora_config.lora_alpha 6 --lora_config.use_rslora true".split()
KINDS = {
    "rslora": LORA,
    "dora": [*LORA, *"--lora_config.use_dora true --lora_config.target_modules k_proj,down_proj".split()],
    "modules": ["--lora_config.modules_to_save", "lm_head,norm"],
}


@pytest.fixture(scope="module")
def run(tiny_model, data_file):
    """Runs of a few steps over the same data, in this process."""

    def start(output, *flags, steps: int = 2):
        usual = ["--use_peft", "--scheduler", "constant", "--lr", 0.01, "--max_steps", steps, "--run_validation", False]
        named = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output]
        call_main(llama_finetuning.main, *named, *usual, *flags)
        return output

    return start


@pytest.fixture(scope="module")
def first_stages(run, tmp_path_factory):
    return {name: run(tmp_path_factory.mktemp("first") / name, *flags) for name, flags in KINDS.items()}


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_from_the_weights_and_has_the_settings(first_stages, run, tmp_path, kind):
    first = first_stages[kind]
    second = run(tmp_path / "second", "--from_adapter", first, "--lr", 1e-12)
    before, after = weights_of(first), weights_of(second)
    assert before.keys() == after.keys() and any("lora_B" in name and t.any() for name, t in before.items())
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9, msg=name)
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    for stored in settings:
        stored |= {name: sorted(stored[name] or []) for name in ("target_modules", "modules_to_save")}
    assert settings[0] == settings[1]
    described = json.loads((second / "training_config.json").read_text())
    assert described["from_adapter"] == {"folder": str(first), "sha256": sha256(first / "adapter_model.safetensors")}


def test_its_first_loss_is_the_adapters(first_stages, run, tiny_model, data_file, tmp_path):
    """All records in one step, against a plain loop over what chat loads."""
    second = run(tmp_path / "second", "--from_adapter", first_stages["dora"], "--batch_size_training", 60, steps=1)
    base = load_base_model(ModelFolder(tiny_model), torch.float32, [torch.device("cpu")])
    model, total, count = load_adapter(base, first_stages["dora"], torch.float32), 0.0, 0
    call = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file]
    for example in previewed(call):
        labels = torch.tensor(example["labels"])
        scores, learnt = project_logits(model, example["input_ids"])[:-1], labels[1:] >= 0
        total += torch.nn.functional.cross_entropy(scores[learnt], labels[1:][learnt], reduction="sum").item()
        count += int(learnt.sum())
    (line,) = [line for line in read_metrics(second) if "train_loss" in line]
    assert line["train_loss"] == pytest.approx(total / count, rel=1e-4)


def previewed(flags):
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as shown:
        call_main(llama_finetuning.main, *flags, "--preview", 60, "--run_validation", False)
    return [json.loads(line) for line in shown.getvalue().splitlines()]


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_it_goes_on_without_the_adapter_as_if_never_stopped(first_stages, run, tmp_path, kind):
    first = shutil.copytree(first_stages[kind], tmp_path / "first")
    whole = run(tmp_path / "whole", "--from_adapter", first, steps=4)
    stopped = run(tmp_path / "stopped", "--from_adapter", first, steps=2)
    origin = json.loads((stopped / "training_config.json").read_text())["from_adapter"]
    shutil.rmtree(first)
    run(stopped, "--from_adapter", first, steps=4)
    expected, found = weights_of(whole), weights_of(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((stopped / "training_config.json").read_text())["from_adapter"] == origin
    checkpoint = stopped / "checkpoints" / "step-4"
    elsewhere = run(tmp_path / "elsewhere", "--from_adapter", first, "--resume", checkpoint, steps=5)
    assert json.loads((elsewhere / "training_config.json").read_text())["from_adapter"] == origin
    with pytest.raises(UserError, match=f"There is no adapter in {first}"):
        run(tmp_path / "another", "--from_adapter", first)


@pytest.mark.parametrize("kind", KINDS)
def test_its_checkpoint_converts_to_its_adapter(first_stages, run, tiny_model, tmp_path, kind):
    second = run(tmp_path / "second", "--from_adapter", first_stages[kind])
    converted = tmp_path / "converted"
    consolidate(read_checkpoint(second / "checkpoints" / "step-2"), ModelFolder(tiny_model), converted)
    expected, found = weights_of(second), weights_of(converted)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_the_flag_it_is_not_gone_on_with(first_stages, run, tmp_path):
    first = first_stages["modules"]
    second = run(tmp_path / "second", "--from_adapter", first, steps=1)
    with pytest.raises(UserError, match=f"from_adapter: {first} -> "):
        run(second, *KINDS["modules"], steps=2)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_that_peft_made_is_taken_too(tiny_model, run, tmp_path, file):
    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    made = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(str(tmp_path / "made"))
    expected = weights_of(tmp_path / "made")
    if file.endswith("bin"):
        (tmp_path / "made" / "adapter_model.safetensors").unlink()
        torch.save(expected, tmp_path / "made" / file)
    found = weights_of(run(tmp_path / "second", "--from_adapter", tmp_path / "made", "--lr", 1e-12, steps=1))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_config.r", 16], "--lora_config.r 16: the adapter of --from_adapter has 4"),
        (["--lora_config.lora_alpha", 6, "--lora_config.target_modules", "v_proj,q_proj"], ""),
        (["--lora_config.target_modules", "o_proj"], "target_modules o_proj: the adapter .* has q_proj,v_proj"),
        (["--lora_config.modules_to_save", "norm"], "modules_to_save norm: the adapter .* has -"),
        (["--lora_config.use_dora", True], "use_dora True: the adapter .* has False"),
        (["--lora_config.lora_dropout", 0.1], ""),  # is a matter of training
    ],
)
def test_flags_that_contradict_are_refused_by_name(first_stages, run, tmp_path, flags, said):
    if not said:
        run(tmp_path / "second", "--from_adapter", first_stages["rslora"], *flags, steps=1)
        return
    with pytest.raises(UserError, match=said):
        run(tmp_path / "second", "--from_adapter", first_stages["rslora"], *flags)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type PREFIX_TUNING"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"target_modules": ".*q_proj"}, "target_modules .*q_proj"),
        ({"target_modules": [1]}, "target_modules [1]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save lm_head"),
        ({"r": 0}, "with r 0"),
        ({"lora_alpha": "32"}, "with lora_alpha 32"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is not in both"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight is not in both"),
        ({"r": 5}, "lora_A.weight is not in both"),
    ],
    ids=str,
)
def test_adapters_that_no_run_could_have_made_are_refused(first_stages, run, tmp_path, changed, said):
    first = shutil.copytree(first_stages["rslora"], tmp_path / "first")
    config = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError) as refused:
        run(tmp_path / "second", "--from_adapter", first)
    assert said in str(refused.value)


def test_it_is_for_the_adapters_own_base_and_another_folder(first_stages, run, tiny_model, tmp_path):
    first, other = first_stages["rslora"], make_model(tmp_path / "other", seed=9)
    shutil.copyfile(tiny_model / "tokenizer.model", other / "tokenizer.model")
    with pytest.raises(UserError, match="was trained over another base model"):
        run(tmp_path / "second", "--from_adapter", first, "--model_name", other)
    with pytest.raises(UserError, match="/ "):  # a folder that is in none
        run(tmp_path / "second", "--from_adapter", first, "--resume", "/")
    with pytest.raises(UserError, match="is the folder of --from_adapter"):
        run(first, "--from_adapter", first)
    with pytest.raises(UserError, match="--from_adapter has an effect only with --use_peft --peft_method lora"):
        run(tmp_path / "second", "--from_adapter", first, "--use_peft", False)
