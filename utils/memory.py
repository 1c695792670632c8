"""A card's memory: the fastest micro-batch that fits into it, found by trying; its limit, and its peak."""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

from utils.distributed import World, same_on_all

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""
MIN_TOKENS, MAX_TOKENS = 1024, 65_536
"""Tokens of a micro-batch on a GPU: smaller ones leave it idle, larger ones are not faster."""


def token_budgets(longest_example: int, largest_step: int) -> list[int]:
    """Sizes of a micro-batch to try: the largest step at once, in two, in three …, down to the longest example.

    Steps are shared out evenly, so sizes between would only waste memory.
    """
    least = max(longest_example, MIN_TOKENS)
    parts = range(max(1, math.ceil(largest_step / MAX_TOKENS)), max(1, largest_step // least) + 1)
    return [*dict.fromkeys(max(longest_example, math.ceil(largest_step / part)) for part in parts)]


def find_budget(
    world: World,
    longest_example: int,
    largest_step: int,
    kept_counts: Sequence[int],
    try_step: Callable[[int, int], None],
) -> tuple[int, int]:
    """(token budget, layers that keep activations): the fastest pair that fits on every process's card, by measurement.

    Smaller micro-batches leave room for more layers that keep their activations, which saves computing them twice, but
    fill the card less well; so sizes are tried downwards until the next one is slower.

    Args:
        kept_counts: how many layers may keep their activations, in ascending order.
        try_step: makes a full micro-batch of so many tokens go forward and backward, so many layers keeping their
            activations; raises OutOfMemoryError.
    """
    if world.device.type == "cpu":
        return max(longest_example, CPU_TOKENS), kept_counts[-1]
    budgets = token_budgets(longest_example, largest_step)
    best, best_speed = (budgets[-1], kept_counts[0]), 0.0
    for budget in budgets:
        kept, seconds = _most_kept_layers(world, kept_counts, functools.partial(try_step, budget))
        if seconds is None:
            continue
        if budget / seconds < best_speed:
            break
        best, best_speed = (budget, kept), budget / seconds
        if kept == kept_counts[-1]:
            break
    return best


def shrink_until_fits(
    world: World, longest_example: int, budget: int, kept_layers: int, try_step: Callable[[int, int], None]
) -> int:
    """The largest token budget, from `budget` down, whose micro-batch fits; see find_budget."""
    for smaller in token_budgets(longest_example, budget):
        if measure(world, functools.partial(try_step, smaller, kept_layers)):
            return smaller
    return longest_example


def _most_kept_layers(
    world: World, kept_counts: Sequence[int], try_step: Callable[[int], None]
) -> tuple[int, float | None]:
    """The most of `kept_counts` that fits, and the seconds that it takes; None = not even the least does."""
    if seconds := measure(world, functools.partial(try_step, kept_counts[-1])):
        return kept_counts[-1], seconds
    fits, too_many = 0, len(kept_counts) - 1
    seconds = measure(world, functools.partial(try_step, kept_counts[0])) if too_many else None
    while seconds and too_many - fits > 1:
        middle = (fits + too_many) // 2
        if more := measure(world, functools.partial(try_step, kept_counts[middle])):
            fits, seconds = middle, more
        else:
            too_many = middle
    # Room for one layer stays: later steps have other lengths, and lose a little between blocks.
    return kept_counts[max(0, fits - 1)], seconds


def measure(world: World, attempt: Callable[[], None]) -> float | None:
    """Seconds that `attempt` takes on the slowest process, at best; None = out of memory on one of them."""
    seconds = math.inf
    try:
        attempt()  # compiles, and finds the fastest kernels
        torch.cuda.synchronize(world.device)
        for _repeat in range(3):
            start = time.perf_counter()
            attempt()
            torch.cuda.synchronize(world.device)
            seconds = min(seconds, time.perf_counter() - start)
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
