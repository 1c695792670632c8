"""One optimizer step: its examples as rows, their gradients, the update; and the loss on examples that are held out."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import UserError, out_of_memory
from configs.training import TrainingConfig
from ft_datasets.examples import Example
from utils.machine.memory import give_back
from utils.machine.world import sum_across, sum_gradients, total_across
from utils.model.adapters import trainable_parameters
from utils.rows.packing import PackedBatch, share_out
from utils.rows.schedule import seed_of
from utils.training.loss_scale import LossScale
from utils.training.optimizer import gradient_norm, step_if_finite
from utils.training.response_loss import ResponseLoss
from utils.training.setup import Setup
from utils.training.sharding import recover
from utils.training.step_plan import StepPlan

Row = tuple[PackedBatch, bool]
"""A micro-batch, and whether it counts: a process without examples goes along with one that counts nothing."""


@dataclass
class StepResult:
    """What one optimizer step came to."""

    loss: float
    norm: float
    applied: bool
    examples: list[Example]


class Stepper:
    """Takes a run's optimizer steps, in any order: what a step learns depends on its number alone.

    Args:
        loss_module: in training mode.
        optimizer: of its trainable parameters.
        examples: those to train on.
        step_plan: how steps are cut.
    """

    def __init__(
        self,
        config: TrainingConfig,
        setup: Setup,
        loss_module: ResponseLoss,
        optimizer: torch.optim.Optimizer,
        examples: Sequence[Example],
        step_plan: StepPlan,
    ) -> None:
        self.config, self.setup, self.world = config, setup, setup.world
        self.loss_module, self.optimizer, self.examples = loss_module, optimizer, examples
        self.parameters = list(trainable_parameters(loss_module.model).values())
        self.loss_scale = LossScale.for_dtype(setup.precision.compute)
        self.step_plan = step_plan
        self._prepared: dict[tuple[int, StepPlan], tuple[list[Example], list[Row]]] = {}

    @property
    def step_plan(self) -> StepPlan:
        """How steps are cut."""
        return self.loss_module.step_plan

    @step_plan.setter
    def step_plan(self, step_plan: StepPlan) -> None:
        self.loss_module.step_plan = step_plan

    def take(self, step: int, rate: float) -> StepResult:
        """Do a step, counted from 0, at a learning rate; weights stay as they were if its gradient is not finite.

        Raises:
            UserError: not even the longest example alone fits on the card.
        """
        examples, loss = self._gradients_that_fit(step)
        if step + 1 < self.setup.schedule.total_steps:  # while the card is busy with this step
            self._prepared = {(step + 1, self.step_plan): self._prepare(step + 1)}
        if not self.setup.is_sharded:
            sum_gradients(self.parameters)
        loss, norm = total_across(loss), gradient_norm(self.parameters).to(loss) / self.loss_scale.value
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = self.config.gradient_clipping_threshold if self.config.gradient_clipping else None
        step_if_finite(self.optimizer, self.parameters, loss, norm.float(), limit, self.loss_scale.value)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_module.refresh()
        total, norm = torch.stack((loss, norm)).tolist()
        applied = bool(np.isfinite(total) and np.isfinite(norm))
        mean = total / self.loss_scale.value
        self.loss_scale.update(overflowed=not applied)
        return StepResult(mean, norm, applied, examples)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> float:
        """The mean loss of a response token over held-out examples."""
        self.loss_module.eval()
        batches = share_out(examples, self.step_plan.token_budget, self.world.size, self.config.val_batch_size)
        total = 0.0
        for batch, counts in self._rows(examples, batches):
            total += self.loss_module(batch, 1.0 if counts else 0.0).item()
        self.loss_module.train()
        (total,) = sum_across([total], self.world.device)
        return total / sum(example.label_count for example in examples)

    def _gradients_that_fit(self, step: int) -> tuple[list[Example], torch.Tensor]:
        """See _gradients; should memory not suffice for an unlucky batch, again with smaller micro-batches."""
        while True:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                return self._gradients(step)
            recover(self.loss_module)
            self.optimizer.zero_grad(set_to_none=True)
            give_back(self.world.devices)
            budget, rows, longest = self.step_plan.token_budget, self.step_plan.rows, self.setup.longest
            if self.world.size > 1 or (rows == 1 and budget <= longest):
                raise UserError(out_of_memory())
            if rows > 1:
                self.step_plan = self.step_plan._replace(rows=rows // 2)
            else:
                self.step_plan = self.step_plan._replace(token_budget=max(longest, budget * 3 // 4))

    def _gradients(self, step: int) -> tuple[list[Example], torch.Tensor]:
        """A step's examples and this process's part of its loss, times the loss scale; leaves gradients behind."""
        examples, rows = self._prepared.pop((step, self.step_plan), None) or self._prepare(step)
        labels = sum(example.label_count for example in examples)
        scale = self.loss_scale.value / labels
        loss = torch.zeros((), dtype=torch.float64, device=self.world.devices[-1])
        together = self.step_plan.rows
        for start in range(0, len(rows), together):
            values = []
            for number, (batch, counts) in enumerate(rows[start : start + together], start):
                # Dropout must not depend on what happened before this step, or a resumed run would differ.
                torch.manual_seed(seed_of(self.config.seed, step, self.world.rank, number))
                values.append(self.loss_module(batch, scale if counts else 0.0))
            for value in values:
                value.backward()
                loss += value.detach().to(loss.device)
        return examples, loss.to(self.world.device)

    def _prepare(self, step: int) -> tuple[list[Example], list[Row]]:
        """A step's examples, and this process's rows of them."""
        examples = [self.examples[i] for i in self.setup.schedule.indices(step)]
        batches = share_out(examples, self.step_plan.token_budget, self.world.size, self.config.micro_batch_size)
        return examples, list(self._rows(examples, batches))

    def _rows(self, examples: Sequence[Example], batches: list[list[int]]) -> Iterator[Row]:
        """This process's micro-batches, packed; see share_out."""
        for chosen in batches[self.world.rank :: self.world.size]:
            yield self.setup.pack([examples[i] for i in chosen or [0]]), bool(chosen)
