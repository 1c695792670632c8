"""A checkpoint of a run turned into what the run itself hands over at its end: a model, or an adapter."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.model.adapters import make_trainable
from utils.model.digests import whole_digest
from utils.model.folder import ModelFolder
from utils.model.weights import empty_base_model
from utils.results.model_card import model_card
from utils.results.saving import STAGING, save_result
from utils.runs.base_model import compared_by_first_rows, differences
from utils.runs.checkpoint import Checkpoint, load_tensors
from utils.runs.description import describe_run, identity_of_base


def consolidate(checkpoint: Checkpoint, base: ModelFolder, output: Path) -> TrainingConfig:
    """Write the weights of a checkpoint in PEFT's or transformers' form, tensor by tensor, on the CPU.

    Whatever number of processes saved it, sharded or not, the files are those of the run's own end at this step.

    Returns:
        The settings of the run, with `base` and `output` for its folders.

    Raises:
        UserError: the checkpoint is not of this base model, or of a kind that can't be converted; `output` holds files.
    """
    state = checkpoint.state
    config = replace(TrainingConfig.restored(state.settings), model_name=str(base.path), output_dir=str(output))
    if output.is_dir() and any(item.name != STAGING for item in output.iterdir()):
        raise UserError(
            _("{folder} is not empty. Give another --consolidated_model_path, or remove it.", folder=output)
        )
    if config.method not in ("full", "lora"):
        raise UserError(
            _(
                "{path} is a checkpoint of --peft_method {method}; LoRA and full fine-tuning can be converted. Go on "
                "with its run instead: the run saves its adapter when it ends.",
                path=checkpoint.path,
                method=config.method,
            )
        )
    tokenizer = Tokenizer(base.path)
    known = identity_of_base(checkpoint)
    if known.is_of_first_rows:
        print(compared_by_first_rows(checkpoint.path), file=sys.stderr, flush=True)
    if not known.is_of(base):
        raise _made_for(_("another base model"), checkpoint, differences(known.digests, base.digests))
    if state.identity["tokenizer"] != tokenizer.fingerprint:
        raise _made_for(_("another tokenizer"), checkpoint)
    try:
        template = PromptTemplate.from_identity(state.identity["prompt_template"], tokenizer)
    except ValueError as error:
        raise UserError(
            _(
                "{path} was trained with another prompt template than this version has. Go on with its run in the "
                "version that began it: the run saves its result when it ends.",
                path=checkpoint.path,
            )
        ) from error
    # fp32, as the run trains; nothing is loaded into this model, it tells names and shapes.
    model = empty_base_model(base, torch.float32)
    model = make_trainable(model, config)
    if config.method == "full":
        kept = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        before = {name: known.sha256[name] for name in kept if name in known.sha256}
        if told := differences(before, {name: whole_digest(base.tensor(name)) for name in before}):
            raise _made_for(_("another base model"), checkpoint, told)
    description = describe_run(config, ChatEncoder(template, tokenizer), known)
    description["trained_steps"] = checkpoint.step
    facts = {_("base model"): f"`{config.model_name}`", _("steps"): str(checkpoint.step)}
    tensors = _tensors(model, checkpoint, base if config.method == "full" else None)
    save_result(config, model, tensors, description, model_card(config, facts))
    return config


def _made_for(what: str, checkpoint: Checkpoint, told: str = "") -> UserError:
    message = _(
        "{path} is a checkpoint of a run with {what}: it was trained over {trained_on}. Give that model with "
        "--HF_model_path_or_name.",
        path=checkpoint.path,
        what=what,
        trained_on=checkpoint.state.settings["model_name"],
    )
    return UserError(f"{message} {told}".strip())


def _tensors(model: nn.Module, checkpoint: Checkpoint, base: ModelFolder | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What was trained, from the checkpoint; and of a whole model, what stayed as it was, from its base."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            load_tensors(checkpoint, {"weights": {name: tensor}})
            yield name, tensor
        elif base:
            yield name, base.tensor(name)
