"""The base model: loaded from its folder, and its forward pass over packed rows.

The modules are transformers' own; the weights are streamed from the files, one tensor at a time, straight to the device
that they belong to and quantised there, so that loading takes little more memory than the loaded model. The decoder's
loop stands here, because training, evaluation, chat and serving share it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from utils import attention
from utils.attention import PastKeyValues, Segments
from utils.model_folder import ModelFolder
from utils.quantization import QuantizedLinear, quantize_linears

RunLayer = Callable[..., torch.Tensor]
"""A function with the arguments of `run_plain`."""


def load_base_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    devices: list[torch.device],
    quantization: Quantization | None = None,
) -> nn.Module:
    """A causal language model in eval mode, its layers laid over `devices` in equal shares.

    Args:
        dtype: dtype of the weights that are not quantised, and of the computation.
        devices: where the layers go; embedding and head go to the first and the last.
        quantization: how the linear layers of the decoder are held; the head stays as it is.

    Raises:
        UserError: weights are missing, or have another shape than the configuration says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.from_pretrained(folder.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PACKED, dtype=dtype)
    decoder = model.model
    if quantization:
        quantize_linears(decoder.layers, quantization, dtype)
    layer_devices = [devices[i * len(devices) // len(decoder.layers)] for i in range(len(decoder.layers))]

    def device_of(name: str) -> torch.device:
        if name.startswith("model.layers."):
            return layer_devices[int(name.split(".")[2])]
        return devices[0] if name.startswith("model.embed_tokens.") else devices[-1]

    modules, missing = dict(model.named_modules()), dict(model.named_parameters())
    for name, tensor in folder.tensors():
        owner, _dot, leaf = name.rpartition(".")
        if name not in missing:
            continue  # rotary frequencies of old files, a tied head's second copy
        expected = tuple(missing.pop(name).shape)
        if tuple(tensor.shape) != expected:
            raise UserError(
                _(
                    "{folder}: {name} has shape {shape}, config.json asks for {expected}. The files do not belong "
                    "together.",
                    folder=folder.path,
                    name=name,
                    shape=tuple(tensor.shape),
                    expected=expected,
                )
            )
        module, tensor = modules[owner], tensor.to(device_of(name))
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.quantize_(tensor)
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    if config.tie_word_embeddings:
        missing.pop("lm_head.weight", None)
        model.lm_head.weight = decoder.embed_tokens.weight
    if missing:
        raise UserError(
            _(
                "{folder}: the weight files lack {names}. Download the model again.",
                folder=folder.path,
                names=", ".join(sorted(missing)[:4]),
            )
        )
    # Its frequencies are computed, not stored, so the meta device kept none.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(devices[0])
    return model.eval()


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model within what PEFT may have wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_plain(layer: nn.Module, hidden: torch.Tensor, recompute: bool, **arguments: Any) -> torch.Tensor:
    """A decoder layer's output, [1, length, hidden_size]; with `recompute`, its activations are not kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, hidden, use_reentrant=False, **arguments)
    return layer(hidden, **arguments)


def forward_hidden(
    model: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segments: Segments | None = None,
    past: PastKeyValues | None = None,
    kept_layers: int | None = None,
    run_layer: RunLayer | None = None,
) -> torch.Tensor:
    """What the output head is applied to: the decoder's normalised output, shape [length, hidden_size].

    Args:
        model: the causal language model, with or without an adapter.
        input_ids: [length], one packed row.
        position_ids: [length], counted anew in every segment.
        segments: where the row's examples lie; None = the row is one.
        past: keys and values from before the row.
        kept_layers: how many layers, from the last, keep their activations for the backward pass; the others compute
            them again (activation checkpointing). None = all.
        run_layer: another way to compute a layer than `run_plain`.
    """
    decoder = causal_lm(model).model
    hidden = decoder.embed_tokens(input_ids.unsqueeze(0))
    arguments: dict[str, Any] = {
        "attention_mask": None,
        "position_ids": position_ids.unsqueeze(0),
        "position_embeddings": decoder.rotary_emb(hidden, position_ids.unsqueeze(0)),
        "segments": segments,
        "past": past,
    }
    recomputed = 0 if kept_layers is None else len(decoder.layers) - kept_layers
    for index, layer in enumerate(decoder.layers):
        device = layer.input_layernorm.weight.device
        if device != hidden.device:  # the next card of a model that is laid over several
            hidden = hidden.to(device)
            arguments["position_embeddings"] = tuple(x.to(device) for x in arguments["position_embeddings"])
            arguments["segments"] = segments.to(device) if segments else None
        hidden = (run_layer or run_plain)(layer, hidden, index < recomputed, **arguments)
    return decoder.norm(hidden).squeeze(0)


def logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The head's output for rows of `forward_hidden`, fp32, shape [rows, vocab_size]."""
    head = causal_lm(model).lm_head
    return head(hidden.to(head.weight)).float()  # a tied head lies where the embedding does
