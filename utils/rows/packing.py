"""How a step's examples are shared out into micro-batches, and a micro-batch is laid into one packed row.

Everything here is a pure function of the examples and of the number of processes, so a run can go on from any step,
with any number of them, without stored state.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ft_datasets.examples import Example
from utils.rows.schedule import Schedule
from utils.rows.segments import ROW_MULTIPLE, Contexts, Segments, bounds


def share_out(
    examples: Sequence[Example], token_budget: int, world_size: int, micro_batch_size: int = 0
) -> list[list[int]]:
    """Share examples out into micro-batches of nearly equal size, as many for each process as for any other.

    Heaviest first, each into the emptiest micro-batch (the LPT rule of scheduling, Graham 1969). A prefix that examples
    share counts once in a micro-batch.

    Args:
        token_budget: most tokens of a micro-batch, whose examples together are not longer than twice as many; one that
            is longer by itself gets one of its own.
        world_size: the number of micro-batches is a multiple of it.
        micro_batch_size: most examples of a micro-batch; 0 = no limit.

    Returns:
        Micro-batches as positions in `examples`, those of rank r at [r::world_size]; some may be empty.
    """
    loads = [example.load for example in examples]
    lightest, least_shared = min(loads), min(example.shared_length for example in examples)
    most = min(micro_batch_size or len(examples), max(1, (token_budget - least_shared) // lightest))
    # Two that would not fit beside an equal never share a micro-batch.
    alone = sum(2 * example.load + example.shared_length > token_budget for example in examples)
    needed = max(-(-load_of_a_row(examples) // token_budget), -(-len(loads) // most), alone, 1)
    count = -(-needed // world_size) * world_size
    order = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    while True:
        batches: list[list[int]] = [[] for _ in range(count)]
        present: list[set[bytes]] = [set() for _ in range(count)]
        open_batches = [(0, b) for b in range(count)]  # a heap of (tokens, number) of those that may take more
        for i in order:
            total, emptiest = open_batches[0]
            added = _added(examples[i], present[emptiest])
            if total and total + added > token_budget:
                break
            batches[emptiest].append(i)
            present[emptiest].add(examples[i].prefix)
            if len(batches[emptiest]) < most:
                heapq.heapreplace(open_batches, (total + added, emptiest))
            else:
                heapq.heappop(open_batches)
        else:
            return [sorted(batch) for batch in batches]
        count += world_size


def heaviest_first(examples: Sequence[Example]) -> list[Example]:
    """The longest example, then all; first those whose context is longest beside what they count in a row."""
    by_context = sorted(examples, key=lambda example: (len(example) / example.load, len(example)), reverse=True)
    return [max(examples, key=len), *by_context]


def first_that_fit(examples: Iterable[Example], token_budget: int) -> list[Example]:
    """The first of the examples, as many as a micro-batch takes, or one."""
    chosen: list[Example] = []
    present: set[bytes] = set()
    total = 0
    for example in examples:
        added = _added(example, present)
        if chosen and total + added > token_budget:
            break
        chosen.append(example)
        present.add(example.prefix)
        total += added
    return chosen


def _added(example: Example, present: set[bytes]) -> int:
    """What an example counts in a micro-batch where some prefixes are present."""
    return example.load + (0 if example.prefix in present else example.shared_length)


class StepTokens(NamedTuple):
    """How many tokens one of several processes computes in a step.

    Attributes:
        largest: in the largest step, if it were one row.
        mean: in a usual step.
        shared: those of all shared prefixes, which `largest` and `mean` hold once; any row may have them.
    """

    largest: int
    mean: int
    shared: int


def tokens_of_a_step(examples: Sequence[Example], schedule: Schedule, processes: int) -> StepTokens:
    """How many tokens each process computes in a step, by the loads of the examples."""
    loads, shared = [example.load for example in examples], shared_tokens(examples)
    # Processes do not share a step out quite evenly.
    largest = math.ceil(1.02 * schedule.largest_step(loads) / processes)
    mean = min(math.ceil(sum(loads) / len(loads) * schedule.global_batch_size / processes), largest)
    return StepTokens(largest + shared, mean + shared, shared)


def load_of_a_row(examples: Sequence[Example]) -> int:
    """What a row of these examples counts: no less than its tokens, nor than half of its segments' contexts."""
    return shared_tokens(examples) + sum(example.load for example in examples)


def shared_tokens(examples: Sequence[Example]) -> int:
    """Tokens of all prefixes that these examples share, each counted once."""
    return sum({example.prefix: example.shared_length for example in examples}.values())


@dataclass(frozen=True)
class PackedBatch:
    """Examples one after another in a single row, ready for the model.

    Attributes:
        input_ids: [tokens], int64.
        position_ids: [tokens], int64, from 0 in every example; where its beginning is shared, its own go on from there.
        segments: where each example lies, or what of it is not shared; shared beginnings come first.
        label_rows: [labels], int64: the positions whose next token carries loss.
        label_ids: [labels], int64: those next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    label_rows: torch.Tensor
    label_ids: torch.Tensor


class _Row:
    """A row in the making; the drawing in utils/rows/segments.py shows one.

    Attributes:
        length: tokens so far.
        places: tokens of all segments' contexts so far.
        prefix_places: where each prefix begins in every context that has it; prefixes by their tokens' numbers.
    """

    def __init__(self) -> None:
        self.length = self.places = 0
        self.input_ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.context_tokens: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.context_lengths: list[int] = []
        self.prefix_places: dict[range, list[int]] = {}

    def append(self, input_ids: np.ndarray, prefix: range = range(0)) -> int:
        """Add a segment that goes on from a prefix; the number of its first token."""
        first, length = self.length, len(input_ids)
        if prefix:
            self.prefix_places[prefix].append(self.places)
        self.input_ids.append(input_ids)
        self.positions.append(np.arange(len(prefix), len(prefix) + length))
        self.context_tokens += [np.array(prefix, dtype=np.int64), np.arange(first, first + length)]
        self.lengths.append(length)
        self.context_lengths.append(len(prefix) + length)
        self.length += length
        self.places += len(prefix) + length
        return first

    def append_prefix(self, input_ids: np.ndarray) -> range:
        """Add a prefix, before any segment that is none; the numbers of its tokens."""
        first = self.append(input_ids)
        prefix = range(first, self.length)
        self.prefix_places[prefix] = [first]
        return prefix

    def contexts(self) -> Contexts | None:
        """What the segments attend to; None = each to itself alone."""
        if not self.prefix_places:
            return None
        tokens, shared = np.concatenate(self.context_tokens), sum(map(len, self.prefix_places))
        places_of_shared = np.full((max(map(len, self.prefix_places.values())), shared), -1)
        for prefix, firsts in self.prefix_places.items():
            places_of_shared[: len(firsts), prefix.start : prefix.stop] = np.add.outer(firsts, np.arange(len(prefix)))
        places_of_own = np.flatnonzero(tokens >= shared)  # in the tokens' order, each once
        tensors = (torch.from_numpy(array) for array in (tokens, places_of_shared, places_of_own))
        return Contexts(self.context_lengths, bounds(self.context_lengths), *tensors)


def pack(
    examples: Sequence[Example],
    device: torch.device,
    longest: int = 0,
    at_least: int = 0,
    last_device: torch.device | None = None,
) -> PackedBatch:
    """Lay examples end to end, behind the prefixes that several of them share.

    On a GPU segments without labels, none longer than `longest`, fill the row up to a multiple of ROW_MULTIPLE.

    Args:
        longest: see Segments.
        at_least: tokens that the row is filled up to in any case.
        last_device: where the labels go, if elsewhere. (A copy from one card to another waits for both.)
    """
    row, prefixes, label_rows = _Row(), {}, []
    for example in examples:
        # A row where only one begins so is no exception: compiled code would be another.
        if example.shared_length and example.prefix not in prefixes:
            prefixes[example.prefix] = row.append_prefix(example.input_ids[: example.shared_length])
    for example in examples:
        prefix = prefixes.get(example.prefix, range(0))
        first = row.append(example.input_ids[len(prefix) :], prefix) - len(prefix)
        # The token at position p is predicted from position p - 1; nothing stands before the first.
        label_rows += [np.arange(first + max(start, 1) - 1, first + stop - 1) for start, stop in example.learnt]
    multiple = ROW_MULTIPLE if device.type == "cuda" else 1
    longest = max(longest, multiple, *map(len, examples))
    filling = max(0, -(-max(at_least, row.length) // multiple) * multiple - row.length)
    for start in range(0, filling, longest):
        row.append(np.zeros(min(longest, filling - start), dtype=np.int32))
    input_ids = torch.from_numpy(np.concatenate(row.input_ids).astype(np.int64))
    rows = torch.from_numpy(np.concatenate(label_rows))
    return PackedBatch(
        input_ids=input_ids.to(device, non_blocking=True),
        position_ids=torch.from_numpy(np.concatenate(row.positions)).to(device, non_blocking=True),
        segments=Segments.of(row.lengths, device, longest, row.contexts()),
        label_rows=rows.to(last_device or device, non_blocking=True),
        label_ids=input_ids[rows + 1].to(last_device or device, non_blocking=True),
    )
