"""The plan of a run, before anything is loaded: memory by part, disk, steps and time; and what would fit."""

import math
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from configs.command_line import flags_of
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.loading import Data
from utils.files import free_space
from utils.machine.memory import free_main_memory
from utils.machine.world import World
from utils.model.folder import ModelFolder
from utils.planning.estimate import Estimate, estimate, laid_out
from utils.planning.fits import variants
from utils.planning.shape import Layout, Shape
from utils.results.model_files import SHARD_BYTES
from utils.rows.schedule import Schedule
from utils.runs.checkpoint import COPIED_AT_MOST
from utils.runs.progress import duration
from utils.training.setup import LayerKind, Setup
from utils.training.step_plan import CPU_TOKENS, StepPlan, relative_speed, rows_of, rows_together, token_budgets

SHARE_OF_MATMUL: dict[LayerKind, float] = {"plain": 0.35, "compiled plain": 0.53, "fused": 0.35, "compiled fused": 0.64}
"""Speed of a training step as a share of a plain large matrix product's, in long rows that keep all activations
(measured on an H100: LoRA, and full fine-tuning where plain layers are compiled; fast layers not compiled by four
layers of the 7B shape, half as fast as with it)."""
SHARE_ON_CPU = 0.64
"""The same on a CPU, which nothing keeps waiting (LoRA over a model of a few million parameters)."""


class Fit(NamedTuple):
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

    def fit(self) -> Fit:
        """The best of the step plans that a run would try, with its memory."""
        plans = self._step_plans()
        found = [(estimate(self.layout, self.setup.layer_kind, plan, self.setup.step.largest), plan) for plan in plans]
        fitting = [Fit(parts, plan, True) for parts, plan in found if parts.needed <= self.available]
        return max(fitting, key=lambda candidate: self.speed(candidate.step_plan), default=Fit(*found[-1], False))

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
        longest, step, layers = self.setup.longest, self.setup.step, self.layout.shape.layers
        if self.setup.world.device.type == "cpu":
            return [StepPlan(max(longest, CPU_TOKENS), layers)]
        rows = {
            budget: rows_together(self.layout.cards, rows_of(step.largest, budget, step.shared))
            for budget in token_budgets(longest, step.largest, step.shared)
        }
        return [StepPlan(budget, kept, rows=rows[budget]) for kept in range(layers, -1, -1) for budget in rows]


def print_plan(config: TrainingConfig, folder: ModelFolder, data: Data) -> None:
    """Print the plan of a run with these settings on this machine: one process, or with FSDP one for each card.

    Raises:
        UserError: no such run can be (see check_length, Setup).
    """
    folder.check_length(data.longest)
    shape, world = Shape.of(folder.config), _world_of_a_run(config.enable_fsdp, config.one_gpu)
    batch = config.batch_size_training * world.size
    schedule = Schedule(len(data.training), batch, config.num_epochs, config.max_steps, config.seed)
    available = _memory_available(config.gpu_memory_gb, world.device, len(world.devices))

    def prospect(variant: TrainingConfig) -> Prospect:
        setup = Setup.of(_on_one_machine(variant), folder.config, world, data, schedule)
        return Prospect(variant, setup, laid_out(variant, setup, shape), available)

    _print_run(prospect(config), data)
    print(_("What fits in {available}:", available=_gb(available)))
    start = f"torchrun --nproc_per_node {world.size}" if config.enable_fsdp else "python"
    for name, variant in variants(config):
        parts, step_plan, fits = prospect(variant).fit()
        verdict = _("fits, rows of {tokens} tokens", tokens=step_plan.token_budget) if fits else _("does not fit")
        print(f"  {name:20} {_gb(parts.needed)}  {verdict}")
        if fits:
            print(f"    {start} llama_finetuning.py {shlex.join(flags_of(replace(variant, plan=False)))}")


def _on_one_machine(config: TrainingConfig) -> TrainingConfig:
    """A run's settings as one machine has them: hybrid sharding is full sharding there."""
    if config.fsdp_config.sharding_strategy != "HYBRID_SHARD":
        return config
    return replace(
        config, fsdp_config=replace(config.fsdp_config, sharding_strategy="FULL_SHARD", sharding_group_size=0)
    )


def _world_of_a_run(enable_fsdp: bool, one_gpu: bool) -> World:
    """The first of the processes that a run on this machine would have, and its cards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    visible = torch.cuda.device_count() if device.type == "cuda" and not one_gpu else 1
    processes, cards = (max(2, visible), 1) if enable_fsdp else (1, visible)
    return World(0, processes, [torch.device(device.type, index) for index in range(cards)])


def _print_run(run: Prospect, data: Data) -> None:
    config, setup, layout = run.config, run.setup, run.layout
    parts, step_plan, _fits = run.fit()
    schedule, world = setup.schedule, setup.world
    tokens = round(sum(map(len, data.training)) * schedule.total_steps / schedule.steps_per_epoch)
    print(_("Plan for {model}, {examples} examples", model=Path(config.model_name), examples=len(data.training)))
    print(_("  steps        {steps} ({tokens} tokens)", steps=schedule.total_steps, tokens=f"{tokens:,}"))
    print(_("  memory       {peak} at most, of {available}", peak=_gb(parts.peak), available=_gb(run.available)))
    if world.size > 1:
        print(_("               (each of {processes} processes, which share the model out)", processes=world.size))
    if layout.cards > 1:
        print(_("               (on the fullest of {cards} cards)", cards=layout.cards))
    print(_("    weights     {size}", size=_gb(parts.weights)))
    print(_("    trained     {size}  (weights, gradients, optimizer)", size=_gb(parts.trained)))
    if parts.unmade and config.method == "full":
        print(_("                ({size} of gradients come only while activations go)", size=_gb(parts.unmade).strip()))
    budget = step_plan.token_budget
    print(_("    activations {size}  (rows of {tokens} tokens)", size=_gb(parts.activations), tokens=budget))
    print(_("    temporary   {size}  (one layer's backward pass)", size=_gb(parts.temporary)))
    print(_("    logits      {size}  (before that: the larger of the two counts)", size=_gb(parts.logits)))
    stored = _stored_bytes(layout, config.save_optimizer)
    saving, main_memory = _to_save(layout, stored), free_main_memory()
    print(_("  main memory  {size} to save, of {free} free", size=_gb(saving), free=_gb(main_memory)))
    needed = layout.trained.parameters * (stored * (config.keep_checkpoints + 1) + layout.each.weight)
    free = free_space(Path(config.output_dir))
    print(_("  disk         {needed} of {free} free", needed=_gb(needed), free=_gb(free)))
    seconds = run.seconds(data, step_plan, _matmul_flops(world.device, setup.precision.compute))
    print(_("  time         about {time}", time=duration(seconds)))


def _gb(size: float) -> str:
    return f"{size / 1e9:6.2f} GB"


def _stored_bytes(layout: Layout, with_optimizer: bool) -> float:
    """What a checkpoint holds of a trained parameter."""
    return layout.each.weight + (layout.each.optimizer if with_optimizer else 0)


def _to_save(layout: Layout, stored: float) -> float:
    """Bytes of main memory that saving takes: a checkpoint's copy while it is written, or the files of the result.

    Args:
        stored: bytes of a trained parameter in a checkpoint.
    """
    trained, weight = layout.trained.parameters, layout.each.weight
    copied = trained * stored if trained * stored <= COPIED_AT_MOST else 0.0
    # Weights are gathered one by one and written a file at a time.
    result = min(weight * trained, SHARD_BYTES + weight * layout.shape.head_weights)
    return max(copied, result)


def _memory_available(limit_gb: float, device: torch.device, cards: int) -> float:
    """Bytes that the run may take of each card, or of main memory; `limit_gb` is the user's limit, 0 = none."""
    limit = limit_gb * 1e9 or math.inf
    if device.type == "cuda":
        return min(limit, *(torch.cuda.mem_get_info(index)[0] for index in range(cards)))
    return min(limit, free_main_memory())


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
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
