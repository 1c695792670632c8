"""The plan of a run, before anything is loaded: memory by part, disk, steps and time; and what would fit."""

import shlex
from dataclasses import replace
from pathlib import Path

from configs.command_line import flags_of
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.loading import Data
from utils.files import free_space
from utils.machine.memory import free_main_memory
from utils.model.folder import ModelFolder
from utils.planning.estimate import laid_out
from utils.planning.fits import variants
from utils.planning.prospect import Prospect, matmul_flops, memory_available, on_one_machine, world_of_a_run
from utils.planning.shape import Layout, Shape
from utils.results.model_files import SHARD_BYTES
from utils.rows.schedule import Schedule
from utils.runs.checkpoint import COPIED_AT_MOST
from utils.runs.progress import duration
from utils.training.setup import Setup


def print_plan(config: TrainingConfig, folder: ModelFolder, data: Data) -> None:
    """Print the plan of a run with these settings on this machine: one process, or with FSDP one for each card.

    Raises:
        UserError: no such run can be (see Setup).
    """
    data = data.apart() if folder.depends_on_length(data.longest) else data
    shape, world = Shape.of(folder.config), world_of_a_run(config.enable_fsdp, config.one_gpu)
    batch = config.batch_size_training * world.size
    schedule = Schedule(len(data.training), batch, config.num_epochs, config.max_steps, config.seed)
    available = memory_available(config.gpu_memory_gb, world.device, len(world.devices))

    def prospect(variant: TrainingConfig) -> Prospect:
        setup = Setup.of(on_one_machine(variant), folder.config, world, data, schedule)
        return Prospect(variant, setup, laid_out(variant, setup, shape), available)

    _print_run(prospect(config), data)
    print(_("What fits in {available}:", available=_gb(available)))
    start = f"torchrun --nproc_per_node {world.size}" if config.enable_fsdp else "python"
    for name, variant in variants(config):
        parts, step_plan, fits = prospect(variant).best()
        verdict = _("fits, rows of {tokens} tokens", tokens=step_plan.token_budget) if fits else _("does not fit")
        print(f"  {name:20} {_gb(parts.needed)}  {verdict}")
        if fits:
            print(f"    {start} llama_finetuning.py {shlex.join(flags_of(replace(variant, plan=False)))}")


def _print_run(run: Prospect, data: Data) -> None:
    config, setup, layout = run.config, run.setup, run.layout
    parts, step_plan, _fits = run.best()
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
    seconds = run.seconds(data, step_plan, matmul_flops(world.device, setup.precision.compute))
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
