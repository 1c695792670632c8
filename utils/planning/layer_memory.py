"""What one decoder layer takes of a card's memory, by how layers are computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from utils.planning.shape import Layout
from utils.training.setup import LayerKind

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


def plain(layout: Layout) -> LayerMemory:
    """Memory of transformers' modules, as autograd keeps their tensors (a test counts them)."""
    shape, c, trained = layout.shape, layout.compute_bytes, layout.trained.modules
    h, i = shape.hidden, shape.intermediate
    trains_norms = any(name.endswith("norm") for name in trained)
    stream = 4 if layout.has_wide_stream else c
    # From an fp32 stream, or from norms in fp32, each linear layer has its input as a copy of its own.
    is_copied = layout.has_wide_stream or (trains_norms and layout.is_narrowed)
    norms = 2 * (4 + (stream if trains_norms else 0)) * h
    if shape.head_norms:
        norms += (4 + (c if trains_norms else 0)) * (shape.query + shape.key_value)
    attention = c * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads  # queries, keys, values, outputs
    mlp = c * 3 * i  # gate, its activation, up
    inputs = _inputs(layout, is_copied)
    # Autograd lets go of what it has used, so little comes on top: a gradient as wide as the MLP, two of the stream.
    temporary = c * (i + 2 * h)
    # A weight beside its B, or its gradient. NF4 comes out in the compute dtype before; int8 times its fp32 scale is
    # fp32 before it is rounded.
    weights = {None: c, "4bit": 2 * c, "8bit": 4 + c}[layout.quantization]
    if layout.trained.has_magnitudes:  # before that, in fp32, twice, for the lengths of its rows
        weights = max(weights, c + 8)
    largest = max(a * b for a, b in shape.linears().values())
    return LayerMemory(norms + attention + mlp + inputs, h * stream, temporary, weights * largest)


def compiled_plain(layout: Layout) -> LayerMemory:
    """Memory of transformers' modules under torch.compile, as it cuts them in two (a test counts).

    It computes norms and activations again.
    """
    layer, shape, c = plain(layout), layout.shape, layout.compute_bytes
    stream = layer.recomputed + c * shape.hidden  # the input, and what attention adds to it
    attention = c * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads
    if shape.head_norms:
        attention += c * (shape.query + shape.key_value)  # queries and keys before their norms
    mlp = c * 2 * shape.intermediate  # gate and up
    return replace(layer, kept=stream + attention + mlp + _inputs(layout, is_copied=False))


def _inputs(layout: Layout, is_copied: bool) -> float:
    """Bytes a token of what linear layers keep of their inputs for their own gradients or their adapters'.

    DoRA's keep what they give, too, for their magnitudes' gradients.

    Args:
        is_copied: layers that read the same input have a copy each.
    """
    trained, shape, c = layout.trained, layout.shape, layout.compute_bytes
    narrow = c * trained.rank * len(trained.lora)
    if trained.has_magnitudes:
        narrow += c * sum(shape.linears()[name][1] for name in trained.lora)
    if trained.has_dropout:  # what is left of each input, and which
        linears = shape.linears().items()
        return narrow + (c + 1) * sum(width for name, (width, _out) in linears if name in trained.modules)
    readers = [sum(name in trained.modules for name in group) for group in NORMED]
    normed = shape.hidden * sum(count if is_copied else min(count, 1) for count in readers)
    mlp = shape.intermediate if "down_proj" in trained.modules else 0
    return narrow + c * (normed + mlp)


def compiled_fused(layout: Layout) -> LayerMemory:
    """Memory of the fused layers under torch.compile: they keep what their backward pass needs and nothing else."""
    shape, trained, c = layout.shape, layout.trained, layout.compute_bytes
    attention = 2 * shape.query + 2 * shape.key_value  # query and key after rotation, value, output
    kept = 2 * shape.hidden + attention + 2 * shape.intermediate  # input, hidden after attention, gate, up
    softmax_statistics = 4 * shape.heads
    lora = trained.rank * len(trained.lora)
    # Gradients of gate, up and their product; of input and output and between attention and MLP.
    temporary = 3 * shape.intermediate + 4 * shape.hidden
    largest_group = 2 * shape.intermediate * shape.hidden if layout.quantization else 0  # gate and up together
    return LayerMemory((kept + lora) * c + softmax_statistics, shape.hidden * c, temporary * c, largest_group * c)


def fused(layout: Layout) -> LayerMemory:
    """Memory of the fused layers without torch.compile.

    What stands in fp32 between gate, up and their gradients has a place of its own then.
    Fitted to NF4 and int8 bases on an H100 (four layers of the 7B shape, torch 2.11).
    """
    layer = compiled_fused(layout)
    return replace(layer, temporary=layer.temporary + 22 * layout.shape.intermediate)


LAYER_MEMORY: dict[LayerKind, Callable[[Layout], LayerMemory]] = {
    "plain": plain,
    "compiled plain": compiled_plain,
    "fused": fused,
    "compiled fused": compiled_fused,
}
