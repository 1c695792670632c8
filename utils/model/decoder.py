"""The base model: loaded from its folder, and its forward pass over packed rows.

The modules are transformers' own; the weights are streamed from the files, one tensor at a time, straight to the device
that they belong to and quantised there, so that loading takes little more memory than the loaded model, or than a
process's shards of it. The decoder's loop stands here, because training, evaluation, chat and serving share it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from utils.model import attention
from utils.model.activations import Activations, Kept, Recomputed
from utils.model.attention import PastKeyValues
from utils.model.folder import ModelFolder
from utils.model.quantization import QuantizedLinear, quantize_linears
from utils.rows.segments import Segments

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
    model = empty_base_model(folder, dtype, quantization)
    load_weights(model, folder, devices)
    return model


def empty_base_model(folder: ModelFolder, dtype: torch.dtype, quantization: Quantization | None = None) -> nn.Module:
    """The model that `load_base_model` loads, its weights still on the meta device: shapes alone, to be sharded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.from_pretrained(folder.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PACKED, dtype=dtype)
    if quantization:
        quantize_linears(model.model.layers, quantization, dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def load_weights(
    model: nn.Module, folder: ModelFolder, devices: list[torch.device], host: torch.device | None = None
) -> None:
    """Fill an empty base model, with or without an adapter over it, from its files, one tensor at a time.

    Where the model is sharded, each process reads every tensor and keeps its own shard. (Quantised weights are
    quantised whole: their scales lie whole on each process.)

    Args:
        devices: see load_base_model.
        host: where the weights lie, if not on `devices` (CPU offload).

    Raises:
        UserError: see load_base_model.
    """
    base = causal_lm(model)
    layers = len(base.model.layers)
    layer_devices = [devices[i * len(devices) // layers] for i in range(layers)]

    def device_of(name: str) -> torch.device:
        if name.startswith("model.layers."):
            return layer_devices[int(name.split(".")[2])]
        return devices[0] if name.startswith("model.embed_tokens.") else devices[-1]

    # An adapter's own weights are there already. PEFT hangs a layer that it adapts below `base_layer`, and one that is
    # trained whole below `original_module`, with a copy to train.
    missing: dict[str, list[str]] = {}
    for place, parameter in base.named_parameters():
        if parameter.device.type == "meta":
            name = re.sub(r"\.(base_layer|original_module|modules_to_save\.default)\.", ".", place)
            missing.setdefault(name, []).append(place)
    for name, tensor in folder.tensors():
        # What has no place: rotary frequencies of old files, a tied head's second copy.
        for place in missing.pop(name, []):
            owner, _dot, leaf = place.rpartition(".")
            _fill(base.get_submodule(owner), leaf, tensor, name, folder, device_of(name), host)
    if base.config.tie_word_embeddings:
        base.lm_head.weight = base.model.embed_tokens.weight
    if missing:
        raise UserError(
            _(
                "{folder}: the weight files lack {names}. Download the model again.",
                folder=folder.path,
                names=", ".join(sorted(missing)[:4]),
            )
        )
    # Its frequencies are computed, not stored, so the meta device kept none.
    base.model.rotary_emb = type(base.model.rotary_emb)(config=base.config).to(devices[0])


def _fill(
    module: nn.Module,
    leaf: str,
    tensor: torch.Tensor,
    name: str,
    folder: ModelFolder,
    device: torch.device,
    host: torch.device | None,
) -> None:
    """Put a tensor of the files in the place of a module's empty one."""
    empty = getattr(module, leaf)
    is_quantized = isinstance(module, QuantizedLinear) and leaf == "weight"
    expected = (module.out_features, module.in_features) if is_quantized else tuple(empty.shape)
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
    if is_quantized:
        module.quantize_(tensor.to(device))
        tensor = module.weight.detach()
    kept = own_shard(tensor, empty).to(host or device, tensor.dtype if is_quantized else empty.dtype)
    setattr(module, leaf, nn.Parameter(kept, requires_grad=empty.requires_grad))


def own_shard(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a whole tensor that is to stand in the place of `place`: its shard, or all of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(place, DTensor):
        return tensor
    # A copy of the shard; without a source rank nothing is sent.
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model within what PEFT may have wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_plain(layer: nn.Module, hidden: torch.Tensor, activations: Activations, **arguments: Any) -> torch.Tensor:
    """A decoder layer's output, [1, length, hidden_size]; its activations are kept by autograd, or not at all."""
    if layer._compiled_call_impl and torch.is_grad_enabled() and not hidden.requires_grad:
        # Whether the input takes a gradient makes other code; one layer's is cheaper than to compile all of it twice.
        hidden = hidden.detach().requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()))
    if isinstance(activations, Recomputed) and torch.is_grad_enabled():
        return checkpoint(layer, hidden, use_reentrant=False, **arguments)
    return layer(hidden, **arguments)


def forward_hidden(
    model: nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segments: Segments | None = None,
    past: PastKeyValues | None = None,
    activations: Sequence[Activations] | None = None,
    run_layer: RunLayer | None = None,
) -> torch.Tensor:
    """What the output head is applied to: the decoder's normalised output, shape [length, hidden_size].

    Args:
        model: the causal language model, with or without an adapter.
        input_ids: [length], one packed row.
        position_ids: [length], counted anew in every example.
        segments: where the row's examples lie; None = the row is one.
        past: keys and values from before the row.
        activations: where each layer leaves its own for the backward pass; None = where they are.
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
    places = activations or [Kept() for _layer in decoder.layers]
    for layer, place in zip(decoder.layers, places, strict=True):
        device = layer.input_layernorm.weight.device
        # The next card of a model that is laid over several. (What lies in host memory comes when its layer is called.)
        if device != hidden.device and device.type != "cpu":
            hidden = hidden.to(device)
            arguments["position_embeddings"] = tuple(x.to(device) for x in arguments["position_embeddings"])
            arguments["segments"] = segments.to(device) if segments else None
        hidden = (run_layer or run_plain)(layer, hidden, place, **arguments)
    return decoder.norm(hidden).squeeze(0)


def logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The head's output for rows of `forward_hidden`, fp32, shape [rows, vocab_size]."""
    head = causal_lm(model).lm_head
    return head(hidden.to(head.weight)).float()  # a tied head lies where the embedding does
