"""The optimizer's arithmetic: learning rate over the run, gradient norm and clipping, fp16 loss scale."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from configs.training import TrainingConfig
from utils.packing import Schedule

LAST_SHARE = 0.1
"""Where the cosine ends, as a share of the highest learning rate."""


def learning_rate(step: int, config: TrainingConfig, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0."""
    if config.scheduler == "constant":
        return config.lr
    if config.scheduler == "step":
        return config.lr * config.gamma ** schedule.epoch_of(step)
    warmup = math.ceil(config.warmup_ratio * schedule.total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, schedule.total_steps - warmup)
    return config.lr * (LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), its update fused into few passes over memory."""
    return torch.optim.AdamW(list(parameters), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm of all gradients together; sharded gradients count whole."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`."""
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


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
        """2^14 to begin with for fp16, otherwise none."""
        return cls(2.0**14 if dtype == torch.float16 else 1.0)

    @property
    def is_used(self) -> bool:
        """Whether an overflow can be met by a smaller scale."""
        return self.value != 1.0

    def update(self, overflowed: bool) -> None:
        """Take note of one step."""
        if not self.is_used:
            return
        if overflowed:
            self.value, self.good_steps = max(2.0, self.value / 2), 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.value, self.good_steps = min(2.0**24, self.value * 2), 0
