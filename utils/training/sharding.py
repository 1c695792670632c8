"""Weights shared out among processes, and gathered again: torch's FSDP2 (`fully_shard`; Zhao et al. 2023)."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from configs.fsdp import FsdpConfig
from utils.machine.world import World
from utils.model.decoder import causal_lm
from utils.model.quantization import QuantizedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(loss_module: nn.Module, config: FsdpConfig, world: World, shards: int, gathered: torch.dtype | None) -> None:
    """Shard every decoder layer, and the rest as one, in place.

    Gradients are summed in fp32, not averaged: the loss is divided by the tokens of all processes already.

    Args:
        loss_module: holds `model`; it may lie on the meta device, as weights that are quantised must.
        shards: processes that share one model out; with fewer than all, groups of them do (hybrid).
        gathered: dtype in which the layers' weights travel and are computed with; None = as they are stored. Embedding
            and head always travel as they are stored: the residual stream has the embedding's dtype, sharded or not.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {
        "mesh": _mesh(world, shards),
        # Pinned memory is what a GPU copies from; there is none without one.
        "offload_policy": CPUOffloadPolicy(world.device.type == "cuda") if config.fsdp_cpu_offload else OffloadPolicy(),
        "reshard_after_forward": config.sharding_strategy != "SHARD_GRAD_OP",
    }
    for module in loss_module.modules():
        if isinstance(module, QuantizedLinear):
            # torch 2.11 would have each shard take a gradient for a moment, which integers can't. So another type of
            # one byte stands in until the weights are loaded.
            module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=torch.float8_e5m2), requires_grad=False)
    for layer in causal_lm(loss_module.model).model.layers:
        fully_shard(layer, mp_policy=policy(gathered), **options)
    fully_shard(loss_module, mp_policy=policy(None), **options)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave a factor out


def _mesh(world: World, shards: int) -> "DeviceMesh":
    """The processes in one row, or (hybrid) in rows that share a model out and columns that hold the same shard."""
    from torch.distributed.device_mesh import init_device_mesh

    if shards == world.size:
        return init_device_mesh(world.device.type, (shards,))
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def recover(module: nn.Module) -> None:
    """Make a sharded module usable again after a pass that broke off, out of memory; others need no such thing.

    Otherwise FSDP2 would wait for the end of that backward pass, and later ones would leave no gradients.
    """
    if is_sharded(module):
        for parameter in module.parameters():  # the weights that lie gathered now have gradients of their own
            parameter.grad = None
        if hasattr(module, "reset_iter_state"):  # torch 2.13 has it
            module.reset_iter_state()


def whole_tensors(parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor on the CPU) of each parameter, one at a time; all processes must go through all."""
    for name, parameter in parameters.items():
        value = parameter.detach()
        if hasattr(value, "full_tensor"):  # sharded; a shard that lies in host memory travels from the device
            value = value.to(value.device_mesh.device_type).full_tensor()
        yield name, value.cpu()
