"""The module that a run trains: base model, trainable part and loss; whole on each process, or sharded."""

from pathlib import Path

import torch

from configs.training import TrainingConfig
from utils.model.adapters import make_trainable, take_weights
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers
from utils.model.lora_forward import add_before_rounding
from utils.model.weights import empty_base_model, load_weights
from utils.training.response_loss import ResponseLoss
from utils.training.setup import Setup
from utils.training.sharding import shard


def load_trainable(
    config: TrainingConfig, setup: Setup, folder: ModelFolder, adapter: Path | None = None
) -> ResponseLoss:
    """Load the base model, with an adapter over it or all weights trainable, and the loss on top, in training mode.

    With --enable_fsdp the empty model is sharded first, so that no process ever holds more of the base than its shards
    and the tensor that is being read.

    Args:
        adapter: the folder of an adapter whose weights are to be trained further; None = new ones.

    Raises:
        UserError: the base model's files are not whole, or the adapter does not fit the model.
    """
    world, precision = setup.world, setup.precision
    model = empty_base_model(folder, precision.weights, config.quantization)
    if not setup.is_sharded:
        load_weights(model, folder, world.devices)
    model = make_trainable(model, config)
    if adapter:
        take_weights(model, adapter)
    if setup.why_plain and precision.compute != torch.float32:
        add_before_rounding(model)
    module = ResponseLoss(model, precision.compute, None if setup.why_plain else FusedLayers(model, precision.compute))
    if setup.is_sharded:
        # An adapter's frozen base is in the compute dtype already; a full fine-tuning's fp32 layers travel in it.
        gathered = precision.compute if config.method == "full" else None
        shard(module, config.fsdp_config, world, setup.shards, gathered)
        host = torch.device("cpu") if config.fsdp_config.fsdp_cpu_offload else None
        load_weights(model, folder, [world.device], host)
    module.refresh()
    return module.train()
