"""Memory: the largest micro-batch that fits, found by trying; and what a run will take, estimated before it starts."""

from collections.abc import Callable, Iterator

import torch

from utils.distributed import World, same_on_all

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""


def candidate_budgets(longest_example: int, tokens_per_step: int, layers: int) -> Iterator[tuple[int, int | None]]:
    """(token budget, layers that keep activations) from the fastest to the most frugal.

    A smaller micro-batch costs less speed than computing activations a second time, so that comes last.
    """
    budgets = []
    budget = max(longest_example, min(tokens_per_step, 65_536))
    while budget > max(longest_example, 1024):
        budgets.append(budget)
        budget = max(longest_example, 1024, budget * 3 // 4)
    budgets.append(budget)
    yield from ((budget, None) for budget in budgets)
    yield from ((budget, kept) for kept in (layers // 2, 0) for budget in budgets)


def find_budget(
    world: World,
    longest_example: int,
    tokens_per_step: int,
    layers: int,
    try_step: Callable[[int, int | None], None],
) -> tuple[int, int | None]:
    """The first of `candidate_budgets` whose forward and backward pass fits on every process's card.

    Args:
        try_step: makes a full micro-batch of so many tokens go forward and backward; raises OutOfMemoryError.
    """
    if world.device.type == "cpu":
        return max(longest_example, CPU_TOKENS), None
    candidates = list(candidate_budgets(longest_example, tokens_per_step, layers))
    for budget, kept_layers in candidates:
        fits = True
        try:
            try_step(budget, kept_layers)
        except torch.cuda.OutOfMemoryError:
            fits = False
        torch.cuda.empty_cache()
        if all(answer == "fits" for answer in same_on_all("fits" if fits else "too large")):
            return budget, kept_layers
    return candidates[-1]


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
