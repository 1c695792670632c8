"""Where the examples of a packed row lie, and what each of their tokens may attend to.

Each example is a segment, and attends to itself alone. Where examples begin with the same tokens, these stand in the
row once, as a segment of their own before all others, and every segment that goes on from them attends to them as well:
its context is the prefix and itself. Three examples, of which a and b share the prefix p and c shares none:

    token of the row         0  1    2  3  4             5              6  7
    segments                p0 p1 | a0 a1 a2          | b0           | c0 c1       lengths 2, 3, 1, 2
    contexts                p0 p1 | p0 p1 a0 a1 a2    | p0 p1 b0     | c0 c1       lengths 2, 5, 3, 2
    place in the contexts    0  1    2  3  4  5  6       7  8  9      10 11
    token that stands there  0  1    0  1  2  3  4       0  1  5       6  7
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROW_MULTIPLE = 128
"""Rows on a GPU have a multiple of this many tokens: for every new length the matrix library looks for its fastest
kernels anew, which takes milliseconds for each product of a layer."""


@dataclass(frozen=True)
class Contexts:
    """The contexts of a row's segments, end to end: the tokens whose keys and values each segment attends to.

    Attributes:
        lengths: of each segment's context, in order.
        cumulative: start of each context and the end of the last, int32, shape [segments + 1].
        tokens: [places], int64: the row's token that stands at each place of the contexts.
        places_of_shared: [most places that a token has, shared tokens], int64: the places of each token of a prefix,
            one column a token, filled up with -1. Above: [[0, 1], [2, 3], [7, 8]], the first column those of p0.
        places_of_own: [other tokens], int64: the one place of each token behind the prefixes. Above: 4 5 6 9 10 11.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    tokens: torch.Tensor
    places_of_shared: torch.Tensor
    places_of_own: torch.Tensor

    def to(self, device: torch.device) -> "Contexts":
        """The same contexts, for a row on another device."""
        tensors = (self.cumulative, self.tokens, self.places_of_shared, self.places_of_own)
        return Contexts(self.lengths, *(tensor.to(device, non_blocking=True) for tensor in tensors))

    def add_up(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the row's keys or values, [tokens, …], from that of those in the contexts, [places, …].

        (torch's own sum by index would add up in no fixed order, and in bf16.)
        """
        places, is_place = self.places_of_shared.clamp(min=0), self.places_of_shared >= 0
        shared = grad[places] * is_place.view(*is_place.shape, *[1] * (grad.dim() - 1))
        return torch.cat((shared.sum(0), grad[self.places_of_own]))


@dataclass(frozen=True)
class Segments:
    """Where the examples of one packed row lie, end to end.

    Attributes:
        lengths: of each segment, in order.
        cumulative: start of each segment and the row's end, int32, shape [segments + 1].
        longest: no segment's context is longer; the same number all through a run keeps compiled code valid.
        contexts: what the segments attend to; None = each to itself alone.
    """

    lengths: list[int]
    cumulative: torch.Tensor
    longest: int
    contexts: Contexts | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, longest: int = 0, contexts: Contexts | None = None
    ) -> "Segments":
        """Segments of these lengths, in order."""
        cumulative = bounds(lengths).to(device, non_blocking=True)
        longest = max(longest, *lengths, *(contexts.lengths if contexts else ()))
        return cls(list(lengths), cumulative, longest, contexts.to(device) if contexts else None)

    def to(self, device: torch.device) -> "Segments":
        """The same segments, for a row on another device."""
        contexts = self.contexts.to(device) if self.contexts else None
        return Segments(self.lengths, self.cumulative.to(device), self.longest, contexts)

    @property
    def for_varlen(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Bounds of the segments and of their contexts, and the greatest length of either, as kernels take them."""
        contexts = self.contexts.cumulative if self.contexts else self.cumulative
        return self.cumulative, contexts, self.longest, self.longest


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    """Where things of these lengths start, end to end, and where the last ends; int32, shape [things + 1]."""
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
