"""Attempts that a run makes with its own model and its heaviest examples, before its first step: see Search."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.machine.memory import free_main_memory, give_back_host
from utils.machine.world import gathered_from_all
from utils.model.adapters import trainable_parameters
from utils.model.decoder import causal_lm
from utils.rows.packing import first_that_fit
from utils.training.measuring import cards_of
from utils.training.optimizer import create_state
from utils.training.response_loss import ResponseLoss
from utils.training.setup import Setup
from utils.training.sharding import recover
from utils.training.step_plan import HostMemory, StepPlan, host_seconds

DEPENDS_ON = (
    "use_peft peft_method quantization optimizer pure_bf16 freeze_layers num_freeze_layers micro_batch_size "
    "activation_offload"
)
"""Settings that the best step plan depends on, beside those of the groups (lora_config, fsdp_config …)."""


@dataclass(frozen=True)
class Trials:
    """Attempts of a run with its own model.

    Attributes:
        loss_module: in training mode.
        examples: those to train on, as `heaviest_first` has them.
    """

    config: TrainingConfig
    setup: Setup
    loss_module: ResponseLoss
    optimizer: torch.optim.Optimizer
    examples: Sequence[Example]

    def key(self) -> str:
        """A name for all that the best step plan depends on, the cards of all processes included; the same on all."""
        settings = self.config.flat()
        chosen = {name for name in settings if name in DEPENDS_ON.split() or "_config." in name}
        limits = gathered_from_all(json.dumps([cards_of(self.setup.world), self.config.gpu_memory_gb]))
        facts = {name: settings[name] for name in chosen} | {
            "torch": torch.__version__,
            "cards": limits,
            "model": causal_lm(self.loss_module.model).config.to_dict(),
            "sharded": self.setup.is_sharded,
            "compute": str(self.setup.precision.compute),
            "compiles": self.setup.compiles,
            "longest": self.setup.longest,
            "steps": self.setup.step,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def host_memory(self) -> HostMemory | None:
        """The main memory that activations may wait in: a quarter of what is free, for all processes; None = none.

        A row may take memory anew before torch gives it what the row before has let go of: half of what is free then.
        """
        fused, world = self.loss_module.fused, self.setup.world
        if fused is None or not self.config.activation_offload or world.device.type == "cpu":
            return None
        copying, pinning = host_seconds(world.device)
        give_back_host()
        own = free_main_memory() / 4 / world.size, copying * sum(fused.kept_bytes), pinning
        rooms, seconds, pin_seconds = zip(*gathered_from_all(own), strict=True)

        def bytes_of(tokens: int) -> int:
            return sum(2 ** math.ceil(math.log2(tokens * each)) for each in fused.kept_bytes)  # torch rounds them up

        return HostMemory(min(rooms), bytes_of, max(seconds), max(pin_seconds))

    def attempt(self, step_plan: StepPlan, tokens: int, rows: int) -> None:
        """Let rows of the heaviest examples go forward and backward together, and take nothing from it.

        No row of the run has longer ones, more keys or more labels.

        Args:
            tokens: that each row is filled up to.
            rows: how many there are.

        Raises:
            OutOfMemoryError: a card has too little memory.
        """
        self.loss_module.step_plan = step_plan
        parameters, step = trainable_parameters(self.loss_module.model).values(), self.setup.step
        if (tokens - step.shared) * rows < step.largest - step.shared:  # from the second group of rows on
            for parameter in parameters:  # gradients lie beside
                parameter.grad = torch.zeros_like(parameter)
        try:
            chosen = first_that_fit(self.examples, tokens)
            batch = self.setup.pack([example.learnt_throughout() for example in chosen], at_least=tokens)
            for value in [self.loss_module(batch, 0.0) for _row in range(rows)]:
                value.backward()
            assert all(p.grad is not None for p in parameters), "a trainable parameter without a gradient"
            create_state(self.optimizer)  # it will lie beside the activations
        except torch.cuda.OutOfMemoryError:
            recover(self.loss_module)
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
