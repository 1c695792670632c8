"""The step plan that fills the cards: found by trying, and remembered for the next run of the same kind."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.machine.memory import give_back_host
from utils.machine.world import World, from_main
from utils.rows.packing import StepTokens
from utils.training.measuring import fits, measure, memory_limit, peak_of
from utils.training.step_plan import (
    MIN_TOKENS,
    HostMemory,
    StepPlan,
    cpu_plan,
    relative_speed,
    rows_of,
    sizes_to_try,
    token_budgets,
)

WON_BACK_WITHIN = 120.0
"""Seconds of training within which offloading must win back what it costs to pin the memory."""
SAFE_SHARE = 0.9
"""Share of the memory that is planned for where it can't be tried."""


@dataclass(frozen=True)
class Search:
    """The search for a run's step plan.

    Attributes:
        longest_example: its tokens.
        step: what this process has of a step.
        kept_counts: how many layers may keep their activations, in ascending order; the last number is all.
        try_step: makes rows, so many tokens each and so many of them, go forward and backward as a step plan says;
            raises OutOfMemoryError.
        is_sharded: a process that ran out of memory amid a sharded pass would leave the others waiting for it.
        host: where activations may wait; None = nowhere.
    """

    world: World
    longest_example: int
    step: StepTokens
    kept_counts: Sequence[int]
    try_step: Callable[[StepPlan, int, int], None]
    is_sharded: bool = False
    host: HostMemory | None = None

    def best(self, key: str) -> StepPlan:
        """The fastest step plan of all that fit on every process's cards.

        Where an earlier run of the same kind has an answer that still fits, and about as much memory is free now, that
        is it. The answers lie in ~/.cache/llama2-chinese/step-plans (or beneath XDG_CACHE_HOME).

        Args:
            key: a name for all that the answer depends on.
        """
        if self.world.device.type == "cpu":
            return cpu_plan(self.longest_example, self.kept_counts[-1])
        free = memory_limit(self.world)
        known = from_main(_remembered(key, free))  # machines may have files of their own
        if known and (self.is_sharded or (self.has_host_memory(known) and self._fits(known))):
            return known
        found = self.by_extrapolation() if self.is_sharded else self.by_trying()
        if self.world.is_main:
            _remember(key, found, free)
        return found

    def by_trying(self) -> StepPlan:
        """The best step plan, by measurement.

        Smaller rows leave room for more layers that keep their activations, which saves computing them twice,
        but fill the card less well; so sizes are tried downwards until the next one is slower.
        """
        measured = self._measured_sizes()
        if not measured:
            return StepPlan(self._token_budgets(self.step.largest)[-1], self.kept_counts[0])
        fastest = max(measured, key=lambda each: each.speed)
        # Without a speed (memory gave out while it was measured) the smallest is the safest.
        return self._offloading_where_faster(fastest, measured) if fastest.speed else measured[-1].step_plan

    def _measured_sizes(self) -> list["_Measured"]:
        """Sizes from the largest down, each with as many layers that keep their activations as fit, and its speed.

        The last one is slower than the one before, or the first in which all layers keep theirs. If that is the
        largest, nothing needs to be measured.
        """
        cards, every_layer = len(self.world.devices), self.kept_counts[-1]
        sizes = sizes_to_try(self.longest_example, self.step, cards)
        if cards > 1:
            smallest, _rows = sizes[-1]
            sizes.append((smallest, 1))
        measured: list[_Measured] = []
        for budget, rows in sizes:
            kept = self._most_kept_layers(StepPlan(budget, 0, rows=rows))
            if kept is None:
                continue
            step_plan = StepPlan(budget, kept, rows=rows)
            keeps_all = kept == every_layer and cards == 1
            before = max((each.speed for each in measured), default=0.0)
            if keeps_all and not before:
                return [_Measured(step_plan, math.inf)]
            measured.append(_Measured(step_plan, self._speed(step_plan)))
            if keeps_all or (before and measured[-1].speed <= before):
                break
        return measured

    def _offloading_where_faster(self, fastest: "_Measured", measured: Sequence["_Measured"]) -> StepPlan:
        """The fastest plan, or one whose activations partly wait in host memory, if that is faster.

        Offloading is tried with all sizes that were measured: it needs room for a layer, which the largest may not
        have, and gives more than smaller ones lose.
        """
        alike = [each for each in reversed(measured) if each.step_plan.rows == fastest.step_plan.rows]
        for step_plan, speed in alike:
            give_back_host()  # another size needs other pieces
            for candidate, promised in self._with_offloading(step_plan, speed):
                won = (1 - fastest.speed / promised) * WON_BACK_WITHIN
                if won <= self.host.pin_seconds * self._pinned_bytes(candidate) or not self._fits(candidate):
                    continue
                offloading = _Measured(candidate, self._speed(candidate))
                fastest = max(fastest, offloading, key=lambda each: each.speed)
        best, pinned_last = fastest.step_plan, alike[-1].step_plan
        if not best.offload_every or best.token_budget != pinned_last.token_budget:
            give_back_host()  # what was pinned last is not what the first step finds
        return best

    def by_extrapolation(self) -> StepPlan:
        """The best step plan, from the memory that small rows take and by a rule of thumb for the speed."""
        kept_counts = self.kept_counts
        few, least, some = (
            max(self.longest_example, MIN_TOKENS // 4),
            kept_counts[0],
            kept_counts[len(kept_counts) // 2],
        )
        limit = SAFE_SHARE * memory_limit(self.world)
        self.try_step(StepPlan(few, least), few, 1)  # from here on optimizer's state and workspaces are there
        fixed, growth = {}, {}
        for kept in (least, some):
            once, twice = (
                peak_of(self.world, functools.partial(self.try_step, StepPlan(n, kept), n, 1)) for n in (few, 2 * few)
            )
            growth[kept] = (twice - once) / few
            fixed[kept] = once - growth[kept] * few

        def estimate(tokens: int, kept: int) -> float:
            share = (kept - least) / max(1, some - least)
            start, slope = (line[least] + share * (line[some] - line[least]) for line in (fixed, growth))
            return start + slope * tokens

        budgets = self._token_budgets(self.step.largest)
        fitting = [StepPlan(b, kept) for b in budgets for kept in kept_counts if estimate(b, kept) <= limit]
        layers = max(1, kept_counts[-1])
        return max(
            fitting,
            key=lambda found: relative_speed(found.kept_layers / layers, found.token_budget),
            default=StepPlan(self.longest_example, kept_counts[0]),
        )

    def shrunk(self, step_plan: StepPlan) -> StepPlan:
        """The step plan with the largest token budget, from its own down, that fits."""
        for budget in self._token_budgets(step_plan.token_budget):
            if self._fits(smaller := step_plan._replace(token_budget=budget)):
                return smaller
        return step_plan._replace(token_budget=self.longest_example)

    def _token_budgets(self, step: int) -> list[int]:
        return token_budgets(self.longest_example, step, self.step.shared)

    def _most_kept_layers(self, step_plan: StepPlan) -> int | None:
        """The most of `kept_counts` that fits; None = not even the least does."""

        def fits_with(count: int) -> bool:
            return self._fits(step_plan._replace(kept_layers=count))

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

    def _with_offloading(self, step_plan: StepPlan, speed: float) -> Iterator[tuple[StepPlan, float]]:
        """A step plan of `speed` tokens/s with activations in host memory; and its tokens/s if copies cost nothing."""
        every_layer = self.kept_counts[-1]
        if not self.host or step_plan.kept_layers == every_layer or not speed:
            return
        # The copy of a layer's takes as long as the forward passes of `pace` layers. A step is a forward pass of all
        # layers, another of those that recompute, and over frozen weights a backward pass costs about the same. Several
        # cards share the layers, and each has its own way to the host.
        layer_passes = 3 * every_layer - step_plan.kept_layers
        pace = self.host.seconds * speed * layer_passes / len(self.world.devices)
        if not math.isfinite(pace):
            return
        # The activations of one offloaded layer are still on the card when the others begin to keep theirs.
        kept = max(self.kept_counts[0], step_plan.kept_layers - 1)
        # With less room than that takes, fewer layers are offloaded.
        others = every_layer - kept
        affordable = math.floor(min(others, self.host.room / (step_plan.rows * self._host_bytes(step_plan))))
        least = math.ceil(others / max(1, affordable))
        for every in sorted({max(1, least, round(pace)), max(least, math.ceil(pace))}):
            candidate = step_plan._replace(kept_layers=kept, offload_every=every)
            promised = speed * layer_passes / (3 * every_layer - kept - candidate.offloads(others))
            if self.has_host_memory(candidate):
                yield candidate, promised

    def has_host_memory(self, step_plan: StepPlan) -> bool:
        """Whether host memory has room for what a step plan's layers offload."""
        return self._pinned_bytes(step_plan) <= (self.host.room if self.host else 0)

    def _pinned_bytes(self, step_plan: StepPlan) -> int:
        """Bytes that a step plan's layers take in host memory."""
        offloaded = step_plan.offloads(self.kept_counts[-1] - step_plan.kept_layers)
        return step_plan.rows * offloaded * self._host_bytes(step_plan)

    def _host_bytes(self, step_plan: StepPlan) -> int:
        """Bytes that one layer of a full row takes in host memory."""
        return self.host.bytes_of(step_plan.token_budget) if self.host else 0

    def _fits(self, step_plan: StepPlan) -> bool:
        """Whether full rows of a step plan find room on the cards."""
        attempt = functools.partial(self.try_step, step_plan, step_plan.token_budget, step_plan.rows)
        return fits(self.world, attempt)

    def _speed(self, step_plan: StepPlan) -> float:
        """Tokens/s of a usual step's rows, the shared ones not counted; 0 = out of memory."""
        _largest, mean, shared = self.step
        rows = rows_of(mean, step_plan.token_budget, shared)
        tokens = max(self.longest_example, math.ceil((mean - shared) / rows) + shared)
        together = min(rows, step_plan.rows)
        seconds = measure(self.world, functools.partial(self.try_step, step_plan, tokens, together))
        return (tokens - shared) * together / seconds if seconds else 0.0


class _Measured(NamedTuple):
    """A step plan and its speed, tokens/s; 0 = memory gave out."""

    step_plan: StepPlan
    speed: float


def _cache_file(key: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llama2-chinese" / "step-plans" / f"{key}.json"


def _remembered(key: str, free: float) -> StepPlan | None:
    """The answer of an earlier run that had about as much memory; None = there is none, or it can't be read."""
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError
    ):
        known = json.loads(_cache_file(key).read_text(encoding="utf-8"))
        step_plan = StepPlan(**{name: int(value) for name, value in known["step_plan"].items()})
        is_possible = min(step_plan) >= 0 and step_plan.token_budget and step_plan.rows
        if is_possible and 0.9 * free <= known["free"] <= 1.1 * free:
            return step_plan
    return None


def _remember(key: str, step_plan: StepPlan, free: float) -> None:
    """Keep an answer for later runs; a home that can't be written to costs the next start seconds."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _cache_file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step_plan": step_plan._asdict(), "free": free}), encoding="utf-8")
