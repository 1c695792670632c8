"""The loss scale of fp16 training."""

from dataclasses import dataclass

import torch


@dataclass
class LossScale:
    """Factor that keeps fp16 gradients from vanishing: halved when they overflow, doubled after a calm while.

    The rule of Micikevicius et al. 2018, "Mixed Precision Training". For other dtypes it stays 1.
    """

    value: float
    growth_interval: int = 1000
    good_steps: int = 0

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        """The loss scale that a run begins with: 2^14 for fp16, otherwise 1, which stays."""
        return cls(2.0**14 if dtype == torch.float16 else 1.0)

    @property
    def is_used(self) -> bool:
        """Whether an overflow can be met by a smaller scale."""
        return self.value != 1.0

    def update(self, overflowed: bool) -> None:
        """Take note of a step, whether its gradient overflowed or not."""
        if not self.is_used:
            return
        if overflowed:
            self.value, self.good_steps = max(2.0, self.value / 2), 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.value, self.good_steps = min(2.0**24, self.value * 2), 0
