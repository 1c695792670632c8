"""The key-value cache of generation."""

import torch

from utils.model.attention import NO_PAST, NoPast, Prefix, attend_one_by_one
from utils.rows.segments import Segments


class KeyValueCache:
    """A layer's keys and values of one sequence: what stands before its next tokens (Past), with which it grows.

    Args:
        capacity: most positions, those of `prefix` among them.
        prefix: what the sequence begins with.

    Attributes:
        length: positions that are filled.
    """

    def __init__(self, capacity: int, prefix: Prefix | NoPast = NO_PAST) -> None:
        self.capacity, self.prefix, self.length = capacity, prefix, prefix.length
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See Past."""
        past_length = self.length
        return attend_one_by_one(query, *self.extend(key, value), segments, scale, window, past_length)

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of new tokens, and return all that there are then, [length, kv_heads, head_dim]."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room(key), self._room(value)
            if isinstance(self.prefix, Prefix):
                self.keys[: self.length], self.values[: self.length] = self.prefix.key, self.prefix.value
        new = slice(self.length, self.length + len(key))
        self.keys[new], self.values[new] = key, value
        self.length = new.stop
        return self.keys[: new.stop], self.values[: new.stop]

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        _length, heads, head_dim = states.shape
        # A head's positions lie side by side in memory: for each new token, all of them are read.
        return states.new_empty(heads, self.capacity, head_dim).transpose(0, 1)
