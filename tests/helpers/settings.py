"""Settings and shapes that tests of memory share."""

import torch

from configs.peft import LoraConfig
from configs.training import TrainingConfig
from utils.machine.world import World
from utils.planning.shape import Shape

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
    return World(0, 0, size, [torch.device("cuda", index) for index in range(cards)])
