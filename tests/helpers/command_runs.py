"""The project's commands as a user runs them, and what a run leaves behind."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.command_line import call
from configs.download import DownloadConfig
from configs.results import MergeConfig
from configs.serving import ApiConfig, ChatConfig
from configs.training import TrainingConfig
from helpers.environment import ENVIRONMENT, ROOT

CONFIGS = {
    "model_download": DownloadConfig,
    "llama_finetuning": TrainingConfig,
    "generate": ChatConfig,
    "api_stream": ApiConfig,
    "merge_lora_weights": MergeConfig,
}
"""The settings of each command, by the module of its `main`."""
STEPS = 24
"""Steps of the runs that `readme_flags` starts."""


def run_script(*arguments: object, timeout: float = 240, **more) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would; output is text."""
    command = [sys.executable, *map(str, arguments)]
    more.setdefault("cwd", ROOT)
    more.setdefault("env", ENVIRONMENT)
    if "input" not in more:
        more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **more)


def call_main(main: Callable[..., Any], *arguments: object) -> Any:
    """Call a command's `main` in this process, as its command line does."""
    return call(main, CONFIGS[main.__module__], [str(argument) for argument in arguments])


def torchrun(processes: int, *arguments: object, **more) -> subprocess.CompletedProcess:
    """Run llama_finetuning.py under torchrun."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc_per_node",
        processes,
        "--master_port",
        free_port(),
    ]
    return run_script(*launcher, "llama_finetuning.py", *arguments, **more)


def free_port() -> int:
    """A TCP port that nobody uses."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def readme_flags(model: Path, data: Path, output: Path, batch_size: int = 20) -> list[str]:
    """The README's command over another model and another file, STEPS steps with a checkpoint now and then."""
    return [
        *"--use_peft --peft_method lora --use_fp16 --dataset alpaca_dataset --quantization".split(),
        *["--model_name", str(model), "--output_dir", str(output), "--alpaca_dataset.data_path", str(data)],
        *["--batch_size_training", str(batch_size), "--num_epochs", "8", "--lr", "2e-3", "--save_steps", "5"],
    ]


def metrics_of(output: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step, in the order of the file."""
    return [(line["step"], line["train_loss"]) for line in metrics_of(output) if "train_loss" in line]


def held_out_losses_of(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation."""
    return [(line["step"], line["eval_loss"]) for line in metrics_of(output) if "eval_loss" in line]


def adapter_hash(output: Path) -> str:
    """SHA-256 of the adapter that a run handed over."""
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_same_result(output: Path, undisturbed: Path) -> None:
    """Every loss and the adapter's bytes are those of the run that nothing disturbed."""
    assert losses_of(output) == losses_of(undisturbed)
    assert held_out_losses_of(output) == held_out_losses_of(undisturbed)
    assert adapter_hash(output) == adapter_hash(undisturbed)
