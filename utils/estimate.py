"""What a training run needs of a card's memory, by part, estimated from the model's shape.

docs/benchmarks.md sets estimates beside measurements; every run on a GPU prints both at its end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from configs.peft import ALL_LINEAR
from configs.training import TrainingConfig
from utils.activations import MicroBatch
from utils.llama import causal_lm
from utils.loss import CHUNK
from utils.optimization import BytesEach
from utils.sharding import sharding_group_size

if TYPE_CHECKING:
    from utils.training import Trainer

Kind = Literal["plain", "compiled plain", "fused", "compiled fused"]
"""How layers are computed: by transformers' modules or by one hand-written function a layer, compiled or not."""
WORKSPACES = 0.07e9
"""What cuBLAS takes from torch's allocator (the CUDA context lies outside of it)."""
FRAGMENTATION = 0.04
"""Share of what comes and goes that the allocator holds in gaps."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's configuration that memory depends on; `query` and `key_value` are all heads' widths."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    query: int
    key_value: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read from what config.json holds."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            config["vocab_size"],
            heads,
            head_dim * heads,
            head_dim * (config.get("num_key_value_heads") or heads),
            bool(config.get("tie_word_embeddings", False)),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of a layer's linear modules."""
        h, i, q, kv = self.hidden, self.intermediate, self.query, self.key_value
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters of the linear modules of one layer."""
        return sum(a * b for a, b in self.linears().values())

    @property
    def decoder_weights(self) -> int:
        """Parameters of all linear modules of the decoder."""
        return self.layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        """Parameters of the output head, and as many of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def other_weights(self) -> int:
        """Parameters of embedding, head and norms."""
        return self.head_weights * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden


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
    h, i, targets = shape.hidden, shape.intermediate, _targets(config, shape)
    is_full = not config.use_peft
    # Over trained fp32 weights the residual stream is fp32, and autocast makes each linear layer a copy of its own.
    is_wide = is_full and BytesEach.of(config).weight > compute_bytes
    norms = 2 * (4 + (0 if not is_full else 4 if is_wide else compute_bytes)) * h
    attention = compute_bytes * 4 * shape.query + 4 * shape.heads  # all heads' queries, keys, values, outputs
    mlp = compute_bytes * 3 * i  # gate, its activation, up
    if is_full:
        inputs = compute_bytes * ((5 if is_wide else 2) * h + i)
    elif config.lora_config.lora_dropout:  # what is left of each input, and which
        inputs = (compute_bytes + 1) * sum(shape.linears()[name][0] for name in targets)
    else:
        groups = (h, {"q_proj", "k_proj", "v_proj"}), (h, {"gate_proj", "up_proj"}), (i, {"down_proj"})
        inputs = compute_bytes * sum(width for width, names in groups if names & {*targets})
    narrow = compute_bytes * config.lora_config.r * len(targets)
    # Autograd lets go of what it has used, so little comes on top: a gradient as wide as the MLP, two of the stream.
    temporary = i + 2 * h
    # A weight beside its B, or its gradient. NF4 comes out in the compute dtype before; int8 times its fp32 scale is
    # fp32 before it is rounded.
    weights = {None: compute_bytes, "4bit": 2 * compute_bytes, "8bit": 4 + compute_bytes}[config.quantization]
    return LayerMemory(
        norms + attention + mlp + inputs + narrow,
        h * (4 if is_wide else compute_bytes),
        temporary * compute_bytes,
        weights * max(a * b for a, b in shape.linears().values()),
    )


def compiled_plain(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """The same modules through torch.compile, which fuses norms away; fitted to a bf16 base on an H100."""
    layer = plain(config, shape, compute_bytes)
    return replace(layer, kept=0.86 * layer.kept)


def compiled_fused(config: TrainingConfig, shape: Shape, compute_bytes: int) -> LayerMemory:
    """One function a layer that keeps what its backward pass needs and nothing else, through torch.compile."""
    attention = 2 * shape.query + 2 * shape.key_value  # query and key after rotation, value, output
    kept = 2 * shape.hidden + attention + 2 * shape.intermediate  # input, hidden after attention, gate, up
    softmax_statistics = 4 * shape.heads
    lora = config.lora_config.r * len(_targets(config, shape))
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


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, of the fullest card.

    Attributes:
        weights: the frozen ones.
        trained: weights, gradients and optimizer of what is trained.
        activations: what layers keep between the passes; in full fine-tuning their weights in the compute dtype, too.
        temporary: what a layer's backward pass needs beside them.
        logits: what the loss needs beside them; it comes before `temporary`, so the larger of the two counts.
        unmade: of `trained`, gradients that come only while the activations go.
        in_transit: gradients on their way to the processes that keep them, when the activations have gone.
    """

    weights: float
    trained: float
    activations: float
    temporary: float
    logits: float
    unmade: float
    in_transit: float

    @property
    def peak(self) -> float:
        """The most that is allocated at a time."""
        between_the_passes = self.activations + max(self.temporary, self.logits) - self.unmade
        return self.fixed + max(between_the_passes, self.temporary + self.in_transit) + WORKSPACES

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
    micro_batch: MicroBatch,
    cards: int = 1,
    shards: int = 1,
    step: int = 0,
) -> Estimate:
    """Memory of one process.

    Args:
        kind: how layers are computed.
        micro_batch: whose full rows are meant.
        cards: over which the process lays the layers; the estimate is for the last, which has the head and the layers
            that keep most.
        shards: processes that share weights, gradients and optimizer out (FSDP; see sharding_group_size).
        step: the process's tokens of a step: whether its gradients are there from an earlier micro-batch.
    """
    weights, trained, layers, copies = _held(config, shape, compute_bytes, cards)
    gathered, in_transit = _in_passing(config, shape, compute_bytes) if config.enable_fsdp else (0.0, 0.0)
    each, layer = BytesEach.of(config), LAYERS[kind](config, shape, compute_bytes)
    rows, tokens, kept = micro_batch.rows, micro_batch.token_budget, min(micro_batch.kept_layers, layers)
    in_transfer = min(1, micro_batch.offloads(layers - kept))  # the last offloaded layer's, when the forward pass ends
    activations = rows * tokens * ((kept + in_transfer) * layer.kept + (layers - kept) * layer.recomputed)
    temporary = tokens * layer.temporary + layer.weights + gathered
    if kept < layers:
        # Layers that recompute come last in the backward pass, when those that kept theirs have let go of them.
        again = temporary + tokens * layer.kept - tokens * kept * layer.kept
        temporary = max(temporary if kept else 0.0, again)
    # The last norm's fp32 copy, its output, the labelled rows and their gradient; logits of a chunk twice in fp32; the
    # gradient of the head, and its copy.
    logits = rows * tokens * shape.hidden * (4 + 3 * compute_bytes) + 2 * 4.0 * CHUNK * shape.vocabulary + gathered
    if not config.use_peft:
        logits += (4 + (compute_bytes if compute_bytes < each.weight else 0)) * shape.head_weights
    on_card = each.weight + each.gradient + (0.0 if config.optimizer.startswith("paged") else each.optimizer)
    trained /= shards
    unmade = 0.0 if step > rows * tokens else each.gradient * trained
    if config.enable_fsdp and config.fsdp_config.fsdp_cpu_offload:
        weights = trained = unmade = 0.0  # they lie in host memory
    return Estimate(weights / shards, on_card * trained, activations + copies, temporary, logits, unmade, in_transit)


def _stored(config: TrainingConfig, compute_bytes: int) -> float:
    """Bytes of a frozen base's weight in a linear layer of the decoder."""
    return {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}.get(config.quantization or "", float(compute_bytes))


def _held(config: TrainingConfig, shape: Shape, compute_bytes: int, cards: int) -> tuple[float, float, int, float]:
    """What the last of a process's cards holds, shared out with nobody: bytes of frozen weights, trained parameters,
    layers with a backward pass, and bytes of copies from the forward to the backward pass."""
    here = math.ceil(shape.layers / cards)
    others = shape.other_weights if cards == 1 else shape.head_weights
    if config.use_peft:
        weights = _stored(config, compute_bytes) * here * shape.layer_weights + compute_bytes * others
        return weights, adapter_parameters(config, shape) * here / shape.layers, here, 0.0
    frozen_layers = max(0, config.num_freeze_layers - (shape.layers - here)) if config.freeze_layers else 0
    frozen, layers = frozen_layers * shape.layer_weights, here - frozen_layers
    if config.freeze_layers and cards == 1:
        frozen += shape.head_weights  # the embedding
    # Of wider weights autocast keeps copies in the compute dtype. (FSDP gathers the layers' in that dtype instead.)
    weight = BytesEach.of(config).weight
    copied = compute_bytes if compute_bytes < weight and not config.enable_fsdp else 0
    trained = here * shape.layer_weights + others - frozen
    return weight * frozen, trained, layers, copied * layers * shape.layer_weights


def _in_passing(config: TrainingConfig, shape: Shape, compute_bytes: int) -> tuple[float, float]:
    """Bytes of weights that FSDP has gathered, and of gradients that it is about to share out.

    Embedding and head lie gathered all the time, as they are stored, and of the layers one and the next. Gradients are
    whole as the backward pass makes them and in fp32: a layer's, or the others' when no layer is left.
    """
    each = BytesEach.of(config)
    layers = 2 * _stored(config, compute_bytes) * shape.layer_weights
    if config.use_peft:
        return compute_bytes * shape.other_weights + layers, 0.0
    of_others = (each.gradient + 4) * shape.other_weights - layers
    return each.weight * shape.other_weights + layers, max((compute_bytes + 4) * shape.layer_weights, of_others)


def trained_parameters(config: TrainingConfig, shape: Shape) -> int:
    """How many parameters are trained."""
    if config.use_peft:
        return adapter_parameters(config, shape)
    frozen = 0
    if config.freeze_layers:
        frozen = config.num_freeze_layers * (shape.layer_weights + 2 * shape.hidden) + shape.head_weights
    return shape.decoder_weights + shape.other_weights - frozen


def adapter_parameters(config: TrainingConfig, shape: Shape) -> int:
    """Trainable parameters of the chosen adapter."""
    if config.peft_method == "prefix":
        return config.prefix_config.num_virtual_tokens * shape.layers * 2 * shape.key_value
    if config.peft_method == "llama_adapter":
        settings = config.llama_adapter_config
        return min(settings.adapter_layers, shape.layers) * (settings.adapter_len * shape.hidden + 1)
    linears = shape.linears()
    lora = shape.layers * config.lora_config.r * sum(sum(linears[name]) for name in _targets(config, shape))
    embedding, norm = shape.vocabulary * shape.hidden, shape.layers * shape.hidden
    whole = {
        "embed_tokens": embedding,
        "lm_head": embedding,
        "norm": 2 * norm + shape.hidden,
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
    }
    return lora + sum(whole.get(name, 0) for name in config.lora_config.modules_to_save)


def _targets(config: TrainingConfig, shape: Shape) -> list[str]:
    if not config.use_peft or config.peft_method != "lora":
        return []
    chosen = config.lora_config.target_modules
    return [name for name in shape.linears() if name in chosen or ALL_LINEAR in chosen]


def estimate_of_run(trainer: "Trainer") -> Estimate:
    """The estimate for what a run has settled on."""
    model, config = causal_lm(trainer.model), trainer.config
    return estimate(
        config,
        Shape.of(model.config.to_dict()),
        trainer.precision.compute.itemsize,
        kind_of(trainer.loss_module.fused is not None, trainer.compiles),
        trainer.micro_batch,
        cards=len(trainer.world.devices),
        shards=sharding_group_size(config.fsdp_config, trainer.world.size) if config.enable_fsdp else 1,
        step=trainer.largest_step,
    )
