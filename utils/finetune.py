"""One fine-tuning run: read the data, load the base model, put the adapter over it, train, save."""

import contextlib
from dataclasses import replace
from pathlib import Path

from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.loading import load_data
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.download.dataset import fetch_data
from utils.machine.launch import was_restarted
from utils.machine.memory import forget_peak, limit_memory
from utils.machine.world import World, check_ranks_agree, check_shared, decide_on_main, sharding_group_size
from utils.model.adapters import trainable_parameters
from utils.model.digests import in_background
from utils.model.folder import ModelFolder
from utils.planning.fits import check_memory
from utils.planning.shape import Shape
from utils.reports import run as report
from utils.reports.loss_picture import draw_losses
from utils.results.saving import save_result
from utils.runs.base_model import BaseIdentity
from utils.runs.description import describe_run, write_training_config
from utils.runs.folder import hold_folder
from utils.runs.metrics import Metrics
from utils.runs.start import find_start, repeated_steps
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
    template: PromptTemplate,
    held: contextlib.ExitStack,
) -> None:
    """Read the data, load the base model, put the adapter over it, train, save. Every process runs this.

    Args:
        held: keeps the output folder for this run, until the caller closes it.
    """
    settings = {name: value for name, value in config.flat().items() if name.rpartition(".")[2] not in MAY_DIFFER}
    if config.enable_fsdp:  # the default depends on the machine
        settings["fsdp_config.sharding_group_size"] = sharding_group_size(config.fsdp_config, world.size)
    check_ranks_agree(settings)
    say = report.speaker(world)
    output = Path(config.output_dir)
    decide_on_main(world, lambda: held.enter_context(hold_folder(output)))
    for folder_of_all in (output, config.checkpoints_dir):
        check_shared(world, folder_of_all)
    if was_restarted(world):
        config.resume = "auto"  # --resume was about the first start
    files = decide_on_main(world, lambda: fetch_data(config.data.data_path, say))
    say(_("Reading {file} …", file=files or config.data.data_path))
    data = load_data(config, tokenizer, template, say, files)
    folder.check_length(data.longest)
    fingerprints = {
        "data": data.fingerprint(),
        "base_model": folder.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "prompt_template": repr(template),
    }
    check_ranks_agree({**fingerprints, "held_out": replace(data, training=data.held_out).fingerprint()})
    start = decide_on_main(world, lambda: find_start(config, world.size, len(data.training), fingerprints, folder))
    report.start_notes(start, output, say)
    if start.is_finished:
        return

    shape, done = Shape.of(folder.config), start.checkpoint.step if start.checkpoint else 0
    setup = Setup.of(config, folder.config, world, data, start.schedule, done)
    check_ranks_agree({"compute dtype": str(setup.precision.compute), "fast layers": not setup.why_plain})
    check_memory(config, setup, shape)
    limit_memory(world, config.gpu_memory_gb)
    report.note_on_cards(config, setup, shape, say)
    # Beside loading and the search for the micro-batch it costs no time: what one has read, the other finds in memory.
    sha256 = in_background(folder.sha256 if world.is_main else dict)
    say(_("Loading {folder} …", folder=folder.path))
    loss_module = load_trainable(config, setup, folder)

    if world.device.type == "cuda":
        say(_("Finding the fastest micro-batch that fits (with compilation up to a minute) …"))
    optimizer = make_optimizer(trainable_parameters(loss_module.model).values(), config)
    earlier = Fitted.of_checkpoint(start.checkpoint) if start.checkpoint else None
    fitted = fit(config, setup, loss_module, optimizer, data.training, earlier)
    trainer = Trainer(config, setup, loss_module, optimizer, data, start, fitted)
    if start.checkpoint:
        trainer.resume(start.checkpoint)
    decide_on_main(world, trainer.check_disk_space)
    for line in report.before_first_step(trainer):
        say(line)
    base = BaseIdentity(folder.fingerprint(), folder.digests, sha256.result())
    description = describe_run(config, tokenizer, template, base)
    if data.origin:
        description["data"] = data.origin
    if world.is_main:
        description["repeated_steps"] = repeated_steps(output, trainer.done)
        write_training_config(output, description)
    forget_peak(world)
    with contextlib.closing(Metrics(output, world.is_main, trainer.done)) as metrics:
        trainer.run(metrics)

    description["trained_steps"] = trainer.done
    tensors = whole_tensors(dict(trainer.model.named_parameters()) if config.method == "full" else trainer.parameters)
    if world.is_main:
        if config.save_model:
            save_result(config, trainer.model, tensors, description, report.card_of_run(trainer, output))
        else:
            write_training_config(output, description)
        draw_losses(output)
    elif config.save_model and config.enable_fsdp:
        for _name, _tensor in tensors:  # each process has a part in every one
            pass
    for line in report.after_last_step(trainer, output):
        say(line)
