"""The decoder's forward pass over packed rows, which training, evaluation, chat and serving share.

The modules are transformers' own; the loop over the layers stands here, where each layer is told what stands before the
row, how it is computed and where its activations go.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from utils.model.activations import Activations, Kept, Recomputed
from utils.model.attention import NO_PAST, Past
from utils.model.families import Rope
from utils.rows.segments import Segments

RunLayer = Callable[..., torch.Tensor]
"""A function that computes a decoder layer; arguments and result are those of `run_plain`."""


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model within what PEFT may have wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_plain(layer: nn.Module, hidden: torch.Tensor, activations: Activations, **arguments: Any) -> torch.Tensor:
    """A decoder layer's output, [1, length, hidden_size], as transformers' own module computes it.

    Args:
        layer: the module.
        hidden: its input, in the output's shape.
        activations: Kept, by autograd, or Recomputed.
        arguments: what `forward_hidden` gives to each layer; the module hands `segments` and `past` on to attention.
    """
    if layer._compiled_call_impl and torch.is_grad_enabled() and not hidden.requires_grad:
        # Whether the input takes a gradient makes other code; one layer's is cheaper than to compile all of it twice.
        hidden = hidden.detach().requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()))
    if isinstance(activations, Recomputed) and torch.is_grad_enabled():
        return checkpoint(layer, hidden, use_reentrant=False, **arguments)
    return layer(hidden, **arguments)


def layer_arguments(
    decoder: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor, segments: Segments
) -> dict[str, Any]:
    """What each layer is given beside its input.

    Args:
        decoder: the module that has the layers.
        hidden: [1, length, hidden_size], for its dtype and device.
        position_ids: [length], counted anew in every example.
        segments: where the row's examples lie.
    """
    return {
        "attention_mask": None,
        "position_ids": position_ids.unsqueeze(0),
        "position_embeddings": _position_embeddings(decoder.rotary_emb, hidden, position_ids, segments),
        "segments": segments,
    }


def forward_hidden(
    model: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segments: Segments | None = None,
    pasts: Sequence[Past] | None = None,
    activations: Sequence[Activations] | None = None,
    run_layer: RunLayer | None = None,
) -> torch.Tensor:
    """The decoder's normalised output, [length, hidden_size], to which the output head is applied.

    Args:
        model: the causal language model, with or without an adapter.
        input_ids: [length], one packed row.
        position_ids: [length], counted anew in every example.
        segments: where the row's examples lie; None = the row is one.
        pasts: what stands before the segments in each layer; None = nothing.
        activations: where each layer leaves its own for the backward pass; None = on their device.
        run_layer: another way to compute a layer than `run_plain`.
    """
    decoder = causal_lm(model).model
    hidden = decoder.embed_tokens(input_ids.unsqueeze(0))
    segments = segments or Segments.of([len(input_ids)], hidden.device)
    arguments = layer_arguments(decoder, hidden, position_ids, segments)
    pasts = pasts or [NO_PAST for _layer in decoder.layers]
    places = activations or [Kept() for _layer in decoder.layers]
    for layer, past, place in zip(decoder.layers, pasts, places, strict=True):
        device = layer.input_layernorm.weight.device
        # The next card of a model that is laid over several. (What lies in host memory comes when its layer is called.)
        if device != hidden.device and device.type != "cpu":
            hidden = hidden.to(device)
            arguments["position_embeddings"] = tuple(x.to(device) for x in arguments["position_embeddings"])
            arguments["segments"] = segments.to(device)
        hidden = (run_layer or run_plain)(layer, hidden, place, past=past, **arguments)
    return decoder.norm(hidden).squeeze(0)


def _position_embeddings(
    rotary: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a row's angles, [1, length, head_dim], as transformers' module has them of each text alone.

    (Where angles depend on a text's length, the module takes the longest of all that it is given, or was given before.)
    """
    if rotary.rope_type not in ("dynamic", "longrope"):
        return rotary(hidden, position_ids.unsqueeze(0))
    config, by_length = rotary.config, ROPE_INIT_FUNCTIONS[rotary.rope_type]
    unscaled = Rope.of(config.to_dict()).unscaled_length
    frequencies = []
    for length in position_ids[segments.cumulative[1:].long() - 1] + 1:  # of each text, so far
        scaled, _factor = by_length(config, hidden.device, seq_len=length)
        frequencies.append(torch.where(length > unscaled, scaled, rotary.original_inv_freq))
    of_tokens = torch.repeat_interleave(
        torch.stack(frequencies), segments.cumulative.diff(), dim=0, output_size=len(position_ids)
    )
    angles = (position_ids[:, None].float() * of_tokens).repeat(1, 2)[None]
    return tuple((function() * rotary.attention_scaling).to(hidden.dtype) for function in (angles.cos, angles.sin))


def logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of the next tokens, fp32, [rows, vocab_size], from rows of `forward_hidden`."""
    head = causal_lm(model).lm_head
    return head(hidden.to(head.weight)).float()  # a tied head lies where the embedding does


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers, in place. They share one compiled function, whatever a row's length is."""
    # Adapters' scalings are constants; as inputs they would be converted on the CPU, by C++ code to be compiled.
    torch._dynamo.config.specialize_float = True
    for layer in causal_lm(model).model.layers:
        layer.compile(dynamic=True)
