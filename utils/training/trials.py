"""Attempts that a run makes with its own model and its heaviest examples, before its first step: see Search."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.machine.memory import free_main_memory, give_back_host
from utils.machine.world import World, gathered_from_all
from utils.model.decoder import causal_lm
from utils.rows.packing import PackedBatch, StepTokens, first_that_fit
from utils.training.measuring import cards_of
from utils.training.optimizer import create_state
from utils.training.response_loss import ResponseLoss
from utils.training.sharding import is_sharded, recover
from utils.training.step_plan import HostMemory, StepPlan, host_seconds

KIND = (
    "use_peft peft_method quantization optimizer pure_bf16 freeze_layers num_freeze_layers micro_batch_size "
    "activation_offload"
)
"""Settings that the best micro-batch depends on, beside those of the groups (lora_config, fsdp_config …)."""


@dataclass(frozen=True)
class Trials:
    """A run that makes attempts.

    Attributes:
        parameters: those that are trained.
        examples: those to train on, as `heaviest_first` has them.
        pack: of some examples, filled up to so many tokens, a row.
        step: what the process has of a step.
    """

    config: TrainingConfig
    world: World
    loss_module: ResponseLoss
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    examples: Sequence[Example]
    pack: Callable[..., PackedBatch]
    step: StepTokens

    def kind(self, **more: Any) -> str:
        """All that the best micro-batch depends on, the cards of all processes included; the same on all.

        Args:
            more: what is neither a setting nor the model nor a card.
        """
        settings = self.config.flat()
        chosen = {name for name in settings if name in KIND.split() or "_config." in name}
        limits = gathered_from_all(json.dumps([cards_of(self.world), self.config.gpu_memory_gb]))
        kind = {name: settings[name] for name in chosen} | {
            "torch": torch.__version__,
            "cards": limits,
            "model": causal_lm(self.loss_module.model).config.to_dict(),
            "sharded": is_sharded(self.loss_module),
            **more,
        }
        return hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def host_memory(self) -> HostMemory | None:
        """For layers that can let activations wait there: a quarter of what is free, shared by all processes.

        A row may take memory anew before torch gives it what the row before has let go of: half of what is free then.
        """
        fused = self.loss_module.fused
        if fused is None or not self.config.activation_offload or self.world.device.type == "cpu":
            return None
        copying, pinning = host_seconds(self.world.device)
        give_back_host()
        own = free_main_memory() / 4 / self.world.size, copying * sum(fused.kept_bytes), pinning
        rooms, seconds, pin_seconds = zip(*map(json.loads, gathered_from_all(json.dumps(own))), strict=True)

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
        own, own_of_step = tokens - self.step.shared, self.step.largest - self.step.shared
        if own * rows < own_of_step:  # from the second group of rows on, gradients lie beside
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        try:
            chosen = first_that_fit(self.examples, tokens)
            batch = self.pack([example.learnt_throughout() for example in chosen], at_least=tokens)
            for value in [self.loss_module(batch, 0.0) for _row in range(rows)]:
                value.backward()
            assert all(p.grad is not None for p in self.parameters), "a trainable parameter without a gradient"
            create_state(self.optimizer)  # it will lie beside the activations
        except torch.cuda.OutOfMemoryError:
            recover(self.loss_module)
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
