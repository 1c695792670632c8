"""The micro-batch that fills the cards: found by trying, and remembered for the next run of the same kind."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.distributed import World, from_main, same_on_all

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""
MIN_TOKENS, MAX_TOKENS = 1024, 65_536
"""Tokens of a micro-batch on a GPU: smaller ones leave it idle, larger ones are not faster."""
SAFE_SHARE = 0.9
"""Share of the memory that is planned for where it can't be tried."""


def token_budgets(longest_example: int, largest_step: int) -> list[int]:
    """Sizes of a micro-batch to try: the largest step at once, in two, in three …, down to MIN_TOKENS or the longest.

    Steps are shared out evenly, so sizes between would only waste memory.
    """
    least = max(longest_example, MIN_TOKENS)
    fewest = max(1, math.ceil(largest_step / MAX_TOKENS))
    parts = range(fewest, max(fewest, largest_step // least) + 1)
    return [*dict.fromkeys(max(longest_example, math.ceil(largest_step / part)) for part in parts)]


def cards_of(world: World) -> list[list[Any]]:
    """Name and bytes of each of the process's cards; none on a CPU."""
    if world.device.type == "cpu":
        return []
    cards = [torch.cuda.get_device_properties(device) for device in world.devices]
    return [[card.name, card.total_memory] for card in cards]


@dataclass(frozen=True)
class Search:
    """The search for a run's micro-batch.

    Attributes:
        longest_example: its tokens.
        largest_step: most tokens of a step, this process's share.
        kept_counts: how many layers may keep their activations, in ascending order.
        try_step: makes a full micro-batch of so many tokens go forward and backward, so many layers keeping their
            activations; raises OutOfMemoryError.
        is_sharded: a process that ran out of memory amid a sharded pass would leave the others waiting for it.
    """

    world: World
    longest_example: int
    largest_step: int
    kept_counts: Sequence[int]
    try_step: Callable[[int, int], None]
    is_sharded: bool = False

    def best(self, kind: str) -> tuple[int, int]:
        """(token budget, layers that keep activations): what is fastest of all that fits on every process's card.

        Where an earlier run of the same kind has an answer that still fits, and about as much memory is free now, that
        is it. The answers lie in ~/.cache/llama2-chinese (or beneath XDG_CACHE_HOME).

        Args:
            kind: a name for all that the answer depends on.
        """
        if self.world.device.type == "cpu":
            return max(self.longest_example, CPU_TOKENS), self.kept_counts[-1]
        known, free = None, _memory_limit(self.world)
        with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):
            known = json.loads(_cache_file(kind).read_text())
        known = from_main(known)  # machines may have files of their own
        if known and 0.9 * free <= known["free"] <= 1.1 * free:
            tokens, kept = known["micro_batch"]
            if self.is_sharded or self._seconds(tokens, kept):
                return tokens, kept
        found = self.by_extrapolation() if self.is_sharded else self.by_trying()
        with contextlib.suppress(OSError, RuntimeError):  # a home that can't be written to costs the next start seconds
            if self.world.is_main:
                _cache_file(kind).parent.mkdir(parents=True, exist_ok=True)
                _cache_file(kind).write_text(json.dumps({"micro_batch": found, "free": free}))
        return found

    def by_trying(self) -> tuple[int, int]:
        """The answer by measurement.

        Smaller micro-batches leave room for more layers that keep their activations, which saves computing them twice,
        but fill the card less well; so sizes are tried downwards until the next one is slower.
        """
        budgets = token_budgets(self.longest_example, self.largest_step)
        best, best_speed = (budgets[-1], self.kept_counts[0]), 0.0
        for budget in budgets:
            kept, seconds = self._most_kept_layers(budget)
            if seconds is None:
                continue
            if budget / seconds < best_speed:
                break
            best, best_speed = (budget, kept), budget / seconds
            if kept == self.kept_counts[-1]:
                break
        return best

    def by_extrapolation(self) -> tuple[int, int]:
        """The answer from the memory that small micro-batches take, and by a rule of thumb for the speed."""
        kept_counts = self.kept_counts
        few, least, some = (
            max(self.longest_example, MIN_TOKENS // 4),
            kept_counts[0],
            kept_counts[len(kept_counts) // 2],
        )
        limit = SAFE_SHARE * _memory_limit(self.world)
        self.try_step(few, least)  # from here on the optimizer's state is there, and workspaces
        fixed, growth = {}, {}
        for kept in (least, some):
            once, twice = (_peak(self.world, functools.partial(self.try_step, n, kept)) for n in (few, 2 * few))
            growth[kept] = (twice - once) / few
            fixed[kept] = once - growth[kept] * few

        def estimate(tokens: int, kept: int) -> float:
            share = (kept - least) / max(1, some - least)
            start, slope = (line[least] + share * (line[some] - line[least]) for line in (fixed, growth))
            return start + slope * tokens

        budgets = token_budgets(self.longest_example, self.largest_step)
        fitting = [(b, kept) for b in budgets for kept in kept_counts if estimate(b, kept) <= limit]
        layers = max(1, kept_counts[-1])
        return max(
            fitting,
            key=lambda pair: relative_speed(pair[1] / layers, pair[0]),
            default=(self.longest_example, kept_counts[0]),
        )

    def shrunk(self, budget: int, kept_layers: int) -> int:
        """The largest token budget, from `budget` down, whose micro-batch fits."""
        for smaller in token_budgets(self.longest_example, budget):
            if self._seconds(smaller, kept_layers):
                return smaller
        return self.longest_example

    def _most_kept_layers(self, budget: int) -> tuple[int, float | None]:
        """The most of `kept_counts` that fits, and the seconds that takes; None = not even the least does."""
        kept_counts = self.kept_counts
        if seconds := self._seconds(budget, kept_counts[-1]):
            return kept_counts[-1], seconds
        fits, too_many = 0, len(kept_counts) - 1
        seconds = self._seconds(budget, kept_counts[0]) if too_many else None
        while seconds and too_many - fits > 1:
            middle = (fits + too_many) // 2
            if more := self._seconds(budget, kept_counts[middle]):
                fits, seconds = middle, more
            else:
                too_many = middle
        # Room for one layer stays: later steps have other lengths, and lose a little between blocks.
        return kept_counts[max(0, fits - 1)], seconds

    def _seconds(self, budget: int, kept_layers: int) -> float | None:
        return measure(self.world, functools.partial(self.try_step, budget, kept_layers))


def _cache_file(kind: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2-chinese" / f"{kind}.json"


def relative_speed(kept_share: float, tokens: int) -> float:
    """Speed of a micro-batch: recomputing costs half a pass again, and small products fill a card badly."""
    return tokens / (tokens + 300) / (1 + (1 - kept_share) / 2)


def _peak(world: World, attempt: Callable[[], None]) -> float:
    """The most bytes that `attempt` takes of any process's card."""
    for device in world.devices:
        torch.cuda.reset_peak_memory_stats(device)
    attempt()
    peak = max(torch.cuda.max_memory_allocated(device) for device in world.devices)
    return max(float(answer) for answer in same_on_all(str(peak)))


def _memory_limit(world: World) -> float:
    """Bytes that every process may take of its card: no more than its limit, and what is free."""
    limits = []
    for device in world.devices:
        free, total = torch.cuda.mem_get_info(device)
        own = free + torch.cuda.memory_reserved(device)
        limits.append(min(own, torch.cuda.get_per_process_memory_fraction(device) * total))
    return min(float(answer) for answer in same_on_all(str(min(limits))))


def _wait_for(world: World) -> None:
    for device in world.devices:
        torch.cuda.synchronize(device)


def measure(world: World, attempt: Callable[[], None]) -> float | None:
    """Seconds that `attempt` takes on the slowest process, at best; None = out of memory on one of them."""
    seconds = math.inf
    try:
        attempt()  # compiles, and finds the fastest kernels
        _wait_for(world)
        for _repeat in range(3):
            start = time.perf_counter()
            attempt()
            _wait_for(world)
            seconds = min(seconds, time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        seconds = math.inf
    torch.cuda.empty_cache()
    slowest = max(float(answer) for answer in same_on_all(str(seconds)))
    return None if math.isinf(slowest) else slowest
