"""What a run will take, before anything is loaded: memory by part, disk, steps and time; and whether it can fit."""

import math
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from configs.command_line import flags_of
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.loading import Data
from utils.machine.compiling import check_compiler, should_compile
from utils.machine.memory import free_main_memory
from utils.machine.precision import choose_precision
from utils.model.folder import ModelFolder
from utils.model.fused_layers import why_plain
from utils.planning.estimate import Estimate, estimate
from utils.planning.fits import variants
from utils.planning.layer_memory import Kind, kind_of
from utils.planning.shape import BytesEach, Shape, trained_parameters
from utils.results.model_files import SHARD_BYTES
from utils.rows.packing import tokens_of_a_step
from utils.rows.schedule import Schedule
from utils.runs.checkpoint import COPIED_AT_MOST
from utils.runs.progress import duration
from utils.training.optimizer import check_optimizer
from utils.training.step_plan import CPU_TOKENS, StepPlan, relative_speed, rows_of, rows_together, token_budgets

SHARE_OF_MATMUL: dict[Kind, float] = {"plain": 0.35, "compiled plain": 0.53, "fused": 0.35, "compiled fused": 0.64}
"""Speed of a training step as a share of a plain large matrix product's, in long rows that keep all activations
(measured on an H100: LoRA, and full fine-tuning where plain layers are compiled; fast layers not compiled by four
layers of the 7B shape, half as fast as with it)."""
SHARE_ON_CPU = 0.64
"""The same on a CPU, which nothing keeps waiting (LoRA over a model of a few million parameters)."""


def print_plan(config: TrainingConfig, folder: ModelFolder, data: Data) -> None:
    """Print the plan of a run with these settings on this machine: one process, or with FSDP one for each card.

    Raises:
        UserError: no such run can be (see check_length, check_optimizer, check_compiler).
    """
    folder.check_length(data.longest)
    shape = Shape.of(folder.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    visible = torch.cuda.device_count() if device.type == "cuda" and not config.one_gpu else 1
    processes, cards = (max(2, visible), 1) if config.enable_fsdp else (1, visible)
    precision = choose_precision(device, config)
    check_optimizer(config, device)
    check_compiler(config.torch_compile, device)
    schedule = Schedule(
        len(data.training), config.batch_size_training * processes, config.num_epochs, config.max_steps, config.seed
    )
    epochs = schedule.total_steps / schedule.steps_per_epoch
    tokens = round(sum(map(len, data.training)) * epochs)
    available = _memory_available(config, device, cards)
    longest = data.longest
    step = tokens_of_a_step(data.training, schedule, processes)
    is_compiled = should_compile(config.torch_compile, device, step.mean * processes * schedule.total_steps)

    def kind(variant: TrainingConfig) -> Kind:
        return kind_of(not why_plain(variant, folder.config, device, precision.compute), is_compiled)

    def speed(step_plan: StepPlan) -> float:
        return relative_speed(step_plan.kept_layers / shape.layers, step_plan.token_budget)

    def fit(variant: TrainingConfig) -> tuple[Estimate, StepPlan, bool]:
        """The fastest setting that fits (or the most frugal one), and whether it fits."""
        if device.type == "cpu":
            tried = [StepPlan(max(longest, CPU_TOKENS), shape.layers)]
        else:
            budgets = token_budgets(longest, step.largest, step.shared)
            tried = [
                StepPlan(budget, kept, rows=rows_together(cards, rows_of(step.largest, budget, step.shared)))
                for kept in range(shape.layers, -1, -1)
                for budget in budgets
            ]
        size, of_layers = precision.compute.itemsize, kind(variant)
        found = [
            (estimate(variant, shape, size, of_layers, each, cards, processes, step.largest), each) for each in tried
        ]
        fitting = [candidate for candidate in found if candidate[0].needed <= available]
        parts, best = max(fitting, key=lambda candidate: speed(candidate[1]), default=found[-1])
        return parts, best, bool(fitting)

    parts, step_plan, _fits = fit(config)
    budget = step_plan.token_budget
    print(_("Plan for {model}, {examples} examples", model=folder.path, examples=len(data.training)))
    print(_("  steps        {steps} ({tokens} tokens)", steps=schedule.total_steps, tokens=f"{tokens:,}"))
    print(_("  memory       {peak} at most, of {available}", peak=_gb(parts.peak), available=_gb(available)))
    if processes > 1:
        print(_("               (each of {processes} processes, which share the model out)", processes=processes))
    if cards > 1:
        print(_("               (on the fullest of {cards} cards)", cards=cards))
    print(_("    weights     {size}", size=_gb(parts.weights)))
    print(_("    trained     {size}  (weights, gradients, optimizer)", size=_gb(parts.trained)))
    if parts.unmade and not config.use_peft:
        print(_("                ({size} of gradients come only while activations go)", size=_gb(parts.unmade).strip()))
    print(_("    activations {size}  (rows of {tokens} tokens)", size=_gb(parts.activations), tokens=budget))
    print(_("    temporary   {size}  (one layer's backward pass)", size=_gb(parts.temporary)))
    print(_("    logits      {size}  (before that: the larger of the two counts)", size=_gb(parts.logits)))
    print(
        _(
            "  main memory  {size} to save, of {free} free",
            size=_gb(_to_save(config, shape)),
            free=_gb(free_main_memory()),
        )
    )
    each = BytesEach.of(config)
    stored = each.weight + (each.optimizer if config.save_optimizer else 0)
    needed = trained_parameters(config, shape) * (stored * (config.keep_checkpoints + 1) + each.weight)
    free = shutil.disk_usage(_existing(Path(config.output_dir))).free
    print(_("  disk         {needed} of {free} free", needed=_gb(needed), free=_gb(free)))
    share = SHARE_ON_CPU if device.type == "cpu" else SHARE_OF_MATMUL[kind(config)]
    rate = _matmul_flops(device, precision.compute) * share * speed(step_plan)
    flops = (4 if config.use_peft else 6) * (shape.decoder_weights + shape.head_weights)
    own = sum(example.own_length for example in data.training) * epochs / processes
    shared = step.shared * rows_of(step.mean, budget, step.shared) * schedule.total_steps
    print(_("  time         about {time}", time=duration((own + shared) * flops / rate)))
    print(_("What fits in {available}:", available=_gb(available)))
    start = f"torchrun --nproc_per_node {processes}" if config.enable_fsdp else "python"
    for name, variant in variants(config):
        found, best, fits = fit(variant)
        verdict = _("fits, rows of {tokens} tokens", tokens=best.token_budget) if fits else _("does not fit")
        print(f"  {name:20} {_gb(found.needed)}  {verdict}")
        if fits:
            print(f"    {start} llama_finetuning.py {shlex.join(flags_of(replace(variant, plan=False)))}")


def _gb(size: float) -> str:
    return f"{size / 1e9:6.2f} GB"


def _to_save(config: TrainingConfig, shape: Shape) -> float:
    """Bytes of main memory that saving takes: a checkpoint's copy while it is written, or the files of the result."""
    each, trained = BytesEach.of(config), trained_parameters(config, shape)
    checkpoint = trained * (each.weight + (each.optimizer if config.save_optimizer else 0))
    copied = checkpoint if checkpoint <= COPIED_AT_MOST else 0.0
    # Weights are gathered one by one and written a file at a time.
    result = min(each.weight * trained, SHARD_BYTES + each.weight * shape.head_weights)
    return max(copied, result)


def _memory_available(config: TrainingConfig, device: torch.device, cards: int) -> float:
    """Bytes that the run may take of each card, or of main memory."""
    limit = config.gpu_memory_gb * 1e9 or math.inf
    if device.type == "cuda":
        return min(limit, *(torch.cuda.mem_get_info(index)[0] for index in range(cards)))
    return min(limit, free_main_memory())


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


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
