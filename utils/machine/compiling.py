"""torch.compile: whether a card has it, and whether a run gains by it."""

import torch

from configs.errors import UserError
from configs.messages import _

PAYS_FROM_TOKENS = 1_000_000
"""A run this long wins back the minute that compiling takes (plain layers on an H100: 10,000 -> 17,000 tokens/s)."""
OLDEST_CARD = (7, 0)
"""Compute capability of the oldest cards (Volta) that torch's compiler makes kernels for, through Triton."""


def check_compiler(choice: bool | None, device: torch.device) -> None:
    """Refuse to compile for a card that is too old.

    Raises:
        UserError: it is.
    """
    if choice and device.type == "cuda" and not _has_compiler(device):
        raise UserError(
            _("--torch_compile true: torch's compiler makes no code for cards older than V100. Leave it out.")
        )


def should_compile(choice: bool | None, device: torch.device, tokens: int) -> bool:
    """Whether a run over so many tokens compiles; `choice` is the user's, None = decide."""
    if not _has_compiler(device):
        return False
    return tokens >= PAYS_FROM_TOKENS if choice is None else choice


def _has_compiler(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CARD
