"""What a training run says to the person who started it."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from configs.command_line import flags_of
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.encoding import describe_lengths
from ft_datasets.loading import Data
from ft_datasets.prompt import PromptTemplate
from utils.machine.memory import limit_bytes, peak_memory_gb
from utils.machine.world import World
from utils.model.decoder import causal_lm
from utils.planning.estimate import Estimate, estimate, laid_out
from utils.planning.shape import Shape
from utils.reports.loss_picture import LOSS_PICTURE
from utils.results.model_card import chat_command, model_card
from utils.runs.description import read_training_config
from utils.runs.metrics import METRICS, train_losses
from utils.runs.start import Start
from utils.training.optimizer import learning_rate
from utils.training.setup import Setup
from utils.training.step_plan import StepPlan
from utils.training.trainer import Trainer

Say = Callable[[str], None]


def which_template(template: PromptTemplate) -> str:
    """One line on the words that messages are put in."""
    if template.name == "alpaca":
        return _("Prompt template: Alpaca's words.")
    if template.name == "model":
        told = _("Prompt template: the model's own chat template (--prompt_template alpaca takes Alpaca's words).")
    else:
        told = _("Prompt template: {file}.", file=template.name)
    return told + (_(" Its date stays {date}.", date=template.date) if template.date else "")


def speaker(world: World) -> Say:
    """A function that prints a message on rank 0, and nothing elsewhere."""
    return (lambda message: print(message, flush=True)) if world.is_main else (lambda _message: None)


def start_notes(start: Start, output: Path, say: Say) -> None:
    """Say what was found in the output folder."""
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


def note_on_cards(config: TrainingConfig, setup: Setup, shape: Shape, say: Say) -> None:
    """Say that a process for each card would be faster, where one process is laid over several and one would do.

    Cards that hand rows on to one another wait for the first and the last; processes work all the time.
    """
    devices = setup.world.devices
    if len(devices) < 2:
        return
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    available = min(free, limit_bytes(config.gpu_memory_gb))
    layout = replace(laid_out(config, setup, shape), cards=1)
    least = estimate(layout, "plain", StepPlan(setup.longest, 0))
    if least.needed <= available:
        cards = len(devices)
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


def before_first_step(trainer: Trainer) -> list[str]:
    """What is said before anything is trained: data, model, batch, layers, steps, checkpoints; a line each."""
    return [
        *_data_lines(trainer.data),
        _model_line(trainer),
        _batch_line(trainer),
        *_layer_lines(trainer),
        _steps_line(trainer),
        *([_("Held-out loss: after each epoch and at the end")] if trainer.data.held_out else []),
        *_checkpoint_lines(trainer),
    ]


def _data_lines(data: Data) -> list[str]:
    training, held_out = data.training, data.held_out
    tokens = sum(map(len, training))
    lines = [
        _("Data: {training} examples to train on, {held_out} held out", training=len(training), held_out=len(held_out)),
        "  " + describe_lengths(training),
    ]
    if shared := sum(example.shared_length for example in training):
        lines.append(
            _(
                "  {share} % of all tokens are beginnings that examples share; each row computes them once",
                share=round(100 * shared / tokens),
            )
        )
    if sum(example.label_count for example in training) < 0.01 * tokens:
        lines.append(
            _(
                "  Less than 1 % of the tokens carry loss: the answers are very short beside the questions. "
                "Is that meant?"
            )
        )
    return lines


def _model_line(trainer: Trainer) -> str:
    precision = trainer.setup.precision
    return _(
        "Model: {trained} of {total} parameters are trained; base {base}, computing in {dtype} ({reason})",
        trained=f"{sum(p.numel() for p in trainer.parameters.values()):,}",
        total=f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        base=_base_held_in(trainer),
        dtype=str(precision.compute).removeprefix("torch."),
        reason=precision.reason,
    )


def _base_held_in(trainer: Trainer) -> str:
    """The base model's quantization, or the dtype of its weights."""
    return trainer.config.quantization or str(trainer.setup.precision.weights).removeprefix("torch.")


def _batch_line(trainer: Trainer) -> str:
    config, schedule, step_plan = trainer.config, trainer.schedule, trainer.stepper.step_plan
    return _(
        "Batch: {each} examples x {processes} processes = {all} a step; packed into rows of up to {budget} "
        "tokens{limit}{recompute}",
        each=f"{schedule.global_batch_size / trainer.world.size:g}",
        processes=trainer.world.size,
        all=schedule.global_batch_size,
        budget=step_plan.token_budget,
        limit=_(", {count} examples at most", count=config.micro_batch_size) if config.micro_batch_size else "",
        recompute=_where_activations_go(step_plan, trainer.stepper.loss_module.layers),
    )


def _where_activations_go(step_plan: StepPlan, layers: int) -> str:
    """What happens to the activations that full rows do not keep on the card."""
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


def _layer_lines(trainer: Trainer) -> list[str]:
    config, setup = trainer.config, trainer.setup
    lines = []
    if setup.why_plain and setup.world.device.type == "cuda":
        lines.append(_("The plain layers are used, not the fast ones: {reason}.", reason=setup.why_plain))
    if setup.is_sharded:
        lines.append(
            _(
                "Sharding: {strategy}; each process holds 1/{size} of weights, gradients and optimizer",
                strategy=config.fsdp_config.sharding_strategy,
                size=setup.shards,
            )
        )
    return lines


def _steps_line(trainer: Trainer) -> str:
    config, schedule = trainer.config, trainer.schedule
    rates = [learning_rate(step, config, schedule) for step in (0, schedule.total_steps // 2, schedule.total_steps - 1)]
    return _(
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


def _checkpoint_lines(trainer: Trainer) -> list[str]:
    config = trainer.config
    when = []
    if config.save_steps:
        when.append(_("every {steps} steps", steps=config.save_steps))
    if config.save_minutes:
        when.append(_("every {minutes} minutes", minutes=f"{config.save_minutes:g}"))
    when.append(_("on Ctrl-C or kill, and at the end"))
    checkpoints = _(
        "Checkpoints: {when}, {size} MB each, {keep} kept in {folder}.{goes_on}",
        goes_on=_(" After an interruption the same command goes on.") if config.save_optimizer else "",
        when=", ".join(when),
        size=f"{trainer.checkpoint_bytes / 1e6:.1f}",
        keep=config.keep_checkpoints,
        folder=config.checkpoints_dir,
    )
    if config.save_optimizer:
        return [checkpoints]
    return [
        _("Without the optimizer (--save_optimizer False) this run can't go on after an interruption."),
        checkpoints,
    ]


def after_last_step(trainer: Trainer, output: Path) -> list[str]:
    """What is said at the end: what came of the run, and what to do with it; a line each."""
    config = trainer.config
    first, last = _first_and_last_loss(output)
    held_out = "" if trainer.last_eval_loss is None else _(", held-out loss {loss}", loss=_held_out_loss(trainer))
    lines = [
        _(
            "Done: {steps} steps, training loss {first} -> {last}{held_out}",
            steps=trainer.done,
            first=first,
            last=last,
            held_out=held_out,
        )
    ]
    if trainer.world.device.type == "cuda":
        lines.append(memory_line(trainer))
    if trainer.setup.compiles:
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        lines.append(
            _("Compiled: {count} pieces of code; a number that grows with the steps would be a defect.", count=count)
        )
    if repeated := (read_training_config(output) or {}).get("repeated_steps", []):
        lines.append(
            _(
                "Interruptions: {count}; steps that had to be done again: {repeated} of {steps}",
                count=len(repeated),
                repeated=sum(repeated),
                steps=trainer.done,
            )
        )
    files = ", ".join([METRICS, LOSS_PICTURE, *(["README.md"] if config.save_model else [])])
    lines.append(_("In {folder}: {files}", folder=output, files=files))
    if config.save_model:
        lines.append(_("Talk to it:  {command}", command=chat_command(config)))
    return lines


def _first_and_last_loss(output: Path) -> tuple[str, str]:
    """A run's first and last training loss, as text; - where there is none."""
    losses = list(train_losses(output).values())
    return (f"{losses[0]:.3f}", f"{losses[-1]:.3f}") if losses else ("-", "-")


def _held_out_loss(trainer: Trainer) -> str:
    """The last held-out loss, as text; - where there is none."""
    return "-" if trainer.last_eval_loss is None else f"{trainer.last_eval_loss:.3f}"


def estimate_of_run(trainer: Trainer) -> Estimate:
    """The estimate for what a run has settled on."""
    setup, shape = trainer.setup, Shape.of(causal_lm(trainer.model).config.to_dict())
    layout = laid_out(trainer.config, setup, shape)
    return estimate(layout, setup.layer_kind, trainer.stepper.step_plan, setup.step.largest)


def memory_line(trainer: Trainer) -> str:
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


def card_of_run(trainer: Trainer, output: Path) -> str:
    """The model card of the run's result."""
    config, schedule, data = trainer.config, trainer.schedule, trainer.data
    first, last = _first_and_last_loss(output)
    examples = _("{count} examples", count=len(data.training))
    held_out = _(", {count} held out", count=len(data.held_out)) if data.held_out else ""
    facts = {
        _("base model"): f"`{config.model_name}`",
        _("method"): _("full fine-tuning") if config.method == "full" else config.method,
        _("base held in"): _base_held_in(trainer),
        _("data"): f"`{config.data.data_path}`, {examples}{held_out}",
        _("steps"): f"{trainer.done} ({schedule.global_batch_size} " + _("examples each") + ")",
        _("learning rate"): f"{config.lr:g}, {config.scheduler}",
        _("training loss"): f"{first} -> {last}" if first != "-" else "-",
        _("held-out loss"): _held_out_loss(trainer),
        _("most memory"): f"{peak_memory_gb(trainer.world):.1f} GB" if trainer.world.device.type == "cuda" else "CPU",
        _("command"): f"`python llama_finetuning.py {shlex.join(flags_of(config))}`",
    }
    return model_card(config, facts)
