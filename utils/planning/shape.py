"""A model's numbers, which of its parameters a run trains, and how both lie on the cards: known before any loading."""

from dataclasses import dataclass
from typing import Any

from configs.peft import ALL_LINEAR, LoraConfig
from configs.quantization import Quantization
from configs.training import TrainingConfig
from utils.model.families import FAMILIES


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
        """The shape of the model that a config.json describes."""
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
            FAMILIES[config.get("model_type", "llama")].head_norms,
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
class Trained:
    """Which of a model's parameters a run trains.

    Attributes:
        is_adapter: they lie over a frozen base model.
        parameters: how many there are.
        modules: names of the modules that are trained (in layers that are not frozen), or have a LoRA.
        lora: the linear layers of a decoder layer that have a LoRA.
        rank: of those LoRAs.
        has_dropout: whether dropout goes over their inputs.
        has_magnitudes: whether they learn the lengths of rows as well (DoRA).
        frozen_layers: decoder layers that a full fine-tuning leaves as they are, with the embedding; None = it trains
            all.
    """

    is_adapter: bool
    parameters: int
    modules: frozenset[str]
    lora: tuple[str, ...] = ()
    rank: int = 0
    has_dropout: bool = False
    has_magnitudes: bool = False
    frozen_layers: int | None = None

    @classmethod
    def of(cls, config: TrainingConfig, shape: Shape) -> "Trained":
        """What a run with these settings trains of a model."""
        if config.method == "full":
            frozen, count = config.frozen_layers, shape.decoder_weights + shape.other_weights
            if frozen is not None:
                count -= frozen * (shape.layer_weights + 2 * shape.hidden) + shape.head_weights
            modules = frozenset({*shape.linears(), "norm", "lm_head", "embed_tokens"})
            return cls(False, count, modules, frozen_layers=frozen)
        if config.method == "prefix":
            count = config.prefix_config.num_virtual_tokens * shape.layers * 2 * shape.key_value
            return cls(True, count, frozenset())
        if config.method == "llama_adapter":
            settings = config.llama_adapter_config
            count = min(settings.adapter_layers, shape.layers) * (settings.adapter_len * shape.hidden + 1)
            return cls(True, count, frozenset())
        return cls._lora(config.lora_config, shape)

    @classmethod
    def _lora(cls, settings: LoraConfig, shape: Shape) -> "Trained":
        chosen, linears = settings.target_modules, shape.linears()
        targets = tuple(name for name in linears if name in chosen or ALL_LINEAR in chosen)
        embedding, norm = shape.head_weights, shape.layers * shape.hidden
        whole = {
            "embed_tokens": embedding,
            "lm_head": embedding,
            "norm": 2 * norm + shape.hidden,
            "input_layernorm": norm,
            "post_attention_layernorm": norm,
        }
        count = shape.layers * settings.r * sum(sum(linears[name]) for name in targets)
        count += shape.layers * settings.use_dora * sum(linears[name][1] for name in targets)  # magnitudes
        count += sum(whole.get(name, 0) for name in settings.modules_to_save)
        modules = frozenset({*targets, *settings.modules_to_save})
        return cls(True, count, modules, targets, settings.r, bool(settings.lora_dropout), settings.use_dora)


@dataclass(frozen=True)
class BytesEach:
    """Bytes that a trained parameter takes, by what holds them."""

    weight: float
    gradient: float
    optimizer: float

    @classmethod
    def of(cls, optimizer: str, pure_bf16: bool) -> "BytesEach":
        """The bytes of a trained parameter under these values of --optimizer and --pure_bf16."""
        weight = 2.0 if pure_bf16 else 4.0
        # Two moments: in fp32, or in 8 bits with an fp32 scale for every 256 numbers.
        return cls(weight, weight, 8.0 if optimizer == "adamw" else 2 + 2 * 4 / 256)


@dataclass(frozen=True)
class Layout:
    """How a run lies on its cards: all that memory depends on, but for the step plan.

    Attributes:
        each: bytes of a trained parameter.
        compute_bytes: of a number in the dtype that the run computes in.
        quantization: how the decoder's frozen linear layers are held.
        pages_optimizer: the optimizer's state leaves a card that is full.
        cards: over which a process lays the layers.
        shards: processes that share weights, gradients and optimizer out.
        is_sharded: by FSDP (which one process may use as well).
        gathers_all_layers: their weights stay whole until the backward pass is over (SHARD_GRAD_OP).
        rests_on_host: shards and optimizer lie in host memory.
    """

    shape: Shape
    trained: Trained
    each: BytesEach
    compute_bytes: int
    quantization: Quantization | None
    pages_optimizer: bool
    cards: int
    shards: int
    is_sharded: bool
    gathers_all_layers: bool
    rests_on_host: bool

    @classmethod
    def of(cls, config: TrainingConfig, shape: Shape, compute_bytes: int, cards: int = 1, shards: int = 1) -> "Layout":
        """The layout of a run with these settings; what else it takes, a Setup has decided."""
        return cls(
            shape,
            Trained.of(config, shape),
            BytesEach.of(config.optimizer, config.pure_bf16),
            compute_bytes,
            config.quantization,
            pages_optimizer=config.optimizer.startswith("paged"),
            cards=cards,
            shards=shards,
            is_sharded=config.enable_fsdp,
            gathers_all_layers=config.fsdp_config.sharding_strategy == "SHARD_GRAD_OP",
            rests_on_host=config.enable_fsdp and config.fsdp_config.fsdp_cpu_offload,
        )

    @property
    def stored_bytes(self) -> float:
        """Bytes that a frozen weight in a linear layer of the decoder takes."""
        if self.quantization == "4bit":
            return 0.5 + 1 / 64 + 4 / (64 * 256)
        return 1.0 if self.quantization == "8bit" else float(self.compute_bytes)

    @property
    def is_narrowed(self) -> bool:
        """Whether the compute dtype is narrower than the trained weights."""
        return self.compute_bytes < self.each.weight

    @property
    def has_wide_stream(self) -> bool:
        """Whether the residual stream of the plain layers is fp32, as the embedding is that is trained."""
        return self.is_narrowed and "embed_tokens" in self.trained.modules
