"""The key-value cache of generation."""

import torch

from utils.model.attention import Prefix


class KeyValueCache:
    """Room for `capacity` positions of one sequence, written in place."""

    def __init__(self, capacity: int, prefix: Prefix | None = None) -> None:
        self.capacity, self.prefix = capacity, prefix
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = prefix.length if prefix else 0
        """Positions that are filled; the caller advances it after each forward pass."""

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See PastKeyValues."""
        if layer not in self.layers:
            heads, head_dim = key.shape[1], key.shape[3]
            keys, values = (key.new_empty(1, heads, self.capacity, head_dim) for _ in range(2))
            if self.prefix:
                past_key, past_value = self.prefix.layers[layer]
                keys[:, :, : self.length], values[:, :, : self.length] = past_key, past_value
            self.layers[layer] = keys, values
        keys, values = self.layers[layer]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]
