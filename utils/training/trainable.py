"""The module that a run trains: base model, trainable part and loss; whole on each process, or sharded."""

import torch

from configs.training import TrainingConfig
from utils.machine.precision import Precision
from utils.machine.world import World
from utils.model.adapters import add_adapter, prepare_full
from utils.model.folder import ModelFolder
from utils.model.fused_layers import FusedLayers, why_plain
from utils.model.lora_forward import add_before_rounding
from utils.model.weights import empty_base_model, load_weights
from utils.training.response_loss import ResponseLoss
from utils.training.sharding import shard


def load_trainable(config: TrainingConfig, world: World, folder: ModelFolder, precision: Precision) -> ResponseLoss:
    """Load the base model, with an adapter over it or all weights trainable, and the loss on top.

    With --enable_fsdp the empty model is sharded first, so that no process ever holds more of the base than its shards
    and the tensor that is being read.

    Raises:
        UserError: the base model's files are not whole, or the adapter does not fit the model.
    """
    model = empty_base_model(folder, precision.weights, config.quantization)
    if not config.enable_fsdp:
        load_weights(model, folder, world.devices)
    model = add_adapter(model, config) if config.use_peft else prepare_full(model, config)
    is_plain = why_plain(config, folder.config, world.device, precision.compute)
    if is_plain and precision.compute != torch.float32:
        add_before_rounding(model)
    module = ResponseLoss(model, precision.compute, None if is_plain else FusedLayers(model, precision.compute))
    if config.enable_fsdp:
        # An adapter's frozen base is in the compute dtype already; a full fine-tuning's fp32 layers travel in it.
        shard(module, config.fsdp_config, world, None if config.use_peft else precision.compute)
        host = torch.device("cpu") if config.fsdp_config.fsdp_cpu_offload else None
        load_weights(model, folder, [world.device], host)
    return module
