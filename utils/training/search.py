"""The micro-batch that fills the cards: found by trying, and remembered for the next run of the same kind."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.machine.memory import give_back, give_back_host, wait_for
from utils.machine.world import World, from_main, same_on_all
from utils.model.activations import HostMemory, MicroBatch
from utils.rows.packing import StepTokens

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""
MIN_TOKENS, MAX_TOKENS = 1024, 65_536
"""Tokens of a micro-batch on a GPU: smaller ones leave it idle, larger ones are not faster."""
MEASURED_SECONDS = 1.0
"""For so long an attempt is repeated; the fastest counts."""
WON_BACK_WITHIN = 120.0
"""Seconds of training within which offloading must win back what it costs to pin the memory."""
SAFE_SHARE = 0.9
"""Share of the memory that is planned for where it can't be tried."""


def token_budgets(longest_example: int, largest_step: int, shared: int) -> list[int]:
    """Sizes of a micro-batch to try: the largest step at once, in two, in three …, down to MIN_TOKENS or the longest.

    Steps are shared out evenly, so sizes between would only waste memory.

    Args:
        shared: of the step's tokens, those that any of its rows may have.
    """
    own, least = largest_step - shared, max(longest_example, MIN_TOKENS)
    fewest = max(1, math.ceil(own / (MAX_TOKENS - shared)))
    parts = range(fewest, max(fewest, own // (least - shared)) + 1)
    return [*dict.fromkeys(max(longest_example, math.ceil(own / part) + shared) for part in parts)]


def rows_of(step: int, token_budget: int, shared: int) -> int:
    """Rows that a step of so many tokens is cut into, where each may have `shared` of them."""
    return math.ceil((step - shared) / (token_budget - shared))


def cards_of(world: World) -> list[list[Any]]:
    """Name and bytes of each of the process's cards; none on a CPU."""
    if world.device.type == "cpu":
        return []
    cards = [torch.cuda.get_device_properties(device) for device in world.devices]
    return [[card.name, card.total_memory] for card in cards]


def rows_together(cards: int, rows: int) -> int:
    """How many of a step's rows go forward one after another before the first goes backward.

    Over several cards two for each, so that one card works on a row while the next works on the row before (the
    schedule of GPipe, Huang et al. 2019). Cards work off what they are told without being waited for, so the order in
    which rows are sent is all that it takes.
    """
    return min(2 * cards if cards > 1 else 1, rows)


@dataclass(frozen=True)
class Search:
    """The search for a run's micro-batch.

    Attributes:
        longest_example: its tokens.
        step: what this process has of a step.
        kept_counts: how many layers may keep their activations, in ascending order; the last number is all.
        try_step: makes rows, so many tokens each and so many of them, go forward and backward as a micro-batch says;
            raises OutOfMemoryError.
        is_sharded: a process that ran out of memory amid a sharded pass would leave the others waiting for it.
        host: where activations may wait; None = nowhere.
    """

    world: World
    longest_example: int
    step: StepTokens
    kept_counts: Sequence[int]
    try_step: Callable[[MicroBatch, int, int], None]
    is_sharded: bool = False
    host: HostMemory | None = None

    def best(self, kind: str) -> MicroBatch:
        """What is fastest of all that fits on every process's card.

        Where an earlier run of the same kind has an answer that still fits, and about as much memory is free now, that
        is it. The answers lie in ~/.cache/llama2-chinese (or beneath XDG_CACHE_HOME).

        Args:
            kind: a name for all that the answer depends on.
        """
        if self.world.device.type == "cpu":
            return MicroBatch(max(self.longest_example, CPU_TOKENS), self.kept_counts[-1])
        known, free = None, _memory_limit(self.world)
        with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):
            known = json.loads(_cache_file(kind).read_text())
        known = from_main(known)  # machines may have files of their own
        if known and 0.9 * free <= known["free"] <= 1.1 * free:
            micro_batch = MicroBatch(*known["micro_batch"])
            if self.is_sharded or (self.has_host_memory(micro_batch) and self._fits(micro_batch)):
                return micro_batch
        found = self.by_extrapolation() if self.is_sharded else self.by_trying()
        with contextlib.suppress(OSError, RuntimeError):  # a home that can't be written to costs the next start seconds
            if self.world.is_main:
                _cache_file(kind).parent.mkdir(parents=True, exist_ok=True)
                _cache_file(kind).write_text(json.dumps({"micro_batch": found, "free": free}))
        return found

    def by_trying(self) -> MicroBatch:
        """The answer by measurement.

        Smaller micro-batches leave room for more layers that keep their activations, which saves computing them twice,
        but fill the card less well; so sizes are tried downwards until the next one is slower. Offloading is tried with
        all of them, at the end: it needs room for a layer, which the largest may not have, and gives more than smaller
        ones lose. (What was pinned last is what the first step finds.)
        """
        budgets, every_layer = self._token_budgets(self.step.largest), self.kept_counts[-1]
        cards = len(self.world.devices)
        tried = [
            (budget, rows_together(cards, rows_of(self.step.largest, budget, self.step.shared))) for budget in budgets
        ]
        if cards > 1:
            tried.append((budgets[-1], 1))
        best, best_speed = MicroBatch(budgets[-1], self.kept_counts[0]), 0.0
        measured: list[tuple[MicroBatch, float]] = []
        for budget, rows in tried:
            kept = self._most_kept_layers(MicroBatch(budget, 0, rows=rows))
            if kept is None:
                continue
            micro_batch = MicroBatch(budget, kept, rows=rows)
            if kept == every_layer and not best_speed and cards == 1:
                return micro_batch
            speed = self._speed(micro_batch)
            measured.append((micro_batch, speed))
            if best_speed and speed <= best_speed:
                break
            best, best_speed = micro_batch, speed
            if kept == every_layer and cards == 1:
                break
        if not best_speed:
            return best
        for micro_batch, speed in [each for each in reversed(measured) if each[0].rows == best.rows]:
            give_back_host()  # another size needs other pieces
            for candidate, promised in self._with_offloading(micro_batch, speed):
                won = (1 - best_speed / promised) * WON_BACK_WITHIN
                if won <= self.host.pin_seconds * self._pinned_bytes(candidate) or not self._fits(candidate):
                    continue
                if (offloading := self._speed(candidate)) > best_speed:
                    best, best_speed = candidate, offloading
        if not best.offload_every or best.token_budget != micro_batch.token_budget:
            give_back_host()  # what was pinned last is not what the run will use
        return best

    def by_extrapolation(self) -> MicroBatch:
        """The answer from the memory that small micro-batches take, and by a rule of thumb for the speed."""
        kept_counts = self.kept_counts
        few, least, some = (
            max(self.longest_example, MIN_TOKENS // 4),
            kept_counts[0],
            kept_counts[len(kept_counts) // 2],
        )
        limit = SAFE_SHARE * _memory_limit(self.world)
        self.try_step(MicroBatch(few, least), few, 1)  # from here on optimizer's state and workspaces are there
        fixed, growth = {}, {}
        for kept in (least, some):
            once, twice = (
                _peak(self.world, functools.partial(self.try_step, MicroBatch(n, kept), n, 1)) for n in (few, 2 * few)
            )
            growth[kept] = (twice - once) / few
            fixed[kept] = once - growth[kept] * few

        def estimate(tokens: int, kept: int) -> float:
            share = (kept - least) / max(1, some - least)
            start, slope = (line[least] + share * (line[some] - line[least]) for line in (fixed, growth))
            return start + slope * tokens

        budgets = self._token_budgets(self.step.largest)
        fitting = [MicroBatch(b, kept) for b in budgets for kept in kept_counts if estimate(b, kept) <= limit]
        layers = max(1, kept_counts[-1])
        return max(
            fitting,
            key=lambda found: relative_speed(found.kept_layers / layers, found.token_budget),
            default=MicroBatch(self.longest_example, kept_counts[0]),
        )

    def shrunk(self, micro_batch: MicroBatch) -> MicroBatch:
        """The same with the largest token budget, from its own down, that fits."""
        for budget in self._token_budgets(micro_batch.token_budget):
            if self._fits(smaller := micro_batch._replace(token_budget=budget)):
                return smaller
        return micro_batch._replace(token_budget=self.longest_example)

    def _token_budgets(self, step: int) -> list[int]:
        return token_budgets(self.longest_example, step, self.step.shared)

    def _most_kept_layers(self, micro_batch: MicroBatch) -> int | None:
        """The most of `kept_counts` that fits; None = not even the least does."""

        def fits_with(count: int) -> bool:
            return self._fits(micro_batch._replace(kept_layers=count))

        kept_counts = self.kept_counts
        if fits_with(kept_counts[-1]):
            return kept_counts[-1]
        fits, too_many = 0, len(kept_counts) - 1
        if not too_many or not fits_with(kept_counts[0]):
            return None
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if fits_with(kept_counts[middle]):
                fits = middle
            else:
                too_many = middle
        # Room for one layer stays: later steps have other lengths, and lose a little between blocks.
        return kept_counts[max(0, fits - 1)]

    def _with_offloading(self, micro_batch: MicroBatch, speed: float) -> Iterator[tuple[MicroBatch, float]]:
        """This one, of so many tokens/s, with activations in host memory; and its tokens/s if copies cost nothing."""
        every_layer = self.kept_counts[-1]
        if not self.host or micro_batch.kept_layers == every_layer or not speed:
            return
        # The copy of a layer's takes as long as the forward passes of `pace` layers. A step is a forward pass of all
        # layers, another of those that recompute, and over frozen weights a backward pass costs about the same. Several
        # cards share the layers, and each has its own way to the host.
        layer_passes = 3 * every_layer - micro_batch.kept_layers
        pace = self.host.seconds * speed * layer_passes / len(self.world.devices)
        if not math.isfinite(pace):
            return
        # The activations of one offloaded layer are still on the card when the others begin to keep theirs.
        kept = max(self.kept_counts[0], micro_batch.kept_layers - 1)
        # With less room than that takes, fewer layers are offloaded.
        others = every_layer - kept
        affordable = math.floor(min(others, self.host.room / (micro_batch.rows * self._host_bytes(micro_batch))))
        least = math.ceil(others / max(1, affordable))
        for every in sorted({max(1, least, round(pace)), max(least, math.ceil(pace))}):
            candidate = micro_batch._replace(kept_layers=kept, offload_every=every)
            promised = speed * layer_passes / (3 * every_layer - kept - candidate.offloads(others))
            if self.has_host_memory(candidate):
                yield candidate, promised

    def has_host_memory(self, micro_batch: MicroBatch) -> bool:
        """Whether what its layers offload finds room there."""
        return self._pinned_bytes(micro_batch) <= (self.host.room if self.host else 0)

    def _pinned_bytes(self, micro_batch: MicroBatch) -> int:
        """What its layers take in host memory."""
        offloaded = micro_batch.offloads(self.kept_counts[-1] - micro_batch.kept_layers)
        return micro_batch.rows * offloaded * self._host_bytes(micro_batch)

    def _host_bytes(self, micro_batch: MicroBatch) -> int:
        """What one layer of a full row takes in host memory."""
        return self.host.bytes_of(micro_batch.token_budget) if self.host else 0

    def _fits(self, micro_batch: MicroBatch) -> bool:
        """Whether full rows find room."""
        attempt = functools.partial(self.try_step, micro_batch, micro_batch.token_budget, micro_batch.rows)
        return fits(self.world, attempt)

    def _speed(self, micro_batch: MicroBatch) -> float:
        """Tokens/s of a usual step's rows, the shared ones not counted; 0 = out of memory."""
        _largest, mean, shared = self.step
        rows = rows_of(mean, micro_batch.token_budget, shared)
        tokens = max(self.longest_example, math.ceil((mean - shared) / rows) + shared)
        together = min(rows, micro_batch.rows)
        seconds = measure(self.world, functools.partial(self.try_step, micro_batch, tokens, together))
        return (tokens - shared) * together / seconds if seconds else 0.0


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
    slowest = max(float(answer) for answer in same_on_all(str(seconds)))
    return None if math.isinf(slowest) else slowest
