"""The training loop: steps, evaluations, checkpoints, and an end that loses nothing."""

import contextlib
import gc
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from configs.errors import Interrupted, UserError, out_of_memory
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.examples import Example
from ft_datasets.loading import Data
from utils.machine.compiling import should_compile
from utils.machine.memory import give_back, peak_memory_gb
from utils.machine.precision import Precision
from utils.machine.world import World, barrier, sum_across, sum_gradients, total_across
from utils.model.adapters import trainable_parameters
from utils.model.decoder import causal_lm
from utils.rows.packing import PackedBatch, heaviest_first, pack, share_out, tokens_of_a_step
from utils.rows.schedule import seed_of
from utils.runs import checkpoint as checkpoints
from utils.runs.checkpoint import Checkpoint
from utils.runs.metrics import Metrics
from utils.runs.progress import Progress
from utils.runs.start import Start
from utils.training.interruptions import Interruptions
from utils.training.loss_scale import LossScale
from utils.training.loss_watch import LossWatch
from utils.training.optimizer import gradient_norm, learning_rate, make_optimizer, run_tensors, step_if_finite
from utils.training.response_loss import ResponseLoss
from utils.training.search import Search
from utils.training.sharding import is_sharded, recover
from utils.training.step_plan import StepPlan
from utils.training.trials import Trials

MAX_FAILED_STEPS = 10
"""Steps in a row whose gradient may be infinite or not a number before the run stops."""


@dataclass
class StepResult:
    """What one optimizer step came to."""

    loss: float
    norm: float
    applied: bool
    examples: list[Example]


class Trainer:
    """One run of training, from a base model with its trainable part to its last step.

    Args:
        loss_module: as `load_trainable` gave it.
        precision: dtypes of the computation.
        data: the examples to learn from and to measure on.
        start: where the run begins, and its steps.
    """

    def __init__(
        self,
        config: TrainingConfig,
        world: World,
        loss_module: ResponseLoss,
        precision: Precision,
        data: Data,
        start: Start,
    ) -> None:
        self.config, self.world, self.precision = config, world, precision
        self.training, self.held_out = data.training, data.held_out
        self.schedule, self.identity = start.schedule, start.identity
        self.longest = data.longest
        self.loss_module, self.model = loss_module, loss_module.model
        self.parameters = trainable_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters.values(), config)
        self.loss_scale = LossScale.for_dtype(precision.compute)
        self.earlier_micro_batch: tuple[Any, ...] = ("",)
        """Of the run that this one goes on from: its kind, and what StepPlan holds."""
        self._prepared: dict[tuple[int, StepPlan], tuple[list[Example], list[tuple[PackedBatch, bool]]]] = {}
        self.done = 0
        self.failed_in_a_row = 0
        self.watch = LossWatch()
        self.last_eval_loss: float | None = None
        self.last_saved = time.monotonic()
        self.saver = checkpoints.Saver(config.checkpoints_dir, world, config.keep_checkpoints)
        self.loss_module.train()
        if start.checkpoint:
            self._resume(start.checkpoint)
        self.loss_module.refresh()
        self._choose_budget()

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Put the run's state as the checkpoint has it."""
        state = checkpoint.state
        tensors = run_tensors(self.parameters, self.optimizer)
        checkpoints.load_tensors(checkpoint, tensors, self.world)
        loss_scale = LossScale(**state["loss_scale"])
        if loss_scale.is_used == self.loss_scale.is_used:  # another card may compute in another type
            self.loss_scale = loss_scale
        self.earlier_micro_batch = tuple(state["micro_batch"])
        self.done, self.last_eval_loss = state["step"], state["last_eval_loss"]

    def _choose_budget(self) -> None:
        """Find the micro-batch that fills the card, trying with the longest examples; a resumed run keeps its own.

        The fused layers are compiled before: two pieces of code serve every setting that is tried. Plain ones would be
        compiled anew for each, so for them the choice is confirmed once they are compiled, and made smaller if need be.
        """
        step = tokens_of_a_step(self.training, self.schedule, self.world.size)
        self.largest_step = step.largest
        tokens_left = (self.schedule.total_steps - self.done) * step.mean * self.world.size
        self.compiles = should_compile(self.config.torch_compile, self.world.device, tokens_left)
        fused = self.loss_module.fused is not None
        if self.compiles and fused:
            self.loss_module.compile()
        layers = len(causal_lm(self.model).model.layers)
        recompute = self.config.fsdp_config.fsdp_activation_checkpointing
        kept_counts = range(layers + 1) if recompute is None else [0 if recompute else layers]
        trials = Trials(
            self.config,
            self.world,
            self.loss_module,
            list(self.parameters.values()),
            self.optimizer,
            heaviest_first(self.training),
            self._pack,
            step,
        )
        self.kind = trials.kind(
            compute=str(self.precision.compute),
            compiles=self.compiles,
            longest=self.longest,
            steps=step,
        )
        search = Search(
            self.world,
            self.longest,
            step,
            kept_counts,
            trials.attempt,
            is_sharded(self.loss_module),
            trials.host_memory(),
        )
        kind, *earlier = self.earlier_micro_batch
        is_known = kind == self.kind and search.has_host_memory(StepPlan(*earlier))
        self.step_plan = StepPlan(*earlier) if is_known else search.best(self.kind)
        if self.compiles and not fused:
            self.loss_module.compile()
            if not search.is_sharded:
                self.step_plan = search.shrunk(self.step_plan)

    @property
    def step_plan(self) -> StepPlan:
        """How steps are cut."""
        return self.loss_module.step_plan

    @step_plan.setter
    def step_plan(self, step_plan: StepPlan) -> None:
        self.loss_module.step_plan = step_plan

    def check_disk_space(self) -> None:
        """Refuse a run whose checkpoints and result would fill the disk; see Saver."""
        self.saver.check_disk_space(self._state_tensors())

    def _state_tensors(self) -> dict[str, dict[str, Any]]:
        return run_tensors(self.parameters, self.optimizer if self.config.save_optimizer else None)

    def run(self, metrics: Metrics) -> None:
        """Train from `self.done` to the schedule's end, with evaluations and checkpoints on the way.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state has been saved.
            UserError: the numbers went wrong for good.
        """
        progress = Progress(self.schedule.total_steps, self.done, self.world.is_main)
        gc.freeze()  # what exists now stays: looking through all examples for garbage would hold up the card
        with Interruptions() as interruptions:
            try:
                while self.done < self.schedule.total_steps:
                    self._one_step(metrics, progress, interruptions)
            finally:
                self.saver.wait()
                progress.close()

    def _one_step(self, metrics: Metrics, progress: Progress, interruptions: Interruptions) -> None:
        started = time.perf_counter()
        step = self.done
        rate = learning_rate(step, self.config, self.schedule)
        result = self._step(step, rate)
        self.done += 1
        tokens = sum(map(len, result.examples))
        speed = tokens / (time.perf_counter() - started)
        memory = peak_memory_gb(self.world)
        line = {
            "step": self.done,
            "epoch": self.schedule.epoch_of(step) + 1,
            "train_loss": result.loss if np.isfinite(result.loss) else None,
            "lr": rate,
            "grad_norm": result.norm if np.isfinite(result.norm) else None,
            "tokens": tokens,
            "tokens_per_second": round(speed, 1),
            "max_memory_gb": round(memory, 3),
        }
        if not result.applied:
            line |= {"skipped": True, "records": [example.number for example in result.examples]}
        metrics.write(**line)
        progress.update(self.done, result.loss, speed, memory)
        self._guard(result, progress)
        if result.applied and (warning := self.watch.update(self.done, result.loss)):
            progress.say(warning)
        is_last = self.done == self.schedule.total_steps
        # Clocks differ between processes; any one of them decides for all.
        interrupt, is_due = interruptions.heard_by_any(self.world, self._is_time_to_save())
        if self.held_out and (is_last or self.schedule.ends_epoch(step)):
            self.last_eval_loss = self.evaluate()
            metrics.write(step=self.done, eval_loss=self.last_eval_loss if np.isfinite(self.last_eval_loss) else None)
            progress.say(_("step {step}: held-out loss {loss}", step=self.done, loss=f"{self.last_eval_loss:.4f}"))
        if is_last or interrupt or is_due:
            self._save(metrics, progress)
        if interrupt and not is_last:
            failed = self.saver.wait()
            barrier()  # a process that left would make torchrun end the one that still writes
            raise Interrupted(interrupt, self._stopped(failed))

    def _stopped(self, failed: str) -> str:
        """What to tell at an end that was asked for, after a last save that may have failed."""
        if failed:
            return _("Stopped at step {step}. --resume auto goes on from the last whole checkpoint.", step=self.done)
        if not self.config.save_optimizer:
            return _(
                "Stopped at step {step}. Without the optimizer (--save_optimizer False) this was all.", step=self.done
            )
        if self.config.resume == "auto":
            return _(
                "Stopped at step {step}; everything is saved. The same command goes on from there.", step=self.done
            )
        return _("Stopped at step {step}; everything is saved. Go on from there with --resume auto.", step=self.done)

    def _gradients_that_fit(self, step: int) -> tuple[list[Example], torch.Tensor]:
        """See _gradients; should memory not suffice for an unlucky batch, again with smaller micro-batches."""
        while True:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                return self._gradients(step)
            recover(self.loss_module)
            self.optimizer.zero_grad(set_to_none=True)
            give_back(self.world.devices)
            budget, rows = self.step_plan.token_budget, self.step_plan.rows
            if self.world.size > 1 or (rows == 1 and budget <= self.longest):
                raise UserError(out_of_memory())
            if rows > 1:
                self.step_plan = self.step_plan._replace(rows=rows // 2)
            else:
                self.step_plan = self.step_plan._replace(token_budget=max(self.longest, budget * 3 // 4))

    def _gradients(self, step: int) -> tuple[list[Example], torch.Tensor]:
        """A step's examples and this process's part of its loss, times the loss scale; leaves gradients behind."""
        examples, batches = self._prepared.pop((step, self.step_plan), None) or self._prepare(step)
        labels = sum(example.label_count for example in examples)
        scale = self.loss_scale.value / labels
        loss = torch.zeros((), dtype=torch.float64, device=self.world.devices[-1])
        together = self.step_plan.rows
        for start in range(0, len(batches), together):
            values = []
            for number, (batch, counts) in enumerate(batches[start : start + together], start):
                # Dropout must not depend on what happened before this step, or a resumed run would differ.
                torch.manual_seed(seed_of(self.config.seed, step, self.world.rank, number))
                values.append(self.loss_module(batch, scale if counts else 0.0))
            for value in values:
                value.backward()
                loss += value.detach().to(loss.device)
        return examples, loss.to(self.world.device)

    def _step(self, step: int, rate: float) -> StepResult:
        examples, loss = self._gradients_that_fit(step)
        if step + 1 < self.schedule.total_steps:  # while the card is busy with this step
            self._prepared = {(step + 1, self.step_plan): self._prepare(step + 1)}
        if not is_sharded(self.loss_module):
            sum_gradients(list(self.parameters.values()))
        loss, norm = total_across(loss), gradient_norm(self.parameters.values()).to(loss) / self.loss_scale.value
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = self.config.gradient_clipping_threshold if self.config.gradient_clipping else None
        step_if_finite(self.optimizer, self.parameters.values(), loss, norm.float(), limit, self.loss_scale.value)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_module.refresh()
        total, norm = torch.stack((loss, norm)).tolist()
        applied = bool(np.isfinite(total) and np.isfinite(norm))
        mean = total / self.loss_scale.value
        self.loss_scale.update(overflowed=not applied)
        return StepResult(mean, norm, applied, examples)

    def _prepare(self, step: int) -> tuple[list[Example], list[tuple[PackedBatch, bool]]]:
        """A step's examples, and this process's micro-batches of them.

        A process without examples goes along with one that counts nothing (False): gradients are shared by all.
        """
        examples = [self.training[i] for i in self.schedule.indices(step)]
        batches = share_out(examples, self.step_plan.token_budget, self.world.size, self.config.micro_batch_size)
        return examples, [
            (self._pack([examples[i] for i in chosen or [0]]), bool(chosen))
            for chosen in batches[self.world.rank :: self.world.size]
        ]

    def _pack(self, examples: list[Example], at_least: int = 0) -> PackedBatch:
        return pack(examples, self.world.device, self.longest, at_least, self.world.devices[-1])

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss of a response token over the held-out examples."""
        self.loss_module.eval()
        batches = share_out(self.held_out, self.step_plan.token_budget, self.world.size, self.config.val_batch_size)
        total = 0.0
        for chosen in batches[self.world.rank :: self.world.size]:
            batch = self._pack([self.held_out[i] for i in chosen or [0]])
            total += self.loss_module(batch, 1.0 if chosen else 0.0).item()
        self.loss_module.train()
        (total,) = sum_across([total], self.world.device)
        return total / sum(example.label_count for example in self.held_out)

    def _guard(self, result: StepResult, progress: Progress) -> None:
        """Take note of steps without a usable gradient; give up when they do not end."""
        self.failed_in_a_row = 0 if result.applied else self.failed_in_a_row + 1
        if result.applied:
            return
        if self.loss_scale.is_used and np.isfinite(result.loss):
            progress.say(_("step {step}: fp16 overflow, step left out, smaller loss scale from now on", step=self.done))
        else:
            numbers = ", ".join(str(example.number) for example in result.examples)
            progress.say(
                _(
                    "step {step}: the loss or its gradient is not finite, step left out (records {numbers})",
                    step=self.done,
                    numbers=numbers,
                )
            )
        if self.failed_in_a_row >= MAX_FAILED_STEPS:
            raise UserError(
                _(
                    "{count} steps in a row gave no finite gradient; the weights are as they were before them. Usual "
                    "causes: a learning rate that is too high (--lr), fp16 on a model made for bf16 (leave --use_fp16 "
                    "out), a damaged base model.",
                    count=self.failed_in_a_row,
                )
            )

    def _is_time_to_save(self) -> bool:
        steps, seconds = self.config.save_steps, self.config.save_minutes * 60
        by_steps = steps > 0 and self.done % steps == 0
        return by_steps or (seconds > 0 and time.monotonic() - self.last_saved >= seconds)

    def _save(self, metrics: Metrics, progress: Progress) -> None:
        metrics.flush()
        state = {
            "step": self.done,
            "total_steps": self.schedule.total_steps,
            "identity": self.identity,
            "settings": asdict(self.config),
            "world_size": self.world.size,
            "batch_size_training": self.config.batch_size_training,
            "has_optimizer": self.config.save_optimizer,
            "loss_scale": asdict(self.loss_scale),
            "micro_batch": [self.kind, *self.step_plan],
            "last_eval_loss": self.last_eval_loss,
        }
        step, folder = self.done, self.config.checkpoints_dir
        self.saver.save(
            state,
            self._state_tensors(),
            report=lambda error: progress.say(
                _(
                    "The checkpoint of step {step} could not be written ({error}). The run goes on; earlier "
                    "checkpoints are whole. Make room on the disk of {folder}.",
                    step=step,
                    error=error,
                    folder=folder,
                )
            ),
        )
        self.last_saved = time.monotonic()
