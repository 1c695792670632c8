"""training_config.json: what made an adapter or a model, and all that its user must do alike."""

import contextlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.files import json_text, read_json, write_durably
from utils.runs.base_model import BaseIdentity
from utils.runs.checkpoint import Checkpoint

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


PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "sentencepiece", "tokenizers", "safetensors")


def describe_run(
    config: TrainingConfig,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    base: BaseIdentity,
    origin: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What training_config.json holds: every resolved setting and all that the adapter's user must do alike.

    Args:
        origin: where data from a hub comes from, see DataFiles.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "settings": asdict(config),
        "prompt_template": template.to_dict(),
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
