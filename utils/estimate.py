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
NORMED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""The linear layers of a decoder layer that read what a norm gives."""
FRAGMENTATION = 0.04
"""Share of what comes and goes that the allocator holds in gaps."""


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration memory depends on.

    Attributes:
        query, key_value: all heads' widths together.
        tied: embedding and head are one tensor.
        head_norms: each head of queries and keys is normalised.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    query: int
    key_value: int
    tied: bool
    head_norms: bool

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
            config.get("model_type") == "qwen3",
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
    h, i, c, names = shape.hidden, shape.intermediate, compute_bytes, _trained(config, shape)
    trains_norms = any(name.endswith("norm") for name in names)
    is_wide = _is_wide(config, shape, c)
    # From an fp32 stream, or from norms in fp32, each linear layer has its input as a copy of its own.
    is_copied = is_wide or (trains_norms and c < BytesEach.of(config).weight)
    norms = 2 * (4 + (4 if is_wide else c) * trains_norms) * h
    if shape.head_norms:
        norms += (4 + c * trains_norms) * (shape.query + shape.key_value)
    attention = c * 4 * shape.query + 4 * shape.heads  # all heads' queries, keys, values, outputs
    mlp = c * 3 * i  # gate, its activation, up
    if config.use_peft and config.lora_config.lora_dropout:  # what is left of each input, and which
        inputs = (c + 1) * sum(width for name, (width, _out) in shape.linears().items() if name in names)
    else:
        readers = [sum(name in names for name in group) for group in NORMED]
        inputs = c * h * sum(count if is_copied else min(count, 1) for count in readers) + c * i * (
            "down_proj" in names
        )
    narrow = c * config.lora_config.r * len(_targets(config, shape))
    # Autograd lets go of what it has used, so little comes on top: a gradient as wide as the MLP, two of the stream.
    temporary = c * (i + 2 * h)
    # A weight beside its B, or its gradient. NF4 comes out in the compute dtype before; int8 times its fp32 scale is
    # fp32 before it is rounded.
    weights = {None: c, "4bit": 2 * c, "8bit": 4 + c}[config.quantization]
    largest = max(a * b for a, b in shape.linears().values())
    return LayerMemory(
        norms + attention + mlp + inputs + narrow, h * (4 if is_wide else c), temporary, weights * largest
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
    micro_batch: MicroBatch,
    cards: int = 1,
    shards: int = 1,
    step: float = math.inf,
) -> Estimate:
    """Memory of one process.

    Args:
        kind: how layers are computed.
        micro_batch: whose full rows are meant.
        cards: over which the process lays the layers; the estimate is for the last, which has the head and the layers
            that keep most.
        shards: processes that share weights, gradients and optimizer out (FSDP; see sharding_group_size).
        step: the process's tokens of a step: where they are one micro-batch, gradients come only while activations go.
    """
    weights, trained, layers, copy = _held(config, shape, compute_bytes, cards)
    gathered, in_transit = _in_passing(config, shape, compute_bytes) if config.enable_fsdp else (0.0, 0.0)
    each, layer = BytesEach.of(config), LAYERS[kind](config, shape, compute_bytes)
    rows, tokens, kept = micro_batch.rows, micro_batch.token_budget, min(micro_batch.kept_layers, layers)
    in_transfer = min(1, micro_batch.offloads(layers - kept))  # the last offloaded layer's, when the forward pass ends
    activations = rows * tokens * ((kept + in_transfer) * layer.kept + (layers - kept) * layer.recomputed)
    temporary = tokens * layer.temporary + layer.weights + gathered
    # Layers that recompute come last in the backward pass, when those that kept theirs have let go of them.
    again = tokens * layer.kept + copy if kept < layers else 0.0
    # The last norm's input and output and what it keeps, the labelled rows and their gradient; logits of a chunk and
    # their gradient, both also in fp32 (compiled, not at the same time); the gradient of the head, and its copy.
    of_norm = 12 + 2 * compute_bytes if _is_wide(config, shape, compute_bytes) else 4 + 3 * compute_bytes
    of_chunk = 8.0 if kind.startswith("compiled") else 8.0 + 2 * compute_bytes
    logits = rows * tokens * shape.hidden * of_norm + of_chunk * CHUNK * shape.vocabulary + gathered
    if "lm_head" in _trained(config, shape):
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


def _trained(config: TrainingConfig, shape: Shape) -> set[str]:
    """Names of the modules that are trained (in layers that are not frozen), or have a LoRA."""
    if config.use_peft:
        whole = config.lora_config.modules_to_save if config.peft_method == "lora" else []
        return {*_targets(config, shape), *whole}
    return {*shape.linears(), "norm", "lm_head", "embed_tokens"}


def _is_wide(config: TrainingConfig, shape: Shape, compute_bytes: int) -> bool:
    """Whether the residual stream of the plain layers is fp32, as the embedding is that is trained."""
    return compute_bytes < BytesEach.of(config).weight and "embed_tokens" in _trained(config, shape)


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
