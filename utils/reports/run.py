"""What a training run says to the person who started it."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.encoding import describe_lengths
from utils.machine.memory import peak_memory_gb
from utils.machine.precision import Precision
from utils.machine.world import World, sharding_group_size
from utils.model.decoder import causal_lm
from utils.model.folder import ModelFolder
from utils.model.fused_layers import why_plain
from utils.planning.estimate import estimate, estimate_of_run
from utils.planning.shape import Shape
from utils.reports.loss_picture import LOSS_PICTURE
from utils.results.model_card import chat_command
from utils.results.model_card import model_card as write_card
from utils.runs.checkpoint import size_of
from utils.runs.description import read_training_config
from utils.runs.metrics import METRICS, train_losses
from utils.runs.start import Start
from utils.training.optimizer import learning_rate, run_tensors
from utils.training.step_plan import StepPlan

if TYPE_CHECKING:
    from ft_datasets.loading import Data
    from utils.training.trainer import Trainer

Say = Callable[[str], None]


def speaker(world: World) -> Say:
    """Prints on rank 0, and nothing elsewhere."""
    return (lambda message: print(message, flush=True)) if world.is_main else (lambda _message: None)


def start_notes(start: Start, output: Path, say: Say) -> None:
    """What was found in the output folder."""
    for note in start.notes:
        say(note)
    if start.is_finished:
        assert start.checkpoint is not None
        say(
            _(
                "This run is finished: {steps} steps, the result is in {folder}. For more, raise --num_epochs; to "
                "begin anew, --resume none.",
                steps=start.checkpoint.step,
                folder=output,
            )
        )
    elif start.checkpoint:
        say(_("Going on from {path}.", path=start.checkpoint.path))


def note_on_cards(
    config: TrainingConfig, folder: ModelFolder, world: World, precision: Precision, longest: int, say: Say
) -> None:
    """Say that a process for each card would be faster, where one process is laid over several and one would do.

    Cards that hand rows on to one another wait for the first and the last; processes work all the time.

    Args:
        longest: tokens of the longest example.
    """
    if len(world.devices) < 2:
        return
    free = min(torch.cuda.mem_get_info(device)[0] for device in world.devices)
    available = min(free, config.gpu_memory_gb * 1e9) if config.gpu_memory_gb else free
    least = estimate(config, Shape.of(folder.config), precision.compute.itemsize, "plain", StepPlan(longest, 0))
    if least.needed <= available:
        cards = len(world.devices)
        say(
            _(
                "One process has the layers of the model on {cards} cards, and each waits for the others a part of the "
                "time. Each has room for the whole model (from {needed} GB), so a process for each would be faster: "
                "torchrun --nproc_per_node {cards} llama_finetuning.py … --batch_size_training {batch} (for each "
                "process)",
                cards=cards,
                needed=f"{least.needed / 1e9:.1f}",
                batch=-(-config.batch_size_training // cards),
            )
        )


def _where_activations_go(step_plan: StepPlan, layers: int) -> str:
    """Those that full rows do not keep on the card."""
    others = layers - step_plan.kept_layers
    offloaded = step_plan.offloads(others)
    text = ""
    if others > offloaded:
        text += _(
            "; of full rows, {count} of {layers} layers recompute their activations",
            count=others - offloaded,
            layers=layers,
        )
    if offloaded:
        text += _("; the activations of {count} layers wait in main memory", count=offloaded)
    return text


def before_first_step(trainer: "Trainer", data: "Data", say: Say) -> None:
    """Tokens, masks, batch arithmetic, validation, learning rate and checkpoints, before anything is trained."""
    config, schedule, world = trainer.config, trainer.schedule, trainer.world
    say(
        _(
            "Data: {training} examples to train on, {held_out} held out",
            training=len(data.training),
            held_out=len(data.held_out),
        )
    )
    say("  " + describe_lengths(data.training))
    if shared := sum(e.shared_length for e in data.training):
        say(
            _(
                "  {share} % of all tokens are beginnings that examples share; each row computes them once",
                share=round(100 * shared / sum(map(len, data.training))),
            )
        )
    if sum(e.label_count for e in data.training) < 0.01 * sum(map(len, data.training)):
        say(
            _(
                "  Less than 1 % of the tokens carry loss: the answers are very short beside the questions. "
                "Is that meant?"
            )
        )
    layers = len(causal_lm(trainer.model).model.layers)
    trained = sum(p.numel() for p in trainer.parameters.values())
    total = sum(p.numel() for p in trainer.model.parameters())
    say(
        _(
            "Model: {trained} of {total} parameters are trained; base {base}, computing in {dtype} ({reason})",
            trained=f"{trained:,}",
            total=f"{total:,}",
            base=config.quantization or str(trainer.precision.weights).removeprefix("torch."),
            dtype=str(trainer.precision.compute).removeprefix("torch."),
            reason=trainer.precision.reason,
        )
    )
    say(
        _(
            "Batch: {each} examples x {processes} processes = {all} a step; packed into rows of up to {budget} "
            "tokens{limit}{recompute}",
            each=f"{schedule.global_batch_size / world.size:g}",
            processes=world.size,
            all=schedule.global_batch_size,
            budget=trainer.step_plan.token_budget,
            limit=_(", {count} examples at most", count=config.micro_batch_size) if config.micro_batch_size else "",
            recompute=_where_activations_go(trainer.step_plan, layers),
        )
    )
    architecture = causal_lm(trainer.model).config.to_dict()
    reason = why_plain(config, architecture, world.device, trainer.precision.compute)
    if reason and world.device.type == "cuda":
        say(_("The plain layers are used, not the fast ones: {reason}.", reason=reason))
    if config.enable_fsdp:
        say(
            _(
                "Sharding: {strategy}; each process holds 1/{size} of weights, gradients and optimizer",
                strategy=config.fsdp_config.sharding_strategy,
                size=sharding_group_size(config.fsdp_config, world.size),
            )
        )
    rates = [learning_rate(step, config, schedule) for step in (0, schedule.total_steps // 2, schedule.total_steps - 1)]
    say(
        _(
            "Steps: {steps} ({per_epoch} an epoch); learning rate {scheduler}: {first} at the start, {middle} half "
            "way, {last} at the end; gradients {clipping}",
            steps=schedule.total_steps,
            per_epoch=schedule.steps_per_epoch,
            scheduler=config.scheduler,
            first=f"{rates[0]:.2e}",
            middle=f"{rates[1]:.2e}",
            last=f"{rates[2]:.2e}",
            clipping=_("clipped to norm {norm}", norm=config.gradient_clipping_threshold)
            if config.gradient_clipping
            else _("not clipped"),
        )
    )
    if data.held_out:
        say(_("Held-out loss: after each epoch and at the end"))
    optimizer = trainer.optimizer if config.save_optimizer else None
    when = []
    if config.save_steps:
        when.append(_("every {steps} steps", steps=config.save_steps))
    if config.save_minutes:
        when.append(_("every {minutes} minutes", minutes=f"{config.save_minutes:g}"))
    when.append(_("on Ctrl-C or kill, and at the end"))
    if not config.save_optimizer:
        say(_("Without the optimizer (--save_optimizer False) this run can't go on after an interruption."))
    say(
        _(
            "Checkpoints: {when}, {size} MB each, {keep} kept in {folder}.{goes_on}",
            goes_on=_(" After an interruption the same command goes on.") if config.save_optimizer else "",
            when=", ".join(when),
            size=f"{size_of(run_tensors(trainer.parameters, optimizer)) / 1e6:.1f}",
            keep=config.keep_checkpoints,
            folder=config.checkpoints_dir,
        )
    )


def after_last_step(trainer: "Trainer", output: Path, say: Say) -> None:
    """What came of the run, and what to do with it."""
    config = trainer.config
    losses = list(train_losses(output).values())
    say(
        _(
            "Done: {steps} steps, training loss {first} -> {last}{held_out}",
            steps=trainer.done,
            first=f"{losses[0]:.3f}" if losses else "-",
            last=f"{losses[-1]:.3f}" if losses else "-",
            held_out=""
            if trainer.last_eval_loss is None
            else _(", held-out loss {loss}", loss=f"{trainer.last_eval_loss:.3f}"),
        )
    )
    if trainer.world.device.type == "cuda":
        say(memory_line(trainer))
    if trainer.compiles:
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        say(_("Compiled: {count} pieces of code; a number that grows with the steps would be a defect.", count=count))
    repeated = (read_training_config(output) or {}).get("repeated_steps", [])
    if repeated:
        say(
            _(
                "Interruptions: {count}; steps that had to be done again: {repeated} of {steps}",
                count=len(repeated),
                repeated=sum(repeated),
                steps=trainer.done,
            )
        )
    say(
        _(
            "In {folder}: {files}",
            folder=output,
            files=", ".join([METRICS, LOSS_PICTURE, *(["README.md"] if config.save_model else [])]),
        )
    )
    if config.save_model:
        say(_("Talk to it:  {command}", command=chat_command(config)))


def memory_line(trainer: "Trainer") -> str:
    """The run's peak beside its estimate, by part."""
    parts = estimate_of_run(trainer)
    sizes = {name: f"{size / 1e9:.2f}" for name, size in asdict(parts).items()}
    return _(
        "Memory: {actual} GB at most, {estimate} GB by the estimate (weights {weights}, trained {trained} less "
        "{unmade} that come later, activations {activations}, temporary {temporary}, logits {logits})",
        actual=f"{peak_memory_gb(trainer.world):.2f}",
        estimate=f"{parts.peak / 1e9:.2f}",
        **sizes,
    )


def model_card(trainer: "Trainer", output: Path) -> str:
    """The model card of the run's result."""
    config, schedule = trainer.config, trainer.schedule
    losses = list(train_losses(output).values())
    facts = {
        _("base model"): f"`{config.model_name}`",
        _("method"): config.peft_method if config.use_peft else _("full fine-tuning"),
        _("base held in"): config.quantization or str(trainer.precision.weights).removeprefix("torch."),
        _("data"): f"`{config.data.data_path}`, "
        + _("{count} examples", count=len(trainer.training))
        + (_(", {count} held out", count=len(trainer.held_out)) if trainer.held_out else ""),
        _("steps"): f"{trainer.done} ({schedule.global_batch_size} " + _("examples each") + ")",
        _("learning rate"): f"{config.lr:g}, {config.scheduler}",
        _("training loss"): f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "-",
        _("held-out loss"): "-" if trainer.last_eval_loss is None else f"{trainer.last_eval_loss:.3f}",
        _("most memory"): f"{peak_memory_gb(trainer.world):.1f} GB" if trainer.world.device.type == "cuda" else "CPU",
        _("command"): f"`python {shlex.join(sys.argv)}`",
    }
    return write_card(config, facts)
