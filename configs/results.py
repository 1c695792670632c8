"""Settings of merging and converting."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from configs.messages import _
from configs.quantization import QUANTIZATION_FLAG, Quantization
from configs.serving import DEFAULT_ADAPTER, DEFAULT_BASE_MODEL

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
"""How a GGUF file stores its weights; behind the q stands the number of bits."""


@dataclass
class MergeConfig:
    """Merge a LoRA adapter into its base model: a folder that vLLM, TGI and transformers load as it is."""

    base_model: str = DEFAULT_BASE_MODEL
    """Folder of the base model."""
    peft_model: str = DEFAULT_ADAPTER
    """Folder of the adapter; '' = none: with --format gguf, the base model as it is."""
    output_dir: str = "output/merged_model_output"
    """Folder for the merged model; it must not exist yet, or be empty."""
    format: Literal["safetensors", "gguf"] = "safetensors"
    """gguf = also a model.gguf for llama.cpp, and a Modelfile for Ollama."""
    gguf_type: GgufType = "f16"
    """How model.gguf stores its weights."""
    shard_gb: float = 4.0
    """Largest weight file, in GB."""
    quantization: Quantization | None = field(default=None, metadata=QUANTIZATION_FLAG)
    """Merge into the weights as this quantization rounds them, that is, into exactly what the adapter was trained over.
    Without it, into the original weights."""
    save_quantized: Quantization | None = field(default=None, metadata=QUANTIZATION_FLAG)
    """Store the merged decoder weights in int8 (8bit) or NF4 (4bit), as bitsandbytes does; transformers and vLLM load
    them. Without it, in the precision of the base's files."""
    verify: bool = True
    """Read the written model again and compare it with base and adapter: tokens, logits, losses. What is not the same
    is refused, and what was found stands in merge_report.json."""
    verify_prompts: int = 16
    """On how many conversations held out of the run's data; where they are gone, on others."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        if self.shard_gb <= 0:
            yield _("--shard_gb {value}: must be above 0", value=self.shard_gb)
        if not self.peft_model and (self.quantization or self.save_quantized):
            yield _("--quantization: only what is merged is rounded; --gguf_type says how a model is converted")
        if self.save_quantized and self.format == "gguf":
            yield _("--save_quantized has its own form: for --format gguf there is --gguf_type q8_0 and others")
        if self.verify_prompts < 1:
            yield _(
                "--{name} {value}: must be at least {least}", name="verify_prompts", value=self.verify_prompts, least=1
            )


@dataclass
class ConverterConfig:
    """Turn a run's checkpoint, sharded or not, into a Hugging Face model (full fine-tuning) or a LoRA adapter."""

    fsdp_checkpoint_path: str = ""
    """Folder of the checkpoint: output_dir/checkpoints/step-N of the run."""
    consolidated_model_path: str = ""
    """Folder for the result; it must not exist yet, or be empty."""
    HF_model_path_or_name: str = ""
    """Folder of the base model; empty = where the run had it."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        for name in ("fsdp_checkpoint_path", "consolidated_model_path"):
            if not getattr(self, name):
                yield _("--{name} needs a value", name=name)
