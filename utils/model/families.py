"""The families of models that can be trained, and what each of them has. Free of torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What tells a family of models from the others; all have Llama's decoder.

    Attributes:
        known_by: models of the family that people know it by.
        head_norms: each head of queries and keys is normalised.
        has_fast_layers: the fused layers compute its layers: norm, q/k/v, rotation, attention, o, residual, norm,
            gate/up, SiLU, down, residual.
        has_llama_adapter: PEFT has LLaMA-Adapter for it.
        one_window: config.json's sliding_window, where there is one, holds for every layer. Elsewhere it holds for the
            layers that transformers gives it to (layer_types), or for none.
    """

    known_by: str
    head_norms: bool = False
    has_fast_layers: bool = True
    has_llama_adapter: bool = False
    one_window: bool = False


FAMILIES = {
    "llama": Family("Llama 2, Llama 3.x, SmolLM2, Yi, DeepSeek LLM", has_llama_adapter=True),
    "mistral": Family("Mistral 7B, Mistral Nemo", has_llama_adapter=True, one_window=True),
    "ministral": Family("Ministral 8B"),
    "qwen2": Family("Qwen 1.5, 2, 2.5"),
    "qwen3": Family("Qwen 3", head_norms=True),
    "smollm3": Family("SmolLM3", has_fast_layers=False),  # some layers have no rotation
    "hunyuan_v1_dense": Family("Hunyuan", head_norms=True, has_fast_layers=False),  # norms come after the rotation
    "ernie4_5": Family("ERNIE 4.5", has_fast_layers=False),  # rotates neighbouring numbers
}
"""By `model_type` of config.json. Their decoder: embedding, layers of attention and gated MLP under RMSNorm, RoPE.

A family belongs here only where transformers' own modules under the loop of utils/model/decoder.py give its logits:
nothing may stand between the layers, nor before or behind them (Gemma and Granite scale embeddings), and its linear
layers have Llama's names (Phi-3 joins them). tests/parity/test_every_family.py holds each.
"""

ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""How rotary angles are scaled for longer texts: the kinds, and what config.json must say of each."""
LAYER_TYPES = ("full_attention", "sliding_attention")
"""What a layer attends to: all that stands before a token, or a window of it."""


@dataclass(frozen=True)
class Rope:
    """What a config.json says of its model's rotary position embedding.

    Attributes:
        key: where it says so.
        settings: what stands there; {} = nothing.
        kind: see ROPE_KINDS.
        unscaled_length: up to so many tokens a text's angles do not depend on its length; None = they never do.
        context: how far the angles are made to reach, in tokens.
    """

    key: str
    settings: dict[str, Any]
    kind: str
    unscaled_length: int | None
    context: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Rope":
        """The rotary embedding of the model that a config.json describes."""
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        settings = config.get(key) or {}
        kind = settings.get("rope_type", settings.get("type", "default"))
        length = config.get("max_position_embeddings", 2048)
        original = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        context, factor = length, settings["factor"] if _is_positive(settings.get("factor")) else 1
        if kind == "dynamic":  # its factor is beside max_position_embeddings
            context = int(length * factor)
        elif kind == "yarn":
            context = max(length, int((original or length) * factor))
        unscaled = {"dynamic": length, "longrope": original or length}.get(kind)
        return cls(key, settings, kind, unscaled, context)


def not_computed(config: dict[str, Any]) -> tuple[str, Any] | None:
    """What a config.json of a known family asks for that is not computed here, as its key and value; None = nothing."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            return key, config[key]
    rope = Rope.of(config)
    if not isinstance(rope.kind, str) or not {*ROPE_KINDS.get(rope.kind, ("?",))} <= rope.settings.keys():
        return rope.key, rope.settings
    if any(isinstance(value, dict) for value in rope.settings.values()):  # angles of each layer type
        return rope.key, rope.settings
    needed = [rope.settings[name] for name in ROPE_KINDS[rope.kind]] + [rope.settings.get("rope_theta", 1)]
    if not all(map(_is_positive, needed)):
        return rope.key, rope.settings
    window = config.get("sliding_window")
    is_window = isinstance(window, int) and _is_positive(window)
    if window is not None and not is_window and config.get("use_sliding_window") is not False:
        return "sliding_window", window
    for place in (config, rope.settings):
        if place.get("partial_rotary_factor") not in (None, 1):
            return "partial_rotary_factor", place["partial_rotary_factor"]
    others = sorted({*(config.get("layer_types") or ())} - {*LAYER_TYPES})
    return ("layer_types", others) if others else None


def _is_positive(value: Any) -> bool:
    """Whether a setting is a number above 0, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_positive, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
