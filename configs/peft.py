"""Settings of the adapters; each becomes PEFT's configuration of the same name."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from configs.messages import _

ALL_LINEAR = "all-linear"


@dataclass
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): a product of two thin matrices beside each chosen linear layer."""

    r: int = 8
    """Rank: the width of the thin matrices."""
    lora_alpha: int = 32
    """The product counts lora_alpha / r times."""
    use_rslora: bool = False
    """It counts lora_alpha / sqrt(r) times instead (rsLoRA, Kalajdzievski 2023), so that high ranks learn as fast."""
    use_dora: bool = False
    """Learn the length of each row of the adapted weight by itself, and its direction by LoRA (DoRA, Liu et al. 2024):
    better at low ranks, and slower."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get one, or all-linear."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules without a LoRA of their own that are trained whole and saved with the adapter: embed_tokens, lm_head (for
    new words or a new language), norm (all of them). They take as much memory as in full fine-tuning."""
    lora_dropout: float = 0.0
    """Share of the inputs set to zero in training. Differs from llama-recipes (0.05): it costs speed and, on
    instruction data of this size, gains nothing."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        if self.r < 1:
            yield _("--lora_config.r {value}: must be at least 1", value=self.r)
        if self.lora_alpha <= 0:
            yield _("--lora_config.lora_alpha {value}: must be above 0", value=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            yield _("--lora_config.lora_dropout {value}: must be from 0 to below 1", value=self.lora_dropout)
        if not self.target_modules:
            yield _("--lora_config.target_modules is empty: name layers, such as q_proj,v_proj, or all-linear")


@dataclass
class LlamaAdapterConfig:
    """LLaMA-Adapter (Zhang et al. 2023): learnt prompts with a zero-initialised gate in the upper layers."""

    adapter_len: int = 10
    """Learnt prompt positions in each layer."""
    adapter_layers: int = 30
    """How many of the upper layers have them; no more than the model has."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) < 1:
                yield _("--llama_adapter_config.{name}: must be at least 1", name=name)


@dataclass
class PrefixConfig:
    """Prefix tuning (Li and Liang 2021): learnt keys and values before the first token of every example."""

    num_virtual_tokens: int = 30
    """Length of the learnt prefix."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        if self.num_virtual_tokens < 1:
            yield _("--prefix_config.num_virtual_tokens: must be at least 1")
