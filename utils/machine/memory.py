"""What a process takes of its cards' memory, and what the machine has."""

import contextlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from utils.machine.world import World


def limit_bytes(gigabytes: float) -> float:
    """A limit that a user gives in GB (1e9 bytes), in bytes; infinite for 0, which means none."""
    return gigabytes * 1e9 or math.inf


def limit_memory(world: World, gigabytes: float) -> None:
    """Let this process take no more than so much of each of its cards, as if they had no more (0 = no limit)."""
    for device in world.devices:
        if gigabytes and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def forget_peak(world: World) -> None:
    """Let peak_memory_gb count from here on: what the search for the step plan tried is no part of the training."""
    if world.device.type == "cuda":
        for device in world.devices:
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(world: World) -> float:
    """Most memory allocated on any card of this process so far, in GB (1e9 bytes); 0 on a CPU."""
    if world.device.type == "cpu":
        return 0.0
    return max(torch.cuda.max_memory_allocated(device) for device in world.devices) / 1e9


def free_main_memory(system: Path = Path("/")) -> float:
    """Bytes of main memory that this process may still take; infinite where the system does not say.

    In a container that is what its limit leaves, with the file cache that the kernel would give up.

    Args:
        system: the root of the file system.
    """
    rooms = [math.inf]
    with contextlib.suppress(OSError):
        for line in (system / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(int(line.split()[1]) * 1024)
    groups = system / "sys/fs/cgroup"
    for limit, taken, cache, folder in (
        ("memory.max", "memory.current", "inactive_file", groups),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", groups / "memory"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or "max": no limit
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / taken).read_text()) - int(statistics[cache])
            rooms.append(max(0, int((folder / limit).read_text()) - used))
    return min(rooms)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until cards have done all that they were told."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def give_back(devices: Iterable[torch.device]) -> None:
    """Give cards back the memory that torch holds in reserve, once they have done all that they were told.

    An attempt that ran out of memory may have left copies under way, from and to memory that would be unmapped.
    """
    wait_for(devices)
    torch.cuda.empty_cache()


def give_back_host() -> None:
    """Give the system back the pinned memory that torch holds in reserve; to pin it again takes seconds."""
    with contextlib.suppress(AttributeError):  # no part of torch's public interface, and not in builds for CPUs
        torch._C._host_emptyCache()


def pinned_for(device: torch.device, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What `make` makes in main memory, to be filled from `device`: pinned if that is a card and the system allows it.

    Args:
        make: takes pin_memory=True.
    """
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # copies into other memory are right too, and slower
            return make(pin_memory=True)
    return make()
