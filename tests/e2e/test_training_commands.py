"""Whole training runs as a user starts them: what they leave, and how they go on after anything."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from background_run import BackgroundRun
from conftest import ROOT, free_port, make_trainer, run_script, torchrun, train
from safetensors.torch import load_file

STEPS = 24


def readme_flags(model: Path, data: Path, output: Path, batch_size: int = 20) -> list[str]:
    """The README's command over another model and another file, with a checkpoint now and then."""
    return [
        *"--use_peft --peft_method lora --use_fp16 --dataset alpaca_dataset --quantization".split(),
        *["--model_name", str(model), "--output_dir", str(output), "--alpaca_dataset.data_path", str(data)],
        *["--batch_size_training", str(batch_size), "--num_epochs", "8", "--lr", "2e-3", "--save_steps", "5"],
    ]


def metrics_of(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step, in the order of the file."""
    return [(line["step"], line["train_loss"]) for line in metrics_of(output) if "train_loss" in line]


def held_out_losses_of(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in metrics_of(output) if "eval_loss" in line]


def adapter_hash(output: Path) -> str:
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def background(tmp_path):
    """Starts runs in the background, and leaves none behind."""
    runs: list[BackgroundRun] = []

    def start(flags: list[str], launcher: list[str] | None = None, cwd: Path = ROOT) -> BackgroundRun:
        launcher = launcher or ["--nnodes", "1", "--nproc_per_node", "1", "--master_port", str(free_port())]
        runs.append(BackgroundRun(flags, tmp_path / f"run-{len(runs)}.log", launcher, cwd))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="module")
def finished(tiny_model, data_file, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The README's command, run to its end without a disturbance."""
    output = tmp_path_factory.mktemp("finished") / "model"
    result = torchrun(1, *readme_flags(tiny_model, data_file, output))
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


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
    assert "### Response:" in described["prompt_template"]["response"]
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


def test_a_killed_run_goes_on_and_ends_exactly_as_if_never_killed(
    finished, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output)
    run = background(flags)
    run.wait_for_step(output, 12)
    run.kill()
    killed_at = losses_of(output)[-1][0]
    assert killed_at < STEPS, "the run ended before it could be killed"
    newest = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*[0-9]"))
    before = [line for line in metrics_of(output) if line["step"] <= newest]
    assert 10 <= newest <= killed_at

    changed = run_script("llama_finetuning.py", *flags, "--lr", "5e-4")
    assert changed.returncode == 2
    assert "lr: 0.002 -> 0.0005" in changed.stderr
    assert "--accept_changes" in changed.stderr
    assert "--resume none" in changed.stderr
    assert "Traceback" not in changed.stderr

    resumed = torchrun(1, *flags)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoints/step-{newest}" in resumed.stdout
    # Not begun anew: the lines up to the checkpoint are the killed run's own, its timings among them.
    assert [line for line in metrics_of(output) if line["step"] <= newest] == before
    assert losses_of(output) == losses_of(finished[0])
    assert held_out_losses_of(output) == held_out_losses_of(finished[0])
    assert adapter_hash(output) == adapter_hash(finished[0])


def test_a_run_is_alone_in_its_folder_and_saves_itself_when_told_to_stop(
    finished, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output)
    run = background(flags)
    run.wait_for_step(output, 7)
    pids = run.tree()
    second = run_script("llama_finetuning.py", *flags)
    assert second.returncode == 2
    assert "Another run" in second.stderr
    assert any(f"process {pid} on " in second.stderr for pid in pids)
    assert "Traceback" not in second.stderr

    for pid in pids:  # as `pkill -TERM -f llama_finetuning.py` does: the workers, and torchrun, which passes it on
        os.kill(pid, signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.process.wait(60) != 0
    said = run.log.read_text()
    stopped_at = losses_of(output)[-1][0]
    assert stopped_at < STEPS, "the run ended before it could be stopped"
    assert f"Stopped at step {stopped_at}" in said
    assert "same command goes on" in said
    assert (output / "checkpoints" / f"step-{stopped_at}" / "complete.json").is_file()

    resumed = torchrun(1, *flags)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoints/step-{stopped_at}" in resumed.stdout
    assert losses_of(output) == losses_of(finished[0])
    assert held_out_losses_of(output) == held_out_losses_of(finished[0])
    assert adapter_hash(output) == adapter_hash(finished[0])


@pytest.fixture(scope="module")
def finished_by_two(tiny_model, data_file, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The same run, its steps shared out between two processes."""
    output = tmp_path_factory.mktemp("finished-by-two") / "model"
    result = torchrun(2, *readme_flags(tiny_model, data_file, output, batch_size=10))
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


def test_two_processes_learn_what_one_does(finished, finished_by_two):
    output, result = finished_by_two
    assert "x 2 processes = 20 a step" in result.stdout
    assert result.stdout.count("Done: 24 steps") == 1
    assert losses_of(output) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses_of(finished[0])]
    expected = held_out_losses_of(finished[0])
    assert held_out_losses_of(output) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]


def node_launcher(port: int) -> list[str]:
    """torchrun's flags on each of two nodes."""
    fixed = "--nnodes 2 --nproc_per_node 1 --max_restarts 2 --rdzv_backend c10d --rdzv_id test --local_addr 127.0.0.1"
    return [*fixed.split(), "--monitor_interval", "0.1", "--rdzv_endpoint", f"127.0.0.1:{port}"]


def test_two_nodes_go_on_by_themselves_after_the_leading_worker_is_killed(
    finished_by_two, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = [*readme_flags(tiny_model, data_file, output, batch_size=10), "--resume", "none"]
    launcher = node_launcher(free_port())
    nodes = [background(flags, launcher) for _node in range(2)]
    nodes[0].wait_for_step(output, 7)
    os.kill(int((output / ".lock").read_text().split()[0]), signal.SIGKILL)
    nodes[0].send(signal.SIGCONT)
    ended = [node.process.wait(120) for node in nodes]
    said = "".join(node.log.read_text() for node in nodes)
    assert ended == [0, 0], said
    # Both workers were started again, by their own torchrun, and --resume none did not count a second time.
    assert said.count("Going on from") == 1
    assert re.search(r"Going on from .*step-(5|10|15|20)\.", said)
    assert losses_of(output) == losses_of(finished_by_two[0])
    assert held_out_losses_of(output) == held_out_losses_of(finished_by_two[0])
    assert adapter_hash(output) == adapter_hash(finished_by_two[0])


def test_nodes_without_a_common_disk_are_refused(tiny_model, data_file, tmp_path, background):
    flags = readme_flags(tiny_model, data_file, Path("model"), batch_size=10)
    launcher = [*node_launcher(free_port()), "--max_restarts", "0"]
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    nodes = [background(flags, launcher, folder) for folder in folders]
    assert all(node.process.wait(120) for node in nodes)
    said = "".join(node.log.read_text() for node in nodes)
    assert f"model is not the same folder on {socket.gethostname()}" in said
    assert "on a disk that they share" in said
    assert not [
        item for folder in folders for item in folder.rglob("*") if item.name not in ("model", ".lock", "checkpoints")
    ]


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
