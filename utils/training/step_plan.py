"""How a step is cut into rows, and what their layers do with their activations.

(utils/training/search.py finds the plan, `share_out` of utils/rows/packing.py cuts a step by it.)
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from utils.machine.memory import pinned_for
from utils.model.activations import Activations, Kept, Offloaded, Recomputed
from utils.rows.packing import StepTokens
from utils.rows.segments import ROW_MULTIPLE


class HostMemory(NamedTuple):
    """Main memory for offloaded activations.

    Attributes:
        room: bytes.
        bytes_of: how many a layer takes in a row of so many tokens.
        seconds: that the copy of a token's activations takes.
        pin_seconds: that it takes to pin a byte.
    """

    room: float
    bytes_of: Callable[[int], int]
    seconds: float
    pin_seconds: float = 0.0


def host_seconds(device: torch.device, size: int = 2**25) -> tuple[float, float]:
    """How long the copy of a byte from the card to host memory takes (infinite: no room), and how long to pin one."""
    seconds = [math.inf]
    start = time.perf_counter()
    on_host = pinned_for(device, functools.partial(torch.empty, 8 * size, dtype=torch.uint8))[:size]
    pinning = (time.perf_counter() - start) / (8 * size)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        on_card = torch.empty(size, dtype=torch.uint8, device=device)
        for _repeat in range(5):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            on_host.copy_(on_card, non_blocking=True)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / size, pinning


class StepPlan(NamedTuple):
    """How a step is cut into rows, and what their layers do with their activations.

    Attributes:
        token_budget: most tokens of a row.
        kept_layers: how many layers of such a row, from the last, keep theirs; of a shorter one more, for as many
            tokens in all.
        offload_every: of the other layers, every so many-th lets them wait in host memory; 0 = none. The rest compute
            them again.
        rows: how many go forward one after another before the first goes backward; see rows_together.
    """

    token_budget: int
    kept_layers: int
    offload_every: int = 0
    rows: int = 1

    def keeps(self, tokens: int, layers: int) -> int:
        """How many of a row's layers keep their activations."""
        full = math.ceil(self.token_budget / ROW_MULTIPLE) * ROW_MULTIPLE
        return min(layers, self.kept_layers * max(full, tokens) // tokens)

    def offloads(self, others: int) -> int:
        """How many of the `others`, the layers that do not keep their activations, offload them."""
        return math.ceil(others / self.offload_every) if self.offload_every else 0

    def activations(self, tokens: int, layers: int) -> list[Activations]:
        """Where each layer of a row of so many tokens leaves its activations."""
        kept = self.keeps(tokens, layers)
        places: list[Activations] = []
        before = None
        for to_kept in range(layers - kept, 0, -1):
            # The last of them is offloaded in any case: when its turn comes, the card still has its tensors.
            if self.offload_every and (to_kept - 1) % self.offload_every == 0:
                before = Offloaded(before)
                places.append(before)
            else:
                places.append(Recomputed())
        return places + [Kept() for _layer in range(kept)]


CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: enough to fill it, few enough to stay in its caches."""

MIN_TOKENS, MAX_TOKENS = 1024, 65_536
"""Tokens of a micro-batch on a GPU: smaller ones leave it idle, larger ones are not faster."""


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


def rows_together(cards: int, rows: int) -> int:
    """How many of a step's rows go forward one after another before the first goes backward.

    Over several cards two for each, so that one card works on a row while the next works on the row before (the
    schedule of GPipe, Huang et al. 2019). Cards work off what they are told without being waited for, so the order in
    which rows are sent is all that it takes.
    """
    return min(2 * cards if cards > 1 else 1, rows)


def cpu_plan(longest_example: int, layers: int) -> StepPlan:
    """The step plan on a CPU, where nothing is tried."""
    return StepPlan(max(longest_example, CPU_TOKENS), layers)


def sizes_to_try(longest_example: int, step: StepTokens, cards: int) -> list[tuple[int, int]]:
    """(token budget, rows that go forward together) of the step plans to try on a GPU, from the largest down."""
    return [
        (budget, rows_together(cards, rows_of(step.largest, budget, step.shared)))
        for budget in token_budgets(longest_example, step.largest, step.shared)
    ]


def relative_speed(kept_share: float, tokens: int) -> float:
    """Speed of a micro-batch: recomputing costs half a pass again, and small products fill a card badly."""
    return tokens / (tokens + 300) / (1 + (1 - kept_share) / 2)
