"""A model's numbers, and how many of its parameters a run trains, known before anything is loaded."""

from dataclasses import dataclass
from typing import Any

from configs.peft import ALL_LINEAR
from configs.training import TrainingConfig


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
    lora = shape.layers * config.lora_config.r * sum(sum(linears[name]) for name in lora_targets(config, shape))
    embedding, norm = shape.vocabulary * shape.hidden, shape.layers * shape.hidden
    whole = {
        "embed_tokens": embedding,
        "lm_head": embedding,
        "norm": 2 * norm + shape.hidden,
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
    }
    return lora + sum(whole.get(name, 0) for name in config.lora_config.modules_to_save)


def trained_modules(config: TrainingConfig, shape: Shape) -> set[str]:
    """Names of the modules that are trained (in layers that are not frozen), or have a LoRA."""
    if config.use_peft:
        whole = config.lora_config.modules_to_save if config.peft_method == "lora" else []
        return {*lora_targets(config, shape), *whole}
    return {*shape.linears(), "norm", "lm_head", "embed_tokens"}


def lora_targets(config: TrainingConfig, shape: Shape) -> list[str]:
    """The linear layers of a decoder layer that have a LoRA."""
    if not config.use_peft or config.peft_method != "lora":
        return []
    chosen = config.lora_config.target_modules
    return [name for name in shape.linears() if name in chosen or ALL_LINEAR in chosen]


@dataclass(frozen=True)
class BytesEach:
    """Bytes that a trained parameter takes, by what holds them."""

    weight: float
    gradient: float
    optimizer: float

    @classmethod
    def of(cls, config: TrainingConfig) -> "BytesEach":
        """By --pure_bf16 and --optimizer."""
        weight = 2.0 if config.pure_bf16 else 4.0
        # Two moments: in fp32, or in 8 bits with an fp32 scale for every 256 numbers.
        return cls(weight, weight, 8.0 if config.optimizer == "adamw" else 2 + 2 * 4 / 256)
