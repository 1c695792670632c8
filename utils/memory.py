"""What a process takes of its cards' memory, and what the machine has."""

import math
from pathlib import Path

import torch

from utils.distributed import World


def limit_memory(world: World, gigabytes: float) -> None:
    """Let this process take no more than so much of each of its cards, as if they had no more (0 = no limit)."""
    for device in world.devices:
        if gigabytes and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def forget_peak(world: World) -> None:
    """Let peak_memory_gb count from here on: what the search for the micro-batch tried is no part of the training."""
    if world.device.type == "cuda":
        for device in world.devices:
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(world: World) -> float:
    """Most memory allocated on any card of this process so far, in GB (1e9 bytes); 0 on a CPU."""
    if world.device.type == "cpu":
        return 0.0
    return max(torch.cuda.max_memory_allocated(device) for device in world.devices) / 1e9


def free_main_memory() -> float:
    """Bytes of main memory that are free; infinite where the system does not say."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf
