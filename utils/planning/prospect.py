"""A run as this machine would do it: the step plan that it would find, and how long it would take."""

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from configs.training import TrainingConfig
from ft_datasets.loading import Data
from utils.machine.memory import free_main_memory, limit_bytes
from utils.machine.world import World
from utils.planning.estimate import Estimate, estimate
from utils.planning.shape import Layout
from utils.training.setup import LayerKind, Setup
from utils.training.step_plan import StepPlan, cpu_plan, relative_speed, rows_of, sizes_to_try

SHARE_OF_MATMUL: dict[LayerKind, float] = {"plain": 0.35, "compiled plain": 0.53, "fused": 0.35, "compiled fused": 0.64}
"""Speed of a training step as a share of a plain large matrix product's, in long rows that keep all activations
(measured on an H100: LoRA, and full fine-tuning where plain layers are compiled; fast layers not compiled by four
layers of the 7B shape, half as fast as with it)."""
SHARE_ON_CPU = 0.64
"""The same on a CPU, which nothing keeps waiting (LoRA over a model of a few million parameters)."""


class Outlook(NamedTuple):
    """The fastest step plan that fits, or the most frugal one, with its memory."""

    parts: Estimate
    step_plan: StepPlan
    fits: bool


@dataclass(frozen=True)
class Prospect:
    """A run, or a variant of it, as this machine would do it.

    Attributes:
        available: bytes that it may take of each card, or of main memory.
    """

    config: TrainingConfig
    setup: Setup
    layout: Layout
    available: float

    def best(self) -> Outlook:
        """The best of the step plans that a run would try, with its memory."""
        plans = self._step_plans()
        found = [(estimate(self.layout, self.setup.layer_kind, plan, self.setup.step.largest), plan) for plan in plans]
        fitting = [Outlook(parts, plan, True) for parts, plan in found if parts.needed <= self.available]
        return max(fitting, key=lambda candidate: self.speed(candidate.step_plan), default=Outlook(*found[-1], False))

    def speed(self, step_plan: StepPlan) -> float:
        """The plan's speed beside that of long rows which keep all activations."""
        return relative_speed(step_plan.kept_layers / self.layout.shape.layers, step_plan.token_budget)

    def seconds(self, data: Data, step_plan: StepPlan, matmul_flops: float) -> float:
        """How long the run takes where a large matrix product does `matmul_flops` operations a second."""
        setup, shape = self.setup, self.layout.shape
        schedule, step = setup.schedule, setup.step
        is_on_cpu = setup.world.device.type == "cpu"
        share = SHARE_ON_CPU if is_on_cpu else SHARE_OF_MATMUL[setup.layer_kind]
        operations = (4 if self.layout.trained.is_adapter else 6) * (shape.decoder_weights + shape.head_weights)
        epochs = schedule.total_steps / schedule.steps_per_epoch
        own = sum(example.own_length for example in data.training) * epochs / setup.world.size
        shared = step.shared * rows_of(step.mean, step_plan.token_budget, step.shared) * schedule.total_steps
        return (own + shared) * operations / (matmul_flops * share * self.speed(step_plan))

    def _step_plans(self) -> list[StepPlan]:
        setup, layers = self.setup, self.layout.shape.layers
        if setup.world.device.type == "cpu":
            return [cpu_plan(setup.longest, layers)]
        sizes = sizes_to_try(setup.longest, setup.step, self.layout.cards)
        return [StepPlan(budget, kept, rows=rows) for kept in range(layers, -1, -1) for budget, rows in sizes]


def on_one_machine(config: TrainingConfig) -> TrainingConfig:
    """A run's settings as one machine has them: hybrid sharding is full sharding there."""
    if config.fsdp_config.sharding_strategy != "HYBRID_SHARD":
        return config
    return replace(
        config, fsdp_config=replace(config.fsdp_config, sharding_strategy="FULL_SHARD", sharding_group_size=0)
    )


def world_of_a_run(enable_fsdp: bool, one_gpu: bool) -> World:
    """The first of the processes that a run on this machine would have, and its cards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    visible = torch.cuda.device_count() if device.type == "cuda" and not one_gpu else 1
    processes, cards = (max(2, visible), 1) if enable_fsdp else (1, visible)
    return World(0, processes, [torch.device(device.type, index) for index in range(cards)])


def memory_available(limit_gb: float, device: torch.device, cards: int) -> float:
    """Bytes that the run may take of each card, or of main memory; `limit_gb` is the user's limit, 0 = none."""
    limit = limit_bytes(limit_gb)
    if device.type == "cuda":
        return min(limit, *(torch.cuda.mem_get_info(index)[0] for index in range(cards)))
    return min(limit, free_main_memory())


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured for a moment."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    best = math.inf
    for _attempt in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
