"""The families of models that can be trained, and what each of them has. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What tells a family of models from the others; all have Llama's decoder.

    Attributes:
        head_norms: each head of queries and keys is normalised before it is rotated.
        has_fast_layers: the fused layers compute its layers: norm, q/k/v, rotation, attention, o, residual, norm,
            gate/up, SiLU, down, residual.
        has_llama_adapter: PEFT has LLaMA-Adapter for it.
        one_window: config.json's sliding_window, where there is one, holds for every layer. Elsewhere it holds for the
            layers that transformers gives it to (layer_types), or for none.
    """

    head_norms: bool = False
    has_fast_layers: bool = True
    has_llama_adapter: bool = False
    one_window: bool = False


FAMILIES = {
    "llama": Family(has_llama_adapter=True),
    "mistral": Family(has_llama_adapter=True, one_window=True),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
}
"""By `model_type` of config.json. Their decoder: embedding, layers of attention and gated MLP under RMSNorm, RoPE."""
