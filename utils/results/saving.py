"""What a run hands over: PEFT's or transformers' own files, and beside them how they were made."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.training import TrainingConfig
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.files import flush, replace_durably, write_json
from utils.results.model_files import SHARD_BYTES, make_readable, stored_dtype, write_model
from utils.runs.description import TRAINING_CONFIG

STAGING = ".saving"
"""Folder within the output folder where a result is written before it takes its place."""


def save_result(
    config: TrainingConfig,
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    description: dict[str, Any],
    card: str,
) -> None:
    """Hand a run's result over into its output folder: an adapter, or the whole model with its tokenizer.

    Each file appears whole or not at all, whatever instant a power cut chooses.

    Args:
        tensors: (parameter name, tensor), whole and on the CPU: the adapter's, or all of a model's. A model's are taken
            one at a time and written before the next file's are asked for.
    """
    folder = Path(config.output_dir)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if config.method != "full":
        model.save_pretrained(str(staging), state_dict=dict(tensors))
    else:
        base = Path(config.model_name)
        dtype = getattr(torch, stored_dtype(base))
        template = PromptTemplate.from_dict(description["prompt_template"], Tokenizer(base))
        write_model(base, ((name, tensor.to(dtype)) for name, tensor in tensors), staging, template, SHARD_BYTES)
    (staging / "README.md").write_text(card, encoding="utf-8")
    write_json(staging / TRAINING_CONFIG, description)
    make_readable(staging)
    # training_config.json goes last: its `trained_steps` says that the files beside it are this run's.
    for file in sorted(staging.iterdir(), key=lambda file: file.name == TRAINING_CONFIG):
        flush(file)
        replace_durably(file, folder / file.name)
    staging.rmdir()
