"""What an attempt takes: seconds, bytes, or more memory than there is."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from utils.machine.memory import give_back, wait_for
from utils.machine.world import World, gathered_from_all

MEASURED_SECONDS = 1.0
"""For so long an attempt is repeated; the fastest counts."""


def cards_of(world: World) -> list[list[Any]]:
    """Name and bytes of each of the process's cards; none on a CPU."""
    if world.device.type == "cpu":
        return []
    cards = [torch.cuda.get_device_properties(device) for device in world.devices]
    return [[card.name, card.total_memory] for card in cards]


def peak_of(world: World, attempt: Callable[[], None]) -> float:
    """The most bytes that `attempt` takes of any process's card."""
    for device in world.devices:
        torch.cuda.reset_peak_memory_stats(device)
    attempt()
    peak = max(torch.cuda.max_memory_allocated(device) for device in world.devices)
    return max(gathered_from_all(float(peak)))


def memory_limit(world: World) -> float:
    """Bytes that every process may take of its card: no more than its limit, and what is free."""
    limits = []
    for device in world.devices:
        free, total = torch.cuda.mem_get_info(device)
        own = free + torch.cuda.memory_reserved(device)
        limits.append(min(own, torch.cuda.get_per_process_memory_fraction(device) * total))
    return min(gathered_from_all(float(min(limits))))


def fits(world: World, attempt: Callable[[], None]) -> bool:
    """Whether the memory of every process's cards suffices for `attempt`."""
    return measure(world, attempt, repeat_for=0.0) is not None


def measure(world: World, attempt: Callable[[], None], repeat_for: float = MEASURED_SECONDS) -> float | None:
    """Seconds that `attempt` takes on the slowest process, at best; None = out of memory on one of them.

    Args:
        repeat_for: seconds for which it is repeated after the first time, which compiles and finds the fastest kernels.
    """

    def once() -> float:
        start = time.perf_counter()
        attempt()
        wait_for(world.devices)
        return time.perf_counter() - start

    try:
        seconds = once()
        until = time.perf_counter() + repeat_for
        while time.perf_counter() < until:
            seconds = min(seconds, once())
    except torch.cuda.OutOfMemoryError:
        seconds = math.inf
    give_back(world.devices)
    slowest = max(gathered_from_all(seconds))
    return None if math.isinf(slowest) else slowest
