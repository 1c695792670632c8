"""What the plan says, and what is refused before anything is loaded."""

import math
import shlex
from dataclasses import replace

import pytest
import torch
from helpers.command_runs import call_main
from helpers.settings import FULL, LLAMA_7B, LORA, memory_of, setup_of, world

import llama_finetuning
from configs.command_line import flags_of, parse
from configs.errors import UserError
from configs.training import TrainingConfig
from ft_datasets.loading import load_data
from utils.machine.world import World
from utils.model.folder import ModelFolder
from utils.planning.fits import check_memory, refuse_too_little, variants
from utils.planning.shape import Shape
from utils.reports import plan
from utils.training.step_plan import StepPlan


@pytest.mark.parametrize(
    ("settings", "limit", "cards", "refused"),
    [
        ({}, 14e9, 1, False),
        ({}, 13e9, 1, True),
        ({}, 8e9, 2, False),  # each card's limit
        ({}, 6e9, 2, True),
        ({"quantization": "8bit"}, 8e9, 1, False),
        ({"quantization": "8bit"}, 4.5e9, 1, True),
        ({"quantization": "4bit"}, 4.5e9, 1, False),
        ({"use_peft": False}, 80e9, 1, True),
    ],
)
def test_a_limit_below_the_weights_is_refused_with_what_would_do(settings, limit, cards, refused):
    config = replace(LORA, **settings)
    if not refused:
        refuse_too_little(config, setup_of(config, world(cards)), LLAMA_7B, limit)
        return
    with pytest.raises(UserError) as error:
        refuse_too_little(config, setup_of(config, world(cards)), LLAMA_7B, limit)
    message = str(error.value)
    assert f"{limit / 1e9:.1f} GB of it may be used" in message
    rows = {row.rpartition("--gpu_memory_gb")[0].strip(): float(row.split()[-1]) for row in message.splitlines()[1:]}
    assert rows["16 bit"] > rows["--quantization 8bit"] > rows["--quantization 4bit"] > 1
    assert ("full fine-tuning" in rows) != config.use_peft
    for name, variant in variants(config):  # what is advised is not refused
        refuse_too_little(variant, setup_of(variant, world(cards)), LLAMA_7B, rows[name] * 1e9)


def test_sharing_out_among_processes_counts():
    full = replace(LORA, use_peft=False, enable_fsdp=True)
    refuse_too_little(full, setup_of(full, world(1, size=2)), LLAMA_7B, 70e9)
    with pytest.raises(UserError):
        refuse_too_little(full, setup_of(full, world(1, size=1)), LLAMA_7B, 70e9)


def test_a_card_that_is_too_small_is_refused_before_loading(tiny_model, data_file, tmp_path, monkeypatch):
    config = TrainingConfig(model_name=str(tiny_model), use_peft=True, gpu_memory_gb=1e-6)
    config.alpaca_dataset.data_path = str(data_file)
    data, shape = data_of(config), Shape.of(ModelFolder(tiny_model).config)
    properties = type("Properties", (), {"total_memory": 16e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    with pytest.raises(UserError, match=r"--gpu_memory_gb 0\.1"):
        check_memory(config, setup_of(config, world(1), data.longest), shape)
    check_memory(replace(config, gpu_memory_gb=0.0), setup_of(config, world(1), data.longest), shape)
    check_memory(config, setup_of(config, World(0, 1, [torch.device("cpu")])), shape)


def test_memory_is_checked_before_the_model_is_loaded(tiny_model, data_file, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise UserError("too small")

    monkeypatch.setattr("utils.finetune.check_memory", refuse)
    monkeypatch.setattr("utils.finetune.load_trainable", lambda *_arguments: pytest.fail("loaded"))
    flags = f"--model_name {tiny_model} --alpaca_dataset.data_path {data_file} --output_dir {tmp_path / 'out'}"
    with pytest.raises(UserError, match="too small"):
        call_main(llama_finetuning.main, *flags.split())


def data_of(config: TrainingConfig):
    from helpers.records import alpaca_encoder

    return load_data(config, alpaca_encoder(config.model_name), report=lambda _message: None)


def printed_plan(config: TrainingConfig, capsys) -> str:
    plan.print_plan(config, ModelFolder(config.model_name), data_of(config))
    return capsys.readouterr().out


def test_the_plan_gives_the_command_of_everything_that_fits(tiny_model, data_file, tmp_path, capsys):
    flags = f"--model_name {tiny_model} --alpaca_dataset.data_path {data_file} --output_dir {tmp_path}"
    config = parse(TrainingConfig, [*flags.split(), "--plan", "--lr", "2e-3", "--save_optimizer", "False"])
    text = printed_plan(config, capsys)
    commands = [line.split()[2:] for line in text.splitlines() if "llama_finetuning.py" in line]
    parsed = [parse(TrainingConfig, command) for command in commands]
    assert [(c.use_peft, c.quantization) for c in parsed] == [
        (False, None),
        (True, None),
        (True, "8bit"),
        (True, "4bit"),
    ]
    assert parsed[0] == replace(config, plan=False)
    assert all((c.lr, c.plan) == (2e-3, False) for c in parsed)
    # fp32 weights alone, three checkpoints and the result.
    trained = sum(t.numel() for _name, t in ModelFolder(tiny_model).tensors())
    assert f"  disk         {trained * 16 / 1e9:6.2f} GB of" in text


def test_the_plan_counts_each_card(tiny_model, data_file, tmp_path, capsys, monkeypatch):
    config = TrainingConfig(model_name=str(tiny_model), output_dir=str(tmp_path), use_peft=True, gpu_memory_gb=5)
    config.alpaca_dataset.data_path = str(data_file)
    assert "of   5.00 GB" in printed_plan(config, capsys)
    free = {0: (9e9, 16e9), 1: (4e9, 16e9)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: free[index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(plan, "matmul_flops", lambda _device, _dtype: 1e12)
    text = printed_plan(config, capsys)
    assert "of   4.00 GB" in text  # the card that has least
    assert "the fullest of 2 cards" in text
    assert "of   5.00 GB" in printed_plan(replace(config, one_gpu=True), capsys)


def test_a_configuration_and_its_flags_are_one():
    flags = "--use_peft true --lora_config.target_modules q_proj,v_proj,o_proj --quantization 4bit --lr 0.002"
    config = parse(TrainingConfig, [*flags.split(), "--run_validation", "no", "--output_dir=--a b"])
    assert parse(TrainingConfig, flags_of(config)) == config
    assert flags_of(TrainingConfig()) == []


@pytest.mark.parametrize(
    "settings", [{"use_peft": True}, {"pure_bf16": True}, {"enable_fsdp": True, "pure_bf16": True}], ids=str
)
def test_every_command_of_the_plan_is_one_that_runs(tiny_model, data_file, tmp_path, capsys, settings):
    config = TrainingConfig(model_name=str(tiny_model), output_dir=str(tmp_path), **settings)
    config.alpaca_dataset.data_path = str(data_file)
    commands = [
        line.split("llama_finetuning.py ") for line in printed_plan(config, capsys).split("\n") if ".py" in line
    ]
    assert len(commands) >= 3
    for launcher, flags in commands:
        parsed = parse(TrainingConfig, shlex.split(flags))
        assert not parsed.plan
        assert ("torchrun" in launcher) == parsed.enable_fsdp


def test_the_least_that_would_do_has_room_for_the_gradients_of_an_earlier_micro_batch():
    with pytest.raises(UserError) as refusal:
        refuse_too_little(FULL, setup_of(FULL, world(1)), LLAMA_7B, 24e9)
    least = memory_of(FULL, LLAMA_7B, "plain", StepPlan(512, 0), step=math.inf).needed
    assert f"--gpu_memory_gb {math.ceil(least / 1e8) / 10}" in str(refusal.value)
