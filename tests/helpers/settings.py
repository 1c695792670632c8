"""Settings and shapes that tests of memory share."""

import math

import torch

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.machine.precision import Precision
from utils.machine.world import World, sharding_group_size
from utils.model.fused_layers import why_plain
from utils.planning.estimate import Estimate, estimate
from utils.planning.shape import Layout, Shape
from utils.rows.packing import StepTokens
from utils.rows.schedule import Schedule
from utils.training.setup import LayerKind, Setup
from utils.training.step_plan import StepPlan

LLAMA_7B = Shape.of(
    {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "num_attention_heads": 32,
    }
)
ALL = LoraConfig(target_modules=["all-linear"])
LORA = TrainingConfig(use_peft=True, lora_config=ALL)
FULL = TrainingConfig()


def world(cards: int, size: int = 1) -> World:
    """The first of `size` processes, with so many cards."""
    return World(0, size, [torch.device("cuda", index) for index in range(cards)])


def setup_of(config: TrainingConfig, world: World, longest: int = 512, precision: Precision | None = None) -> Setup:
    """A run of a Llama that is not compiled, in bf16 if nothing else is said; its examples are all as long."""
    on_cpu = world.device.type == "cpu"  # there is no card to ask for its age
    precision = precision or Precision(torch.bfloat16, torch.bfloat16, "")
    return Setup(
        world,
        precision,
        Schedule(1, 1, 1, 1, 0),
        StepTokens(longest, longest, 0),
        longest,
        why_plain=why_plain(config, {"model_type": "llama"}, world.device, precision.compute) if on_cpu else "",
        compiles=False,
        is_sharded=config.enable_fsdp,
        shards=sharding_group_size(config.fsdp_config, world.size) if config.enable_fsdp else 1,
    )


def memory_of(
    config: TrainingConfig,
    shape: Shape,
    kind: LayerKind,
    step_plan: StepPlan,
    cards: int = 1,
    shards: int = 1,
    step: float = math.inf,
) -> Estimate:
    """The estimate for a run in 16 bits."""
    return estimate(Layout.of(config, shape, 2, cards, shards), kind, step_plan, step)
