"""What a training run needs of a card's memory, by part, estimated from the model's shape.

docs/benchmarks.md sets estimates beside measurements; every run on a GPU prints both at its end.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.training import TrainingConfig
from utils.machine.world import sharding_group_size
from utils.model.decoder import causal_lm
from utils.planning.layer_memory import LAYERS, Kind, has_wide_stream, kind_of
from utils.planning.shape import BytesEach, Shape, adapter_parameters, trained_modules
from utils.training.loss import CHUNK
from utils.training.step_plan import StepPlan

if TYPE_CHECKING:
    from utils.training.trainer import Trainer

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
        """What is there whatever the micro-batch."""
        return self.weights + self.trained

    @property
    def needed(self) -> float:
        """What a card must have for it: the allocator can't fill every gap."""
        return self.peak + FRAGMENTATION * (self.peak - self.fixed)


def estimate(
    config: TrainingConfig,
    shape: Shape,
    compute_bytes: int,
    kind: Kind,
    step_plan: StepPlan,
    cards: int = 1,
    shards: int = 1,
    step: float = math.inf,
) -> Estimate:
    """Memory of one process.

    Args:
        kind: how layers are computed.
        step_plan: whose full rows are meant.
        cards: over which the process lays the layers; the estimate is for the last, which has the head and the layers
            that keep most.
        shards: processes that share weights, gradients and optimizer out (FSDP; see sharding_group_size).
        step: the process's tokens of a step: where they are one micro-batch, gradients come only while activations go.
    """
    weights, trained, layers, copy = _held(config, shape, compute_bytes, cards)
    gathered, in_transit = _in_passing(config, shape, compute_bytes) if config.enable_fsdp else (0.0, 0.0)
    each, layer = BytesEach.of(config), LAYERS[kind](config, shape, compute_bytes)
    rows, tokens, kept = step_plan.rows, step_plan.token_budget, min(step_plan.kept_layers, layers)
    in_transfer = min(1, step_plan.offloads(layers - kept))  # the last offloaded layer's, when the forward pass ends
    activations = rows * tokens * ((kept + in_transfer) * layer.kept + (layers - kept) * layer.recomputed)
    temporary = tokens * layer.temporary + layer.weights + gathered
    # Layers that recompute come last in the backward pass, when those that kept theirs have let go of them.
    again = tokens * layer.kept + copy if kept < layers else 0.0
    # The last norm's input and output and what it keeps, the labelled rows and their gradient; logits of a chunk and
    # their gradient, both also in fp32 (compiled, not at the same time); the gradient of the head, and its copy.
    of_norm = 12 + 2 * compute_bytes if has_wide_stream(config, shape, compute_bytes) else 4 + 3 * compute_bytes
    of_chunk = 8.0 if kind.startswith("compiled") else 8.0 + 2 * compute_bytes
    logits = rows * tokens * shape.hidden * of_norm + of_chunk * CHUNK * shape.vocabulary + gathered
    if "lm_head" in trained_modules(config, shape):
        logits += (4 + compute_bytes * (compute_bytes < each.weight)) * shape.head_weights
    on_card = each.weight + each.gradient + (0.0 if config.optimizer.startswith("paged") else each.optimizer)
    trained /= shards
    unmade = 0.0 if step > rows * tokens else each.gradient * trained
    if config.enable_fsdp and config.fsdp_config.fsdp_cpu_offload:
        weights = trained = unmade = 0.0  # they lie in host memory
    return Estimate(
        weights / shards,
        on_card * trained,
        activations + copy * kept,
        temporary if kept else temporary + again,
        max(logits, copy * (layers - kept)),
        unmade,
        temporary + again + in_transit,
    )


def _stored(config: TrainingConfig, compute_bytes: int) -> float:
    """Bytes of a frozen base's weight in a linear layer of the decoder."""
    return {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}.get(config.quantization or "", float(compute_bytes))


def _held(config: TrainingConfig, shape: Shape, compute_bytes: int, cards: int) -> tuple[float, float, int, float]:
    """What the last of a process's cards holds, shared out with nobody: bytes of frozen weights, trained parameters,
    layers with a backward pass, and bytes of each one's copy until then."""
    here = math.ceil(shape.layers / cards)
    others = shape.other_weights if cards == 1 else shape.head_weights
    if config.use_peft:
        weights = _stored(config, compute_bytes) * here * shape.layer_weights + compute_bytes * others
        return weights, adapter_parameters(config, shape) * here / shape.layers, here, 0.0
    frozen_layers = max(0, config.num_freeze_layers - (shape.layers - here)) if config.freeze_layers else 0
    frozen = frozen_layers * shape.layer_weights
    if config.freeze_layers and cards == 1:
        frozen += shape.head_weights  # the embedding
    trained = here * shape.layer_weights + others - frozen
    # Of wider weights autocast makes copies in the compute dtype. (FSDP gathers the layers' in that dtype instead.)
    weight = BytesEach.of(config).weight
    is_copied = compute_bytes < weight and not config.enable_fsdp
    return weight * frozen, trained, here - frozen_layers, compute_bytes * is_copied * shape.layer_weights


def _in_passing(config: TrainingConfig, shape: Shape, compute_bytes: int) -> tuple[float, float]:
    """Bytes of weights that FSDP has gathered, and of gradients that it is about to share out.

    Embedding and head lie gathered all the time, as they are stored, and of the layers one and the next, or all
    (SHARD_GRAD_OP). Gradients are whole as the backward pass makes them and in fp32: a layer's, or the others' when no
    layer is left.
    """
    each = BytesEach.of(config)
    at_once = shape.layers if config.fsdp_config.sharding_strategy == "SHARD_GRAD_OP" else 2
    layers = at_once * _stored(config, compute_bytes) * shape.layer_weights
    if config.use_peft:
        return compute_bytes * shape.other_weights + layers, 0.0
    of_others = (each.gradient + 4) * shape.other_weights - layers
    return each.weight * shape.other_weights + layers, max((compute_bytes + 4) * shape.layer_weights, of_others)


def estimate_of_run(trainer: "Trainer") -> Estimate:
    """The estimate for what a run has settled on."""
    model, config = causal_lm(trainer.model), trainer.config
    return estimate(
        config,
        Shape.of(model.config.to_dict()),
        trainer.precision.compute.itemsize,
        kind_of(trainer.loss_module.fused is not None, trainer.compiles),
        trainer.step_plan,
        cards=len(trainer.world.devices),
        shards=sharding_group_size(config.fsdp_config, trainer.world.size) if config.enable_fsdp else 1,
        step=trainer.largest_step,
    )
