"""Memory: the largest micro-batch that fits, found by trying."""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

from utils.distributed import World, same_on_all

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""


def token_budgets(longest_example: int, largest_step: int) -> list[int]:
    """Sizes of a micro-batch to try, from the largest step's tokens down."""
    least = max(longest_example, 1024)
    budgets = [max(longest_example, min(largest_step, 65_536))]
    while budgets[-1] > least:
        budgets.append(max(least, budgets[-1] * 3 // 4))
    return budgets


def kept_layer_counts(layers: int, recompute: bool | None = None) -> list[int]:
    """How many layers keep their activations, to try: all, then fewer; the others compute them a second time.

    Args:
        recompute: the user's choice: none keep them (True), or all (False). None = whatever is fastest.
    """
    if recompute is not None:
        return [0 if recompute else layers]
    return sorted({layers, layers * 3 // 4, layers // 2, layers // 4, 0}, reverse=True)


def find_budget(
    world: World,
    longest_example: int,
    largest_step: int,
    kept_counts: Sequence[int],
    try_step: Callable[[int, int], None],
) -> tuple[int, int]:
    """(token budget, layers that keep activations): the fastest pair that fits on every process's card, by measurement.

    Args:
        kept_counts: numbers of layers to try, see kept_layer_counts.
        try_step: makes a full micro-batch of so many tokens go forward and backward, so many layers keeping their
            activations; raises OutOfMemoryError.
    """
    if world.device.type == "cpu":
        return max(longest_example, CPU_TOKENS), kept_counts[0]
    budgets = token_budgets(longest_example, largest_step)
    best_speed, best = 0.0, (budgets[-1], kept_counts[-1])
    for kept_layers in kept_counts:
        for budget in budgets:
            seconds = _slowest_time(world, functools.partial(try_step, budget, kept_layers))
            if seconds is None:
                continue
            if budget / seconds > best_speed:
                best_speed, best = budget / seconds, (budget, kept_layers)
            if budget == budgets[0]:
                return best  # a whole step at once: recomputing more would only be slower
            break
    return best


def shrink_until_fits(
    world: World, longest_example: int, budget: int, kept_layers: int, try_step: Callable[[int, int], None]
) -> int:
    """The largest token budget, from `budget` down, whose micro-batch fits; see find_budget."""
    for smaller in token_budgets(longest_example, budget):
        if _slowest_time(world, functools.partial(try_step, smaller, kept_layers)) is not None:
            return smaller
    return longest_example


def _slowest_time(world: World, attempt: Callable[[], None]) -> float | None:
    """Seconds that `attempt` takes on the slowest process, the second time; None = out of memory."""
    seconds = 0.0
    try:
        attempt()
        torch.cuda.synchronize(world.device)
        start = time.perf_counter()
        attempt()
        torch.cuda.synchronize(world.device)
        seconds = time.perf_counter() - start
    except torch.cuda.OutOfMemoryError:
        seconds = math.inf
    torch.cuda.empty_cache()
    slowest = max(float(answer) for answer in same_on_all(str(seconds)))
    return None if math.isinf(slowest) else slowest


def limit_memory(world: World, gigabytes: float) -> None:
    """Let this process take no more than so much of each of its cards, as if they had no more (0 = no limit)."""
    for device in world.devices:
        if gigabytes and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def peak_memory_gb(world: World) -> float:
    """Most memory allocated on any card of this process so far, in GB (1e9 bytes); 0 on a CPU."""
    if world.device.type == "cpu":
        return 0.0
    return max(torch.cuda.max_memory_allocated(device) for device in world.devices) / 1e9
