"""What a training run needs of a card's memory, by part, estimated from the model's shape.

docs/benchmarks.md sets estimates beside measurements; every run on a GPU prints both at its end.
"""

import math
from dataclasses import dataclass

from configs.training import TrainingConfig
from utils.planning.layer_memory import LAYER_MEMORY
from utils.planning.shape import Layout, Shape
from utils.training.loss import CHUNK
from utils.training.setup import LayerKind, Setup
from utils.training.step_plan import StepPlan

WORKSPACES = 0.07e9
"""What cuBLAS takes from torch's allocator (the CUDA context lies outside of it)."""
FRAGMENTATION = 0.04
"""Share of what comes and goes that the allocator holds in gaps."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, of the fullest card.

    Attributes:
        weights: the frozen ones.
        trained: weights, gradients and optimizer of what is trained.
        activations: what layers keep between the passes; in full fine-tuning their weights in the compute dtype, too.
        temporary: what a layer's backward pass needs beside them.
        logits: what the end of the forward pass needs beside them; it comes before `temporary`, so the larger of the
            two counts.
        unmade: of `trained`, gradients that come only while the activations go.
        last: what the end of the backward pass needs in the place of activations.
    """

    weights: float
    trained: float
    activations: float
    temporary: float
    logits: float
    unmade: float
    last: float

    @property
    def peak(self) -> float:
        """The most that is allocated at a time."""
        between_the_passes = self.activations + max(self.temporary, self.logits) - self.unmade
        return self.fixed + max(between_the_passes, self.last) + WORKSPACES

    @property
    def fixed(self) -> float:
        """What is there whatever the step plan."""
        return self.weights + self.trained

    @property
    def needed(self) -> float:
        """What a card must have for it: the allocator can't fill every gap."""
        return self.peak + FRAGMENTATION * (self.peak - self.fixed)


def estimate(layout: Layout, kind: LayerKind, step_plan: StepPlan, step: float = math.inf) -> Estimate:
    """Memory of one process; of several cards the last is meant, which has the head and the layers that keep most.

    Args:
        kind: how layers are computed.
        step_plan: whose full rows are meant.
        step: the process's tokens of a step: where they go through at once, gradients come only while activations go.
    """
    each, layer, held = layout.each, LAYER_MEMORY[kind](layout), _held(layout)
    gathered, in_transit = _in_passing(layout) if layout.is_sharded else (0.0, 0.0)
    rows, tokens, kept = step_plan.rows, step_plan.token_budget, min(step_plan.kept_layers, held.layers)
    # As the forward pass ends, the activations of the last offloaded layer are still on the card.
    in_transfer = min(1, step_plan.offloads(held.layers - kept))
    activations = rows * tokens * ((kept + in_transfer) * layer.kept + (held.layers - kept) * layer.recomputed)
    temporary = tokens * layer.temporary + layer.weights + gathered
    # Layers that recompute come last in the backward pass, when those that kept theirs have let go of them.
    again = tokens * layer.kept + held.layer_copy if kept < held.layers else 0.0
    logits = _logits(layout, kind, rows * tokens) + gathered
    trained = held.trained / layout.shards
    weights, unmade = held.frozen / layout.shards, each.gradient * trained if step <= rows * tokens else 0.0
    if layout.rests_on_host:
        weights = trained = unmade = 0.0
    on_card = each.weight + each.gradient + (0.0 if layout.pages_optimizer else each.optimizer)
    return Estimate(
        weights=weights,
        trained=on_card * trained,
        activations=activations + held.layer_copy * kept,
        temporary=temporary if kept else temporary + again,
        logits=max(logits, held.layer_copy * (held.layers - kept)),
        unmade=unmade,
        last=temporary + again + in_transit,
    )


@dataclass(frozen=True)
class _Held:
    """What the last of a process's cards holds, before it is shared out among processes.

    Attributes:
        frozen: bytes of frozen weights.
        trained: parameters.
        layers: those with a backward pass.
        layer_copy: bytes of the copy in the compute dtype that each of them has until its backward pass.
    """

    frozen: float
    trained: float
    layers: int
    layer_copy: float


def _held(layout: Layout) -> _Held:
    shape, run = layout.shape, layout.trained
    here = math.ceil(shape.layers / layout.cards)
    others = shape.other_weights if layout.cards == 1 else shape.head_weights
    if run.is_adapter:
        frozen = layout.stored_bytes * here * shape.layer_weights + layout.compute_bytes * others
        return _Held(frozen, run.parameters * here / shape.layers, here, 0.0)
    frozen_layers = frozen = 0
    if run.frozen_layers is not None:
        frozen_layers = max(0, run.frozen_layers - (shape.layers - here))
        embedding = shape.head_weights if layout.cards == 1 else 0
        frozen = frozen_layers * shape.layer_weights + embedding
    trained = here * shape.layer_weights + others - frozen
    # Of wider weights autocast makes copies in the compute dtype. (FSDP gathers the layers' in that dtype instead.)
    is_copied = layout.is_narrowed and not layout.is_sharded
    copy = layout.compute_bytes * shape.layer_weights if is_copied else 0.0
    return _Held(layout.each.weight * frozen, trained, here - frozen_layers, copy)


def _logits(layout: Layout, kind: LayerKind, tokens: int) -> float:
    """Bytes that the end of the forward pass takes over so many tokens."""
    shape, c = layout.shape, layout.compute_bytes
    # The last norm's input and output and what it keeps, the labelled rows and their gradient; logits of a chunk and
    # their gradient, both also in fp32 (compiled, not at the same time); the gradient of the head, and its copy.
    of_norm = 12 + 2 * c if layout.has_wide_stream else 4 + 3 * c
    of_chunk = 8.0 if kind.startswith("compiled") else 8.0 + 2 * c
    logits = tokens * shape.hidden * of_norm + of_chunk * CHUNK * shape.vocabulary
    if "lm_head" in layout.trained.modules:
        logits += (4 + (c if layout.is_narrowed else 0)) * shape.head_weights
    return logits


def _in_passing(layout: Layout) -> tuple[float, float]:
    """Bytes of weights that FSDP has gathered, and of gradients that it is about to share out.

    Embedding and head lie gathered all the time, as they are stored, and of the layers one and the next, or all
    (SHARD_GRAD_OP). Gradients are whole as the backward pass makes them and in fp32: a layer's, or the others' when no
    layer is left.
    """
    shape, each = layout.shape, layout.each
    at_once = shape.layers if layout.gathers_all_layers else 2
    layers = at_once * layout.stored_bytes * shape.layer_weights
    if layout.trained.is_adapter:
        return layout.compute_bytes * shape.other_weights + layers, 0.0
    of_others = (each.gradient + 4) * shape.other_weights - layers
    return each.weight * shape.other_weights + layers, max((layout.compute_bytes + 4) * shape.layer_weights, of_others)


def laid_out(config: TrainingConfig, setup: Setup, shape: Shape) -> Layout:
    """How a run with these settings, or a variant of it, lies on the cards of a setup."""
    return Layout.of(config, shape, setup.precision.compute.itemsize, len(setup.world.devices), setup.shards)
