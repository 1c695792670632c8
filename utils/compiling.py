"""torch.compile: whether a run gains by it, and how the plain layers are compiled."""

import torch
from torch import nn

from utils.llama import causal_lm

PAYS_FROM_TOKENS = 1_000_000
"""A run this long wins back the minute that compiling takes (plain layers on an H100: 10,000 -> 17,000 tokens/s)."""


def should_compile(choice: bool | None, device: torch.device, tokens: int) -> bool:
    """Whether a run over so many tokens compiles; `choice` is the user's, None = decide."""
    if device.type != "cuda":
        return False
    return tokens >= PAYS_FROM_TOKENS if choice is None else choice


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer, in place. They share one compiled function, whatever a row's length is."""
    # Adapters' scalings are constants; as inputs they would be converted on the CPU, by C++ code to be compiled.
    torch._dynamo.config.specialize_float = True
    for layer in causal_lm(model).model.layers:
        layer.compile(dynamic=True)
