"""An adapter's folder: is it whole, does it belong to this base model, and how it is put over it again."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.peft import LoraConfig
from configs.training import TrainingConfig
from ft_datasets.prompt import PromptTemplate, choose_template
from ft_datasets.tokenizer import Tokenizer
from utils.files import read_json, sha256
from utils.model.adapters import adapter_file, stored_lora
from utils.model.folder import ADAPTER_CONFIG, ModelFolder
from utils.model.lora_forward import add_before_rounding
from utils.model.tensor_files import is_whole
from utils.runs.base_model import BaseIdentity, compared_by_first_rows, differences
from utils.runs.description import described_template, read_training_config, run_gone_on_with


def load_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Put a saved adapter over a base model, for inference, in `dtype`.

    Raises:
        UserError: the folder holds no adapter, or one for a model of another shape.
    """
    import peft

    check_adapter_folder(folder)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # PEFT's own words for shapes that differ
        raise UserError(
            _(
                "The adapter in {folder} does not fit this base model:\n  {error}\nGive the base model that it was "
                "trained on.",
                folder=folder,
                error="\n  ".join(line.strip() for line in str(error).strip().split("\n")[:2]),
            )
        ) from error
    for name, parameter in adapted.named_parameters():
        # DoRA's magnitudes stay as exact as the lengths that they are set beside.
        if parameter.dtype == torch.float32 and ".lora_magnitude_vector." not in name:
            parameter.data = parameter.data.to(dtype)
    if dtype != torch.float32 and getattr(adapted.active_peft_config, "use_dora", False):
        add_before_rounding(adapted)
    return adapted.eval()


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder that holds no adapter, or half of one, saying what it holds instead."""
    if (folder / ADAPTER_CONFIG).is_file():
        read_json(folder / ADAPTER_CONFIG)
        files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
        broken = [file.name for file in files if file.is_file() and not is_whole(file)]
        if broken:
            raise UserError(
                _(
                    "The adapter in {folder} is not whole: {files} cut short or damaged. Copy it again.",
                    folder=folder,
                    files=", ".join(broken),
                )
            )
        return
    if (folder / "config.json").is_file():
        raise UserError(
            _(
                "{folder} holds a whole model, not an adapter. Use it as the base: --base_model {folder} "
                "--lora_weights ''",
                folder=folder,
            )
        )
    raise UserError(
        _(
            "There is no adapter in {folder} (no {file}). Train one with llama_finetuning.py --output_dir {folder}, "
            "give the folder that holds it, or --lora_weights '' for the base model alone.",
            folder=folder,
            file=ADAPTER_CONFIG,
        )
    )


def template_of(adapter_folder: Path, base: ModelFolder, tokenizer: Tokenizer) -> PromptTemplate:
    """The template that an adapter was trained with, once it is clear that base model and tokenizer are its own.

    Raises:
        UserError: another base model or another tokenizer.
    """
    described = read_training_config(adapter_folder)
    if described is None:
        return choose_template("auto", base.path, tokenizer)
    known = BaseIdentity.from_dict(described)
    if described["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise _made_for(_("another tokenizer"), adapter_folder, described, base)
    if known.is_of_first_rows:
        print(compared_by_first_rows(adapter_folder), file=sys.stderr, flush=True)
    if not known.is_of(base):
        told = differences(known.digests, base.digests)
        raise _made_for(_("another base model"), adapter_folder, described, base, told)
    return described_template(adapter_folder, described, tokenizer)


def second_stage(
    config: TrainingConfig, base: ModelFolder, tokenizer: Tokenizer
) -> tuple[TrainingConfig, PromptTemplate]:
    """The settings and the template of a run that starts from an adapter's weights, which has them from there.

    Once the run has checkpoints, it has them from its own folder, and the adapter may be gone.

    Raises:
        UserError: the adapter is none that a run could have made, belongs to another base model or tokenizer, or a flag
            contradicts it.
    """
    folder = Path(config.from_adapter)
    begun = run_gone_on_with(config)
    described = read_training_config(begun) if begun else None
    if begun and described and described["settings"].get("from_adapter") == config.from_adapter:
        folder, lora = begun, TrainingConfig.restored(described["settings"]).lora_config
    else:
        check_adapter_folder(folder)
        lora = stored_lora(folder)
    template, given = template_of(folder, base, tokenizer), asdict(config.lora_config)
    lora = replace(lora, lora_dropout=config.lora_config.lora_dropout)
    for name, stored in asdict(lora).items():
        if _text(given[name]) not in (_text(getattr(LoraConfig(), name)), _text(stored)):
            raise UserError(
                _(
                    "--lora_config.{name} {value}: the adapter of --from_adapter has {stored}. Leave the flag out.",
                    name=name,
                    value=_text(given[name]),
                    stored=_text(stored) or "-",
                )
            )
    return replace(config, lora_config=lora), template


def _text(value: Any) -> str:
    """A setting as text; names in whatever order are the same setting."""
    return ",".join(sorted(value)) if isinstance(value, list) else str(value)


def origin_of_adapter(config: TrainingConfig, is_new: bool) -> dict[str, str]:
    """What a run's description keeps of the adapter that it started from: its folder and its weights' SHA-256.

    Args:
        is_new: the run begins now; one that goes on has kept it.
    """
    if not is_new:
        begun = run_gone_on_with(config)
        return ((read_training_config(begun) if begun else None) or {}).get("from_adapter", {})
    return {"folder": config.from_adapter, "sha256": sha256(adapter_file(Path(config.from_adapter)))}


def check_whole_base(adapter_folder: Path, base: ModelFolder, sha256: dict[str, str]) -> None:
    """Refuse a base model that looks like the one that an adapter was trained over, and is not the same throughout.

    Args:
        sha256: of each of its tensors, read whole.

    Raises:
        UserError: some tensors are others.
    """
    described = read_training_config(adapter_folder)
    if described and (told := differences(BaseIdentity.from_dict(described).sha256, sha256)):
        raise _made_for(_("another base model"), adapter_folder, described, base, told)


def _made_for(
    what: str, adapter_folder: Path, described: dict[str, Any], base: ModelFolder, told: str = ""
) -> UserError:
    message = _(
        "The adapter in {adapter} was trained over {what}, not over {base}: it was trained over {trained_on}. "
        "Give that model with --base_model, in training with --model_name.",
        adapter=adapter_folder,
        what=what,
        base=base.path,
        trained_on=described["settings"]["model_name"],
    )
    return UserError(f"{message} {told}".strip())
