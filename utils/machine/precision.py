"""Which floating-point types a run computes in and keeps its weights in."""

from dataclasses import dataclass

import torch

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig


@dataclass(frozen=True)
class Precision:
    """The types of a run, and why, for the user."""

    compute: torch.dtype
    weights: torch.dtype
    reason: str


def choose_precision(device: torch.device, config: TrainingConfig) -> Precision:
    """The types that a training run has on a device.

    Raises:
        UserError: the device lacks the type that is asked for.
    """
    if config.pure_bf16:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                _("--pure_bf16: this card has no bf16. Train an adapter (--use_peft), or use --optimizer adamw_8bit.")
            )
        return Precision(torch.bfloat16, torch.bfloat16, "--pure_bf16")
    compute, reason = half_precision(device, config.use_fp16)
    if not config.mixed_precision:
        compute, reason = torch.float32, "--mixed_precision False"
    # Weights that are trained stay in fp32: small updates would vanish in 16 bits.
    return Precision(compute, torch.float32 if config.method == "full" else compute, reason)


def half_precision(device: torch.device, use_fp16: bool = False) -> tuple[torch.dtype, str]:
    """The 16-bit type to compute in on a device (fp32 on a CPU), and why."""
    if device.type == "cpu":
        if use_fp16:
            return torch.float32, _("a CPU computes fp16 ten times slower, so --use_fp16 is left aside here")
        return torch.float32, _("the usual choice on a CPU")
    if use_fp16:
        return torch.float16, "--use_fp16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, _("the card has it")
    return torch.float16, _("this card has no bf16")
