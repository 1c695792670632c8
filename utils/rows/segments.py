"""Where the examples of a packed row lie, and what each of them sees of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROW_MULTIPLE = 128
"""Rows on a GPU have a multiple of this many tokens: for every new length the matrix library looks for its fastest
kernels anew, which takes milliseconds for each product of a layer."""


@dataclass(frozen=True)
class Keys:
    """What the segments of a row see, where some begin with tokens that stand in the row once, before all segments.

    The keys of a segment are those of the shared tokens that it begins with, and its own, which come last.

    Attributes:
        lengths: how many each segment has, in order.
        cumulative: start of each segment's and their end, int32, shape [segments + 1].
        rows: [keys], int64: the row's token that each key is of.
        copies: [most, shared tokens], int64: which keys are those of each shared token; -1 where it has fewer.
        own: [other tokens], int64: which key is that of each token behind the shared ones.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    rows: torch.Tensor
    copies: torch.Tensor
    own: torch.Tensor

    def to(self, device: torch.device) -> "Keys":
        """The same, for a row on another device."""
        tensors = (self.cumulative, self.rows, self.copies, self.own)
        return Keys(self.lengths, *(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Segments:
    """Where the examples of one packed row lie, end to end.

    Attributes:
        lengths: of each segment, in order.
        cumulative: start of each segment and the row's end, int32, shape [segments + 1].
        longest: no segment sees more; the same number all through a run keeps compiled code valid.
        keys: what they see; None = each itself alone.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    longest: int
    keys: Keys | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, longest: int = 0, keys: Keys | None = None) -> "Segments":
        """Segments of these lengths, in order."""
        cumulative = bounds(lengths).to(device, non_blocking=True)
        longest = max(longest, *lengths, *(keys.lengths if keys else ()))
        return cls(list(lengths), cumulative, longest, keys.to(device) if keys else None)

    def to(self, device: torch.device) -> "Segments":
        """The same segments, for a row on another device."""
        keys = self.keys.to(device) if self.keys else None
        return Segments(self.lengths, self.cumulative.to(device), self.longest, keys)

    @property
    def for_varlen(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Bounds of the segments and of what they see, and the most that one of either has."""
        return self.cumulative, self.keys.cumulative if self.keys else self.cumulative, self.longest, self.longest


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    """Where things of these lengths start, end to end, and their end; int32."""
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)


def keys_of_rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys or values [tokens, …] as the segments see them, [keys, …], by Keys.rows."""
    return states[rows]


def rows_of_keys(grad: torch.Tensor, keys: Keys) -> torch.Tensor:
    """The gradient of what `keys_of_rows` was given. (Adding up by index would be in no fixed order, and in bf16.)"""
    copies = grad[keys.copies.clamp(min=0)] * (keys.copies >= 0).view(*keys.copies.shape, *[1] * (grad.dim() - 1))
    return torch.cat((copies.sum(0), grad[keys.own]))
