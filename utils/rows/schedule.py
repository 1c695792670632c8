"""Which examples each step trains on: a pure function of the seed and the step."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        """What the largest of the first 200 steps counts, where example i counts lengths[i]."""
        array = np.asarray(lengths)
        return max(int(array[self.indices(step)].sum()) for step in range(min(self.total_steps, 200)))


@functools.lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The seeded order of a pass over the data; not to be written to."""
    return np.random.default_rng([seed, epoch]).permutation(examples)
