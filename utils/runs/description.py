"""training_config.json: what made an adapter or a model, and all that its user must do alike."""

import contextlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import PromptTemplate, choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.files import json_text, read_json, write_durably
from utils.runs.base_model import BaseIdentity
from utils.runs.checkpoint import Checkpoint, read_checkpoint

TRAINING_CONFIG = "training_config.json"

DESCRIBED = ("settings", "prompt_template", "bos_ids", "eos_id", "tokenizer_fingerprint", "base_model_fingerprint")
"""What a training_config.json must hold for an adapter to be used."""


def read_training_config(folder: Path) -> dict[str, Any] | None:
    """A folder's training_config.json; None for adapters and models made elsewhere.

    Raises:
        UserError: the file is there and broken.
    """
    path = folder / TRAINING_CONFIG
    try:
        described = read_json(path)
    except FileNotFoundError:
        return None
    if lacking := [key for key in DESCRIBED if key not in described]:
        error = _("it lacks {keys}", keys=", ".join(lacking))
        raise UserError(_("{file} can't be read ({error}).", file=path, error=error))
    return described


def described_template(folder: Path, described: dict[str, Any], tokenizer: Tokenizer) -> PromptTemplate:
    """The prompt template that a folder's training_config.json holds.

    Raises:
        UserError: it holds none.
    """
    try:
        return PromptTemplate.from_dict(described["prompt_template"], tokenizer)
    except ValueError as error:
        raise UserError(_("{file} can't be read ({error}).", file=folder / TRAINING_CONFIG, error=error)) from error


def run_gone_on_with(config: TrainingConfig) -> Path | None:
    """The output folder of the run that --resume goes on with; None = the run begins anew, or there is no such run."""
    if config.resume == "none":
        return None
    if config.resume == "auto":
        return Path(config.output_dir) if any(config.checkpoints_dir.glob("step-*")) else None
    return next(iter(Path(config.resume).absolute().parents[1:2]), None)


def template_for(
    config: TrainingConfig, tokenizer: Tokenizer, inherited: PromptTemplate | None = None
) -> PromptTemplate:
    """The template of a run: the one that it began with, or else the one that --prompt_template names.

    Args:
        inherited: the one of the adapter that the run starts from.

    Raises:
        UserError: there is no such template.
    """
    began_with = inherited
    if config.resume != "none":
        with contextlib.suppress(UserError, ValueError):  # what is wrong there is told where the run is gone on with
            began_with = _template_of_run(config, tokenizer) or inherited
    if began_with and config.prompt_template == "auto":
        return began_with
    day = began_with.date if began_with else ""
    return choose_template(config.prompt_template, Path(config.model_name), tokenizer, day)


def _template_of_run(config: TrainingConfig, tokenizer: Tokenizer) -> PromptTemplate | None:
    if config.resume != "auto":
        identity = read_checkpoint(Path(config.resume)).state.identity
        return PromptTemplate.from_identity(identity["prompt_template"], tokenizer)
    begun = run_gone_on_with(config)
    described = read_training_config(begun) if begun else None
    return PromptTemplate.from_dict(described["prompt_template"], tokenizer) if described else None


PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "sentencepiece", "tokenizers", "safetensors")


def describe_run(
    config: TrainingConfig,
    encoder: ChatEncoder,
    base: BaseIdentity,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What training_config.json holds: every resolved setting and all that the adapter's user must do alike.

    Args:
        origin: where data from a hub comes from, see DataFiles.
    """
    tokenizer, versions = encoder.tokenizer, {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "settings": asdict(config),
        "prompt_template": encoder.template.to_dict(),
        "bos_ids": tokenizer.bos_ids,
        "eos_id": tokenizer.eos_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "versions": versions,
        **base.to_dict(),
        **({"data": origin} if origin else {}),
    }


def identity_of_base(checkpoint: Checkpoint) -> BaseIdentity:
    """What the base model of a checkpoint's run is known by.

    Its digests by tensor stand in the run's training_config.json: in the output folder above the checkpoint, or where
    the run had it. They are left out where it is not there any more, can't be read, or tells of another run.
    """
    fingerprint = checkpoint.state.identity["base_model"]
    folders = [*checkpoint.path.absolute().parents[1:2]]
    if checkpoint.state.settings:
        folders.append(Path(checkpoint.state.settings["output_dir"]))
    for folder in folders:
        with contextlib.suppress(UserError):  # it would only name what differs
            described = read_training_config(folder)
            if described and (base := BaseIdentity.from_dict(described)).fingerprint == fingerprint:
                return base
    return BaseIdentity(fingerprint)


def write_training_config(folder: Path, description: dict[str, Any]) -> None:
    """Write training_config.json at a run's start; it is whole at any instant."""
    write_durably(folder / TRAINING_CONFIG, json_text(description))
