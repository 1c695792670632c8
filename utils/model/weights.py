"""The base model's weights, streamed from its files, one tensor at a time.

Each goes straight to the device that it belongs to and is quantised there, so that loading takes little more memory
than the loaded model, or than a process's shards of it.
"""

import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from utils.model import attention
from utils.model.decoder import causal_lm
from utils.model.folder import ModelFolder
from utils.model.quantization import QuantizedLinear, quantize_linears


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
    if not isinstance(place, DTensor):
        return tensor
    # A copy of the shard; without a source rank nothing is sent.
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
