"""Whether a run can fit at all, and in which form of the base model it would."""

import math
from dataclasses import replace

import torch

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from configs.training import TrainingConfig
from utils.machine.memory import limit_bytes
from utils.planning.estimate import Estimate, estimate, laid_out
from utils.planning.shape import Shape
from utils.training.setup import Setup
from utils.training.step_plan import StepPlan


def check_memory(config: TrainingConfig, setup: Setup, shape: Shape) -> None:
    """Refuse, before anything is loaded, a run whose weights alone do not fit on the cards.

    Raises:
        UserError: with the least that would do, for each way to hold the base model.
    """
    if setup.world.device.type == "cuda":
        total = min(torch.cuda.get_device_properties(device).total_memory for device in setup.world.devices)
        refuse_too_little(config, setup, shape, min(limit_bytes(config.gpu_memory_gb), total))


def refuse_too_little(config: TrainingConfig, setup: Setup, shape: Shape, limit: float) -> None:
    """Refuse a run whose weights alone do not fit on cards of `limit` bytes; see check_memory."""

    def least(variant: TrainingConfig) -> Estimate:
        return estimate(laid_out(variant, setup, shape), "plain", StepPlan(setup.longest, 0))

    if (fixed := least(config).fixed) <= limit:
        return
    rows = [
        f"  {name:20}  --gpu_memory_gb {math.ceil(least(variant).needed / 1e8) / 10:.1f}"
        for name, variant in variants(config)
    ]
    raise UserError(
        _(
            "Weights and what is trained take {fixed} GB of a card, and {limit} GB of it may be used (--gpu_memory_gb, "
            "or the card's size). The least that would do, with the longest example:\n{rows}",
            fixed=f"{fixed / 1e9:.1f}",
            limit=f"{limit / 1e9:.1f}",
            rows="\n".join(rows),
        )
    )


def variants(config: TrainingConfig) -> list[tuple[str, TrainingConfig]]:
    """The same run with the base model held in each way, by name; of a full fine-tuning also LoRA instead."""
    found = [] if config.method != "full" else [(_("full fine-tuning"), config)]
    adapted = replace(config, use_peft=True, freeze_layers=False, num_freeze_layers=1, pure_bf16=False)
    if adapted.method == "llama_adapter":  # can't be quantised
        return [*found, ("16 bit", adapted)]
    choices: tuple[Quantization | None, ...] = (None, "8bit", "4bit")
    names = [f"--quantization {choice}" if choice else "16 bit" for choice in choices]
    return found + [(name, replace(adapted, quantization=q)) for name, q in zip(names, choices, strict=True)]
