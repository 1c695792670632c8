"""One fine-tuning run, stage after stage: begin reading at `fine_tune`."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.loading import Data, fingerprint, load_data
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.download.dataset import fetch_data
from utils.machine.launch import was_restarted
from utils.machine.memory import forget_peak, limit_memory
from utils.machine.world import (
    World,
    check_ranks_agree,
    check_shared,
    decide_on_main,
    done_by_all,
    sharding_group_size,
)
from utils.model.adapters import trainable_parameters
from utils.model.digests import in_background
from utils.model.folder import ModelFolder
from utils.planning.fits import check_memory
from utils.planning.shape import Shape
from utils.reports import run as report
from utils.reports.loss_picture import draw_losses
from utils.results.adapter_folder import origin_of_adapter
from utils.results.saving import save_result
from utils.runs.base_model import BaseIdentity
from utils.runs.description import describe_run, template_for, write_training_config
from utils.runs.folder import hold_folder
from utils.runs.metrics import Metrics
from utils.runs.start import Start, check_same_base, find_start, repeated_steps
from utils.training.fitting import Fitted, fit
from utils.training.optimizer import make_optimizer
from utils.training.setup import Setup
from utils.training.sharding import whole_tensors
from utils.training.trainable import load_trainable
from utils.training.trainer import Trainer

MAY_DIFFER = ("model_name", "data_path", "num_workers_dataloader", "gpu_memory_gb")
"""Settings that may be different ones for each process of a run: what is read must be equal, wherever it lies."""


def fine_tune(
    config: TrainingConfig,
    world: World,
    folder: ModelFolder,
    tokenizer: Tokenizer,
    inherited: PromptTemplate | None = None,
) -> None:
    """Read the data, load the base model, put the adapter over it, train, save. Every process runs this.

    Args:
        inherited: the template of the adapter that the run starts from.
    """
    say = report.speaker(world)
    check_processes_agree(config, world)
    with contextlib.ExitStack() as held:
        decide_on_main(world, lambda: held.enter_context(hold_folder(Path(config.output_dir))))
        for folder_of_all in (Path(config.output_dir), config.checkpoints_dir):
            check_shared(world, folder_of_all)
        if was_restarted(world):
            config = replace(config, resume="auto")  # --resume was about the first start
        encoder = ChatEncoder(decide_on_main(world, lambda: template_for(config, tokenizer, inherited)), tokenizer)
        data = read_data(config, world, encoder, say)
        if folder.depends_on_length(data.longest):
            data = data.apart()
        start = find_where_to_start(config, world, folder, encoder, data)
        report.start_notes(start, Path(config.output_dir), say)
        if start.is_finished:
            return
        setup = set_up(config, world, folder, data, start, say)
        # Beside loading and the search it takes no time: what one has read, the other finds in memory.
        sha256 = in_background(folder.sha256 if world.is_main else dict)
        trainer = load_trainer(config, setup, folder, data, start, say)
        base = BaseIdentity(folder.fingerprint(), folder.digests, sha256.result())
        if start.checkpoint and not config.accept_changes:
            decide_on_main(world, lambda: check_same_base(start.checkpoint, base))
        description = describe_run(config, encoder, base, data.origin)
        if data.held_out:
            description["held_out_fingerprint"] = fingerprint(data.held_out)
        if config.from_adapter:
            description["from_adapter"] = origin_of_adapter(config, is_new=not start.checkpoint)
        train(trainer, description, say)


def check_processes_agree(config: TrainingConfig, world: World) -> None:
    """Refuse a run whose processes were given different settings.

    Raises:
        UserError: on every process.
    """
    settings = {name: value for name, value in config.flat().items() if name.rpartition(".")[2] not in MAY_DIFFER}
    if config.enable_fsdp:  # the default depends on the machine
        settings["fsdp_config.sharding_group_size"] = sharding_group_size(config.fsdp_config, world.size)
    check_ranks_agree(settings)


def read_data(config: TrainingConfig, world: World, encoder: ChatEncoder, say: report.Say) -> Data:
    """The run's data, from files, a hub or a function, as examples in the template's words."""
    files = decide_on_main(world, lambda: fetch_data(config.data, say))
    say(_("Reading {file} …", file=files or config.data.data_path))
    say(report.which_template(encoder.template))
    return done_by_all(lambda: load_data(config, encoder, say, files))


def find_where_to_start(
    config: TrainingConfig, world: World, folder: ModelFolder, encoder: ChatEncoder, data: Data
) -> Start:
    """The run's beginning, or where it goes on; every process has the same data and the same base model."""
    fingerprints = {
        "data": fingerprint(data.training),
        "base_model": folder.fingerprint(),
        "tokenizer": encoder.tokenizer.fingerprint,
        "prompt_template": encoder.template.identity,
    }
    check_ranks_agree({**fingerprints, "held_out": fingerprint(data.held_out)})
    return decide_on_main(world, lambda: find_start(config, world.size, len(data.training), fingerprints, folder))


def set_up(
    config: TrainingConfig, world: World, folder: ModelFolder, data: Data, start: Start, say: report.Say
) -> Setup:
    """The run's decisions, made before anything is loaded; the cards' limit is set."""
    shape, done = Shape.of(folder.config), start.checkpoint.step if start.checkpoint else 0
    setup = Setup.of(config, folder.config, world, data, start.schedule, done)
    check_ranks_agree({"compute dtype": str(setup.precision.compute), "fast layers": not setup.why_plain})
    check_memory(config, setup, shape)
    limit_memory(world, config.gpu_memory_gb)
    report.note_on_cards(config, setup, shape, say)
    return setup


def load_trainer(
    config: TrainingConfig, setup: Setup, folder: ModelFolder, data: Data, start: Start, say: report.Say
) -> Trainer:
    """The model with what is trained of it, its step plan found, and the state of the run that it goes on from."""
    say(_("Loading {folder} …", folder=folder.path))
    adapter = Path(config.from_adapter) if config.from_adapter and not start.checkpoint else None
    if adapter:
        say(_("Starting from the adapter in {folder} …", folder=adapter))
    loss_module = load_trainable(config, setup, folder, adapter)
    if setup.world.device.type == "cuda":
        say(_("Finding the fastest micro-batch that fits (with compilation up to a minute) …"))
    optimizer = make_optimizer(trainable_parameters(loss_module.model).values(), config)
    earlier = Fitted.of_checkpoint(start.checkpoint) if start.checkpoint else None
    fitted = fit(config, setup, loss_module, optimizer, data.training, earlier)
    trainer = Trainer(config, setup, loss_module, optimizer, data, start, fitted)
    if start.checkpoint:
        trainer.resume(start.checkpoint)
    decide_on_main(setup.world, trainer.check_disk_space)
    return trainer


def train(trainer: Trainer, description: dict[str, Any], say: report.Say) -> None:
    """Train to the end, and hand the result over.

    Args:
        description: what training_config.json is to hold.
    """
    output, world = Path(trainer.config.output_dir), trainer.world
    for line in report.before_first_step(trainer):
        say(line)
    if world.is_main:
        description["repeated_steps"] = repeated_steps(output, trainer.done)
        write_training_config(output, description)
    forget_peak(world)
    with contextlib.closing(Metrics(output, world.is_main, trainer.done)) as metrics:
        trainer.run(metrics)
    hand_over(trainer, {**description, "trained_steps": trainer.done})
    for line in report.after_last_step(trainer, output):
        say(line)


def hand_over(trainer: Trainer, description: dict[str, Any]) -> None:
    """Write the adapter or the model into the output folder, with the picture of its losses."""
    config, output = trainer.config, Path(trainer.config.output_dir)
    tensors = whole_tensors(dict(trainer.model.named_parameters()) if config.method == "full" else trainer.parameters)
    if trainer.world.is_main:
        if config.save_model:
            save_result(config, trainer.model, tensors, description, report.card_of_run(trainer, output))
        else:
            write_training_config(output, description)
        draw_losses(output)
    elif config.save_model and config.enable_fsdp:
        for _name, _tensor in tensors:  # each process has a part in every one
            pass
