"""What one decoder layer takes of a card's memory, by how layers are computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from configs.training import TrainingConfig
from utils.planning.shape import BytesEach, Shape, lora_targets, trained_modules

Kind = Literal["plain", "compiled plain", "fused", "compiled fused"]
"""How layers are computed: by transformers' modules or by one hand-written function a layer, compiled or not."""
NORMED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""The linear layers of a decoder layer that read what a norm gives."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer takes.

    Attributes:
        kept: a token, from the forward to the backward pass, where the layer keeps its activations.
        recomputed: the same where it computes them again: its input.
        temporary: a token, while the layer's backward pass runs.
        weights: whatever the number of tokens, while the layer runs: dequantised weights.
    """

    kept: float
    recomputed: float
    temporary: float
    weights: float


def plain(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """transformers' modules, as autograd keeps their tensors (a test counts them)."""
    h, i, c, names = shape.hidden, shape.intermediate, compute_bytes, trained_modules(config, shape)
    trains_norms = any(name.endswith("norm") for name in names)
    is_wide = has_wide_stream(config, shape, c)
    # From an fp32 stream, or from norms in fp32, each linear layer has its input as a copy of its own.
    is_copied = is_wide or (trains_norms and c < BytesEach.of(config).weight)
    norms = 2 * (4 + (4 if is_wide else c) * trains_norms) * h
    if shape.head_norms:
        norms += (4 + c * trains_norms) * (shape.query + shape.key_value)
    attention = c * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads  # queries, keys, values, outputs
    mlp = c * 3 * i  # gate, its activation, up
    inputs = _inputs(config, shape, c, is_copied)
    # Autograd lets go of what it has used, so little comes on top: a gradient as wide as the MLP, two of the stream.
    temporary = c * (i + 2 * h)
    # A weight beside its B, or its gradient. NF4 comes out in the compute dtype before; int8 times its fp32 scale is
    # fp32 before it is rounded.
    weights = {None: c, "4bit": 2 * c, "8bit": 4 + c}[config.quantization]
    largest = max(a * b for a, b in shape.linears().values())
    return LayerMemory(norms + attention + mlp + inputs, h * (4 if is_wide else c), temporary, weights * largest)


def compiled_plain(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """The same modules as torch.compile cuts them in two (a test counts); norms and activations are computed again."""
    layer, c = plain(config, shape, compute_bytes), compute_bytes
    stream = layer.recomputed + c * shape.hidden  # the input, and what attention adds to it
    attention = c * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads
    if shape.head_norms:
        attention += c * (shape.query + shape.key_value)  # queries and keys before their norms
    mlp = c * 2 * shape.intermediate  # gate and up
    return replace(layer, kept=stream + attention + mlp + _inputs(config, shape, c, is_copied=False))


def _inputs(config: TrainingConfig, shape: Shape, compute_bytes: int, is_copied: bool) -> float:
    """Bytes a token of what linear layers keep of their inputs for their own gradients or their adapters'.

    Args:
        is_copied: layers that read the same input have a copy each.
    """
    names, c = trained_modules(config, shape), compute_bytes
    narrow = c * config.lora_config.r * len(lora_targets(config, shape))
    if config.use_peft and config.lora_config.lora_dropout:  # what is left of each input, and which
        return narrow + (c + 1) * sum(width for name, (width, _out) in shape.linears().items() if name in names)
    readers = [sum(name in names for name in group) for group in NORMED]
    normed = shape.hidden * sum(count if is_copied else min(count, 1) for count in readers)
    return narrow + c * (normed + shape.intermediate * ("down_proj" in names))


def compiled_fused(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """One function a layer that keeps what its backward pass needs and nothing else, through torch.compile."""
    attention = 2 * shape.query + 2 * shape.key_value  # query and key after rotation, value, output
    kept = 2 * shape.hidden + attention + 2 * shape.intermediate  # input, hidden after attention, gate, up
    softmax_statistics = 4 * shape.heads
    lora = config.lora_config.r * len(lora_targets(config, shape))
    # Gradients of gate, up and their product; of input and output and between attention and MLP.
    temporary = 3 * shape.intermediate + 4 * shape.hidden
    largest_group = 2 * shape.intermediate * shape.hidden if config.quantization else 0  # gate and up together
    return LayerMemory(
        (kept + lora) * compute_bytes + softmax_statistics,
        shape.hidden * compute_bytes,
        temporary * compute_bytes,
        largest_group * compute_bytes,
    )


def fused(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """The same as it is written: what stands in fp32 between gate, up and their gradients has a place of its own.

    Fitted to NF4 and int8 bases on an H100 (four layers of the 7B shape, torch 2.11).
    """
    layer = compiled_fused(config, shape, compute_bytes)
    return replace(layer, temporary=layer.temporary + 22 * shape.intermediate)


LAYERS: dict[Kind, Callable[[TrainingConfig, Shape, int], LayerMemory]] = {
    "plain": plain,
    "compiled plain": compiled_plain,
    "fused": fused,
    "compiled fused": compiled_fused,
}


def kind_of(is_fused: bool, is_compiled: bool) -> Kind:
    """The name of what layers are computed by."""
    if is_fused:
        return "compiled fused" if is_compiled else "fused"
    return "compiled plain" if is_compiled else "plain"


def has_wide_stream(config: TrainingConfig, shape: Shape, compute_bytes: int) -> bool:
    """Whether the residual stream of the plain layers is fp32, as the embedding is that is trained."""
    return compute_bytes < BytesEach.of(config).weight and "embed_tokens" in trained_modules(config, shape)
