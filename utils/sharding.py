"""Weights shared out among processes: torch's FSDP2 (`fully_shard`; Zhao et al. 2023)."""

import torch
from torch import nn

from configs.fsdp import FsdpConfig
from utils.distributed import World
from utils.llama import causal_lm


def shard(loss_module: nn.Module, config: FsdpConfig, world: World) -> None:
    """Shard every decoder layer, and the rest as one, in place. The module must hold `model`.

    Gradients are summed, not averaged: the loss is divided by the tokens of all processes already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    offload = CPUOffloadPolicy() if config.fsdp_cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "offload_policy": offload, "reshard_after_forward": config.reshard_after_forward}
    for layer in causal_lm(loss_module.model).model.layers:
        fully_shard(layer, **options)
    fully_shard(loss_module, **options)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave a factor out


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole_state(parameters: dict[str, nn.Parameter], is_main: bool) -> dict[str, torch.Tensor]:
    """Every parameter whole, on the CPU of rank 0 ({} elsewhere); all processes must call it."""
    state = {}
    for name, parameter in parameters.items():
        value = parameter.detach()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_main:
            state[name] = whole.cpu()
    return state
