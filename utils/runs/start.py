"""Where a run begins: anew or from a checkpoint, whether that is of the same run, and what interruptions cost it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from utils.rows.schedule import Schedule
from utils.runs.base_model import BaseIdentity, BaseModel, compared_by_first_rows, differences
from utils.runs.checkpoint import Checkpoint, newest_whole, read_checkpoint
from utils.runs.description import identity_of_base, read_training_config
from utils.runs.folder import move_aside, set_newer_aside
from utils.runs.metrics import read_metrics

WITHOUT_EFFECT_ON_RESULT = frozenset(
    "model_name output_dir batch_size_training micro_batch_size num_epochs max_steps num_workers_dataloader "
    "run_validation val_batch_size save_model save_steps save_minutes keep_checkpoints save_optimizer resume "
    "accept_changes dist_checkpoint_root_folder dist_checkpoint_folder torch_compile one_gpu enable_fsdp fsdp_config "
    "gpu_memory_gb activation_offload preview plan prompt_template alpaca_dataset chat_dataset custom_dataset".split()
)
"""Settings that may change between start and resumption. (The base model and the data count by their fingerprints, the
template by its text, the batch by its global size, the length by its steps.)"""
STRUCTURAL = (
    "optimizer",
    "use_peft",
    "peft_method",
    "lora_config.r",
    "lora_config.target_modules",
    "lora_config.use_dora",
    "lora_config.modules_to_save",
    "llama_adapter_config.",
    "prefix_config.",
    "freeze_layers",
    "num_freeze_layers",
)
"""Beginnings of the settings that say which tensors are trained: with others a checkpoint can't be gone on from."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        schedule: its steps.
        identity: all that its result depends on, but its length; stored with every checkpoint.
        checkpoint: where it goes on from; None = at the beginning.
        is_finished: there is nothing left to do.
        notes: what to tell the user.
    """

    schedule: Schedule
    identity: dict[str, Any]
    checkpoint: Checkpoint | None
    is_finished: bool
    notes: list[str]


def find_start(
    config: TrainingConfig, world_size: int, examples: int, fingerprints: dict[str, str], base: BaseModel
) -> Start:
    """Decide where the run begins, by --resume and what lies in its output folder.

    Args:
        examples: how many there are to train on.
        fingerprints: hashes of data, base model, tokenizer and template.
        base: the base model, for what earlier versions knew of it, and to name the tensors that differ.

    Raises:
        UserError: the run can't go on from what is there, and must not overwrite it.
    """
    checkpoint, notes = _find_checkpoint(config)
    global_batch_size = config.batch_size_training * world_size
    if checkpoint:
        before = checkpoint.state
        if not before.has_optimizer:
            raise UserError(
                _(
                    "{path} was written with --save_optimizer False, so the run can't go on from it. To begin anew: "
                    "--resume none.",
                    path=checkpoint.path,
                )
            )
        if before.batch_size_training == config.batch_size_training:
            global_batch_size = before.identity["global_batch_size"]
        if before.world_size != world_size:
            notes.append(
                _(
                    "The run was made by {old} processes and goes on with {new}: {batch} examples a step, in the same "
                    "order.",
                    old=before.world_size,
                    new=world_size,
                    batch=global_batch_size,
                )
            )
    schedule = Schedule(examples, global_batch_size, config.num_epochs, config.max_steps, config.seed)
    identity = run_identity(config, schedule, fingerprints)
    finished = False
    if checkpoint:
        notes += _check_same_run(checkpoint, identity, schedule, config.accept_changes, base)
        notes += set_newer_aside(config.checkpoints_dir, checkpoint)
        described = read_training_config(Path(config.output_dir)) or {}
        finished = checkpoint.step >= schedule.total_steps and described.get("trained_steps") == checkpoint.step
    return Start(schedule, identity, checkpoint, finished, notes)


def check_same_base(checkpoint: Checkpoint, base: BaseIdentity) -> None:
    """Refuse to go on over a base model whose tensors differ where the rows that its fingerprint is over do not.

    Raises:
        UserError: naming the tensors.
    """
    if told := differences(identity_of_base(checkpoint).sha256, base.sha256):
        heading = _("{path} belongs to a run with other settings (old -> new):", path=checkpoint.path)
        advice = _("Use the old settings, go on with the new ones (--accept_changes), or begin anew (--resume none).")
        raise UserError("\n".join([heading, f"  base_model: {told}", advice]))


def run_identity(config: TrainingConfig, schedule: Schedule, fingerprints: dict[str, str]) -> dict[str, Any]:
    """All that a run's result depends on, but its length, as flat names and values."""
    identity: dict[str, Any] = {"global_batch_size": schedule.global_batch_size, **fingerprints}
    for name, value in config.flat().items():
        if name.partition(".")[0] not in WITHOUT_EFFECT_ON_RESULT:
            identity[name] = value
    return identity


def repeated_steps(folder: Path, done: int) -> list[int]:
    """How many steps a run does again after each of its interruptions, one number for each; the last one is just over.

    Args:
        folder: its output folder, as the interruption left it.
        done: steps that the run goes on from.
    """
    before = read_training_config(folder)
    if before is None:
        return []
    earlier = before.get("repeated_steps", [])
    if "trained_steps" in before:  # it had come to its end, and is only made longer
        return earlier
    return [*earlier, sum("train_loss" in line and line["step"] > done for line in read_metrics(folder))]


def _find_checkpoint(config: TrainingConfig) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that --resume asks for (None = begin anew), and what to tell about damaged newer ones."""
    folder = Path(config.output_dir)
    if folder.resolve() == Path(config.model_name).resolve():
        raise UserError(
            _("--output_dir {folder} is the base model's own folder. Give another one.", folder=config.output_dir)
        )
    if config.resume == "none":
        move_aside(folder, config.checkpoints_dir)
        return None, []
    if config.resume != "auto":
        if not Path(config.resume).is_dir():
            raise UserError(
                _("--resume {value}: expected auto, none, or the folder of a checkpoint", value=config.resume)
            )
        return read_checkpoint(Path(config.resume)), []
    newest, notes = newest_whole(config.checkpoints_dir)
    if newest is None and notes:
        raise UserError("\n".join([*notes, _("No whole checkpoint is left. To begin anew: --resume none.")]))
    result = next((name for name in ("adapter_config.json", "config.json") if (folder / name).exists()), None)
    if newest is None and result:
        raise UserError(
            _(
                "{folder} holds an adapter or a model ({file}) and no checkpoint to go on from. Give another "
                "--output_dir, or --resume none, which moves it aside.",
                folder=folder,
                file=result,
            )
        )
    return newest, notes


def _check_same_run(
    checkpoint: Checkpoint, identity: dict[str, Any], schedule: Schedule, accept: bool, base: BaseModel
) -> list[str]:
    """Compare a checkpoint's run with the one that is to go on from it; returns what to tell.

    Raises:
        UserError: something changed that would make it another run, and `accept` is not given.
    """
    notes = []
    # A setting that an earlier version did not have is as it was by default.
    before, now = TrainingConfig().flat() | checkpoint.state.identity, dict(identity)
    known = identity_of_base(checkpoint)
    if known.is_of_first_rows:
        notes.append(compared_by_first_rows(checkpoint.path))
        now["base_model"] = base.first_row_fingerprint()
    total = checkpoint.state.total_steps
    if schedule.total_steps > total:
        notes.append(
            _(
                "The run is now longer: {new} steps instead of {old}; the learning rate follows the new length.",
                new=schedule.total_steps,
                old=total,
            )
        )
    elif schedule.total_steps < total:
        before["steps"], now["steps"] = total, schedule.total_steps
    changed = [name for name in now if before.get(name) != now[name]]
    lines = {name: f"  {name}: {_short(before.get(name))} -> {_short(now[name])}" for name in changed}
    if "base_model" in lines and (told := differences(known.digests, base.digests)):
        lines["base_model"] += f"\n    {told}"
    structural = [name for name in changed if name.startswith(STRUCTURAL)]
    if structural:
        heading = _("{path} holds what was trained with other settings (old -> new):", path=checkpoint.path)
        advice = _(
            "These say what is trained, so the run can't go on with the new ones. Use the old ones, or begin anew "
            "(--resume none)."
        )
        raise UserError("\n".join([heading, *map(lines.get, structural), advice]))
    if changed and not accept:
        heading = _("{path} belongs to a run with other settings (old -> new):", path=checkpoint.path)
        advice = _("Use the old settings, go on with the new ones (--accept_changes), or begin anew (--resume none).")
        raise UserError("\n".join([heading, *lines.values(), advice]))
    if changed:
        notes.append("\n".join([_("Going on with changed settings (old -> new):"), *lines.values()]))
    return notes


def _short(value: Any) -> str:
    """A value in a message; a template's text is long."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:60]} … {hashlib.sha256(text.encode()).hexdigest()[:8]}"
