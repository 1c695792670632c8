"""Memory: the largest micro-batch that fits, found by trying."""

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.distributed import World, same_on_all

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""
MIN_TOKENS, MAX_TOKENS = 1024, 65_536
"""Tokens of a micro-batch on a GPU: smaller ones leave it idle, larger ones are not faster."""
SAFE_SHARE = 0.97
"""Share of the memory that is planned for; the rest is lost between blocks."""


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
    layers: int,
    try_step: Callable[[int, int], None],
) -> tuple[int, int]:
    """(token budget, layers that keep activations): the fastest pair that fits on every process's card, by measurement.

    Smaller micro-batches leave room for more layers that keep their activations, which saves computing them twice, but
    fill the card less well; so sizes are tried downwards until the next one is slower.

    Args:
        try_step: makes a full micro-batch of so many tokens go forward and backward, so many layers keeping their
            activations; raises OutOfMemoryError.
    """
    if world.device.type == "cpu":
        return max(longest_example, CPU_TOKENS), layers
    budgets = token_budgets(longest_example, largest_step)
    best, best_speed = (budgets[-1], 0), 0.0
    for budget in budgets:
        kept, trial = _most_kept_layers(world, layers, functools.partial(try_step, budget))
        if trial is None:
            continue
        if budget / trial.seconds < best_speed:
            break
        best, best_speed = (budget, kept), budget / trial.seconds
        if kept == layers:
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


@dataclass(frozen=True)
class Trial:
    """What a micro-batch took on the slowest process and on the fullest card."""

    seconds: float
    peak_bytes: float


def _most_kept_layers(world: World, layers: int, try_step: Callable[[int], None]) -> tuple[int, Trial | None]:
    """How many layers can keep their activations, and what that took; None = not even recomputing all fits."""
    if trial := measure(world, functools.partial(try_step, layers)):
        return layers, trial
    least, trial = 0, measure(world, functools.partial(try_step, 0))
    some = min(4, layers - 1)
    if trial and (more := measure(world, functools.partial(try_step, some))):
        # Memory grows by the same amount with every layer.
        each = (more.peak_bytes - trial.peak_bytes) / some
        least, trial = some, more
        kept = min(layers - 1, some + int((memory_limit(world) * SAFE_SHARE - more.peak_bytes) / each))
        while kept > some:
            if most := measure(world, functools.partial(try_step, kept)):
                return kept, most
            kept -= 1
    return least, trial


def measure(world: World, attempt: Callable[[], None]) -> Trial | None:
    """Try twice (the first time compiles and warms up), and measure the second; None = out of memory on a process."""
    seconds = peak = math.inf
    try:
        attempt()
        for device in world.devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        attempt()
        torch.cuda.synchronize(world.device)
        seconds, peak = time.perf_counter() - start, peak_memory_gb(world) * 1e9
    except torch.cuda.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    trials = [json.loads(answer) for answer in same_on_all(json.dumps([seconds, peak]))]
    trial = Trial(max(s for s, _peak in trials), max(p for _s, p in trials))
    return None if math.isinf(trial.seconds) else trial


def memory_limit(world: World) -> float:
    """Bytes that this process may take of its fullest card: what it has, what is free, and no more than its limit."""
    limits = []
    for device in world.devices:
        free, total = torch.cuda.mem_get_info(device)
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
        limits.append(min(limit, free + torch.cuda.memory_reserved(device)))
    return min(float(text) for text in same_on_all(str(min(limits))))


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
