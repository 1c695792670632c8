"""Whole training runs as a user starts them, and what they leave."""

import json

import pytest
import torch
from helpers.command_runs import (
    STEPS,
    adapter_hash,
    held_out_losses_of,
    losses_of,
    metrics_of,
    readme_flags,
    run_script,
    torchrun,
)
from helpers.trainers import make_trainer, train
from safetensors.torch import load_file


def test_the_readmes_command_leaves_what_is_documented(finished, tiny_model, data_file):
    output, result = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {
        *("adapter_config.json", "adapter_model.safetensors", "training_config.json"),
        *("metrics.jsonl", "loss.png", "README.md", "checkpoints"),
    }
    assert not [name for name in names if name.endswith((".new", ".unfinished", ".saving"))]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "--load_8bit" in (output / "README.md").read_text()
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)

    described = json.loads((output / "training_config.json").read_text())
    assert described["settings"]["quantization"] == "8bit"
    assert described["settings"]["lr"] == 2e-3
    assert described["settings"]["alpaca_dataset"]["data_path"] == str(data_file)
    assert described["trained_steps"] == STEPS
    assert (described["bos_ids"], described["eos_id"]) == ([1], 2)
    assert "### Response:" in described["prompt_template"]["source"]
    assert {"tokenizer_fingerprint", "base_model_fingerprint", "versions"} <= described.keys()

    assert "Traceback" not in result.stderr
    assert "57 examples to train on, 3 held out" in result.stdout
    checkpoints = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert checkpoints == ["step-20", "step-24"]  # the newest two, the default of --keep_checkpoints


def test_metrics_have_the_documented_keys(finished):
    output, _result = finished
    steps = [line for line in metrics_of(output) if "train_loss" in line]
    held_out = [line for line in metrics_of(output) if "eval_loss" in line]
    keys = "step epoch train_loss lr grad_norm tokens tokens_per_second max_memory_gb".split()
    assert all(list(line) == keys for line in steps)
    assert all(list(line) == ["step", "eval_loss"] for line in held_out)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in steps] == [epoch for epoch in range(1, 9) for _ in range(3)]
    assert [line["step"] for line in held_out] == list(range(3, STEPS + 1, 3))
    assert steps[-1]["train_loss"] < 0.85 * steps[0]["train_loss"]
    assert held_out[-1]["eval_loss"] < 0.9 * held_out[0]["eval_loss"]


def test_losses_are_those_of_the_same_run_in_this_process(finished, tiny_model, data_file, tmp_path):
    settings = {"quantization": "8bit", "batch_size_training": 20, "num_epochs": 8, "lr": 2e-3}
    trainer = make_trainer(tiny_model, tmp_path, data_file, val_set_size=0.05, scheduler="cosine", **settings)
    losses = [loss for _step, loss in losses_of(finished[0])]
    assert train(trainer) == pytest.approx(losses, rel=1e-5)


def test_running_a_finished_run_again_says_so_and_changes_nothing(finished, tiny_model, data_file):
    output, _result = finished
    before = adapter_hash(output), (output / "metrics.jsonl").read_bytes()
    again = run_script("llama_finetuning.py", *readme_flags(tiny_model, data_file, output))
    assert again.returncode == 0, again.stderr
    assert "finished: 24 steps" in again.stdout
    assert (adapter_hash(output), (output / "metrics.jsonl").read_bytes()) == before


def test_two_processes_learn_what_one_does(finished, finished_by_two):
    output, result = finished_by_two
    assert "x 2 processes = 20 a step" in result.stdout
    assert result.stdout.count("Done: 24 steps") == 1
    assert losses_of(output) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses_of(finished[0])]
    expected = held_out_losses_of(finished[0])
    assert held_out_losses_of(output) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]


@pytest.mark.parametrize("kind", ["full", "bf16"])
def test_sharded_over_two_processes_learns_what_one_does(tiny_model, data_file, tmp_path, kind):
    """Other methods and numbers of processes: tests/parity/test_sharding.py."""
    output = tmp_path / "sharded"
    flags = ["--model_name", tiny_model, "--output_dir", output, "--alpaca_dataset.data_path", data_file]
    flags += ["--enable_fsdp", "--batch_size_training", 10, "--num_epochs", 2, "--lr", "1e-3"]
    flags += {"full": ["--freeze_layers"], "bf16": ["--pure_bf16"]}[kind]
    result = torchrun(2, *flags)
    assert result.returncode == 0, result.stdout + result.stderr

    settings = {"batch_size_training": 20, "num_epochs": 2, "lr": 1e-3, "val_set_size": 0.05, "scheduler": "cosine"}
    settings |= {"full": {"freeze_layers": True}, "bf16": {"pure_bf16": True}}[kind]
    # In bf16 each process rounds its own shard at random: six steps of two runs, each with a standard deviation of half
    # of bf16's spacing at most, which is 2^-7 above 1. (Five of the sum's are allowed.)
    precision, difference = (2**-9, 5 * 12**0.5 * 2**-8) if kind == "bf16" else (1e-5, 2e-4)
    trainer = make_trainer(tiny_model, tmp_path / "one", data_file, use_peft=False, **settings)
    losses = train(trainer)
    assert losses[-1] < losses[0]
    assert [loss for _step, loss in losses_of(output)] == pytest.approx(losses, rel=precision)
    assert held_out_losses_of(output)[-1][1] == pytest.approx(trainer.last_eval_loss, rel=precision)

    # What was saved is whole, under transformers' own names.
    saved, expected = load_file(output / "model.safetensors"), dict(trainer.model.named_parameters())
    assert saved.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(saved[name], parameter.detach().float(), rtol=0, atol=difference)
