"""What saving costs a run: the stages of one checkpoint, and how long training stands still for it.

    python -m benchmarks.checkpoint                       # in output/; prints tables in Markdown
    python -m benchmarks.checkpoint --folder /mnt/disk    # on another disk

The checkpoint is that of LoRA r=8 on all linear layers of Llama 2 7B: 20 million parameters with AdamW's two moments,
240 MB. On a GPU the tensors lie there, as in a run.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from configs.training import TrainingConfig
from utils.files import flush, sha256
from utils.machine.world import World
from utils.runs import checkpoint as checkpoints
from utils.runs.state import RunState
from utils.training.optimizer import make_optimizer, run_tensors

HIDDEN, INTERMEDIATE, LAYERS, RANK = 4096, 11008, 32, 8
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INTERMEDIATE)] * 2 + [(INTERMEDIATE, HIDDEN)]
"""(in, out) features of a layer's linear modules."""
INTERVALS = {
    "every 10 minutes (the default)": 600.0,
    "every 50 steps of 2.5 s (40 examples, 24 GB card)": 125.0,
    "every 50 steps of 0.45 s (40 examples, H100)": 22.5,
}
"""When a checkpoint is written: seconds from one to the next. A step of 40 Chinese examples has 7,600 tokens."""
STATE = RunState(0, 1, {}, world_size=1, batch_size_training=40, has_optimizer=True, loss_scale={})


def main() -> None:
    """Time the stages, then whole checkpoints while something computes; print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("output"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = lora_tensors(device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stages = time_stages(Path(folder), tensors, arguments.repeats)
        stall, whole, slowed = time_in_background(Path(folder), tensors, device, arguments.repeats)

    print(f"{checkpoints.size_of(tensors) / 1e6:.0f} MB on {device}, best of {arguments.repeats}\n")
    print("| stage | seconds |\n| --- | --- |")
    for name, seconds in stages.items():
        print(f"| {name} | {seconds:.3f} |")
    print(f"| training stands still | {stall:.3f} |")
    print(f"| until the checkpoint is whole, in the background | {whole:.3f} |")
    print(f"| lost to training, standstill and slower steps | {stall + slowed:.3f} |\n")
    print("| a checkpoint | saving and waiting | in the background |\n| --- | --- | --- |")
    for name, seconds in INTERVALS.items():
        waiting = sum(stages.values()) - stages["copy to the host"]
        print(f"| {name} | {waiting / seconds:.2%} | {(stall + slowed) / seconds:.2%} |")


def lora_tensors(device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state as a run's checkpoint holds them."""
    parameters = {}
    for layer in range(LAYERS):
        for number, (inputs, outputs) in enumerate(SHAPES):
            parameters[f"layers.{layer}.{number}.lora_A"] = nn.Parameter(torch.randn(RANK, inputs, device=device))
            parameters[f"layers.{layer}.{number}.lora_B"] = nn.Parameter(torch.randn(outputs, RANK, device=device))
    return run_tensors(parameters, make_optimizer(parameters.values(), TrainingConfig()))


def time_stages(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of each stage alone, the best of `repeats`."""
    files = folder / "stages"

    def write_and_flush() -> None:
        dcp.save(tensors, checkpoint_id=files, no_dist=True)
        for file in files.iterdir():
            flush(file)

    stages: dict[str, Callable[[], object]] = {
        "copy to the host": lambda: [t.to("cpu", copy=True) for group in tensors.values() for t in group.values()],
        "write and flush": write_and_flush,
        "hash": lambda: [sha256(file) for file in files.iterdir()],
    }
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _repeat in range(repeats):
        for name, stage in stages.items():
            os.sync()
            times[name].append(seconds_of(stage))
    return {name: min(found) for name, found in times.items()}


def time_in_background(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], device: torch.device, repeats: int
) -> tuple[float, float, float]:
    """Seconds that `save` takes, until the checkpoint is whole, and that computing meanwhile is slowed by; the best."""
    saver = checkpoints.Saver(folder, World(0, 1, [device]), keep=2)
    matrix = torch.randn(512, 512, device=device)

    def products(is_busy: Callable[[], bool]) -> tuple[int, float]:
        count, started = 0, time.perf_counter()
        while is_busy():
            matrix @ matrix
            count += 1
            if count % 16 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
        return count, time.perf_counter() - started

    stalls, wholes, slowed = [], [], []
    for repeat in range(repeats):
        os.sync()
        until = time.perf_counter() + 1
        count, seconds = products(lambda until=until: time.perf_counter() < until)
        usual = count / seconds
        stalls.append(seconds_of(lambda repeat=repeat: saver.save(replace(STATE, step=repeat), tensors, report=print)))
        count, seconds = products(saver.thread.is_alive)
        wholes.append(stalls[-1] + seconds)
        slowed.append(max(0.0, seconds - count / usual))
    saver.wait()
    return min(stalls), min(wholes), min(slowed)


def seconds_of(action: Callable[[], object]) -> float:
    """How long something takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
