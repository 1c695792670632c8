"""Which examples a step trains on, and how they are shared out into packed rows.

Everything here is a pure function of the seed, the step and the examples' lengths, so a run can go on from any step,
with any number of processes, without stored state.
"""

import functools
import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ft_datasets.alpaca_dataset import Example
from utils.attention import ROW_MULTIPLE, Segments


def seed_of(*parts: int) -> int:
    """A seed for random numbers that depend on `parts` alone, such as (the run's seed, step)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class Schedule:
    """The run's arithmetic: examples, steps and epochs.

    Attributes:
        examples: how many there are to train on.
        global_batch_size: examples an optimizer step, all processes together.
    """

    examples: int
    global_batch_size: int
    num_epochs: int
    max_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the data; the last of a pass may have fewer examples."""
        return -(-self.examples // self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        by_epochs = self.steps_per_epoch * self.num_epochs
        return min(by_epochs, self.max_steps) if self.max_steps else by_epochs

    def epoch_of(self, step: int) -> int:
        """The pass, from 0, that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a step (from 0) is the last of its pass."""
        return (step + 1) % self.steps_per_epoch == 0

    def indices(self, step: int) -> np.ndarray:
        """Indices of the examples of a step (from 0), in the pass's seeded order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.examples, self.seed, epoch)
        start = within * self.global_batch_size
        return order[start : start + self.global_batch_size]

    def largest_step(self, lengths: Sequence[int]) -> int:
        """Most tokens of a step, of the first 200, where example i has lengths[i]."""
        array = np.asarray(lengths)
        return max(int(array[self.indices(step)].sum()) for step in range(min(self.total_steps, 200)))


@functools.lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The seeded order of a pass over the data; not to be written to."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def share_out(lengths: Sequence[int], token_budget: int, world_size: int, micro_batch_size: int = 0) -> list[list[int]]:
    """Share examples out into micro-batches of nearly equal size, as many for each process as for any other.

    Longest first, each into the emptiest micro-batch (the LPT rule of scheduling, Graham 1969).

    Args:
        lengths: tokens of each example.
        token_budget: most tokens of a micro-batch; an example longer than it gets one of its own.
        world_size: the number of micro-batches is a multiple of it.
        micro_batch_size: most examples of a micro-batch; 0 = no limit.

    Returns:
        Micro-batches as positions in `lengths`, those of rank r at [r::world_size]; some may be empty.
    """
    most = micro_batch_size or len(lengths)
    # Two that are longer than half the budget never share a micro-batch.
    alone = sum(2 * length > token_budget for length in lengths)
    needed = max(-(-sum(lengths) // token_budget), -(-len(lengths) // most), alone, 1)
    count = -(-needed // world_size) * world_size
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        batches: list[list[int]] = [[] for _ in range(count)]
        open_batches = [(0, b) for b in range(count)]  # a heap of (tokens, number) of those that may take more
        for i in order:
            total, emptiest = open_batches[0]
            if total and total + lengths[i] > token_budget:
                break
            batches[emptiest].append(i)
            if len(batches[emptiest]) < most:
                heapq.heapreplace(open_batches, (total + lengths[i], emptiest))
            else:
                heapq.heappop(open_batches)
        else:
            return [sorted(batch) for batch in batches]
        count += world_size


@dataclass(frozen=True)
class PackedBatch:
    """Examples one after another in a single row, ready for the model.

    Attributes:
        input_ids: [tokens], int64.
        position_ids: [tokens], int64, from 0 in every example.
        segments: where each example lies.
        label_rows: [labels], int64: the positions whose next token carries loss.
        label_ids: [labels], int64: those next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    label_rows: torch.Tensor
    label_ids: torch.Tensor


def pack(
    examples: Sequence[Example],
    device: torch.device,
    longest: int = 0,
    at_least: int = 0,
    last_device: torch.device | None = None,
) -> PackedBatch:
    """Lay examples end to end.

    On a GPU segments without labels, none longer than `longest`, fill the row up to a multiple of ROW_MULTIPLE.

    Args:
        longest: see Segments.
        at_least: tokens that the row is filled up to in any case.
        last_device: where the labels go, if elsewhere. (A copy from one card to another waits for both.)
    """
    lengths = [len(example) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    multiple = ROW_MULTIPLE if device.type == "cuda" else 1
    filling = max(0, -(-max(at_least, sum(lengths)) // multiple) * multiple - sum(lengths))
    # The token at position p is predicted from row p - 1; BOS or a prompt stands before every labelled token.
    rows = [
        np.arange(start + max(example.prompt_length, 1) - 1, start + len(example) - 1)
        for start, example in zip(starts, examples, strict=True)
    ]
    longest = max(longest, multiple, *lengths)
    lengths += [min(longest, filling - start) for start in range(0, filling, longest)]
    filler = np.zeros(filling, dtype=np.int64)
    input_ids = torch.from_numpy(np.concatenate([*(e.input_ids for e in examples), filler]).astype(np.int64))
    label_rows = torch.from_numpy(np.concatenate(rows))
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    return PackedBatch(
        input_ids=input_ids.to(device, non_blocking=True),
        position_ids=positions.to(device, non_blocking=True),
        segments=Segments.of(lengths, device, longest),
        label_rows=label_rows.to(last_device or device, non_blocking=True),
        label_ids=input_ids[label_rows + 1].to(last_device or device, non_blocking=True),
    )
