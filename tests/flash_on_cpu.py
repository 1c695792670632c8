"""Flash attention over variable lengths where there is no card for it."""

import pytest


def use_flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU in bf16 pass for a card that has it, with what it computes made of the segments' bounds alone."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from utils import attention

    def varlen(query, key, value, segments, scaling):
        """The last key of a segment is the last query's."""
        bounds, key_bounds, _longest, _longest_of_keys = segments.for_flash
        queries, keys = torch.arange(query.shape[2], dtype=torch.int32), torch.arange(key.shape[2], dtype=torch.int32)
        of_query = torch.searchsorted(bounds, queries, right=True)
        of_key = torch.searchsorted(key_bounds, keys, right=True)
        to_end = bounds[of_query] - queries, key_bounds[of_key] - keys
        mask = (of_query[:, None] == of_key) & (to_end[0][:, None] <= to_end[1])
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)

    monkeypatch.setattr(attention, "_varlen", varlen)
    monkeypatch.setattr(attention, "has_varlen", lambda _device, dtype: dtype == torch.bfloat16)
