"""The training loop: steps, evaluations, checkpoints, and an end that loses nothing."""

import gc
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from configs.errors import Interrupted, UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.loading import Data
from utils.machine.memory import peak_memory_gb
from utils.machine.world import barrier
from utils.model.adapters import trainable_parameters
from utils.runs.checkpoint import Checkpoint, Saver, load_tensors, size_of
from utils.runs.metrics import Metrics
from utils.runs.progress import Progress
from utils.runs.start import Start
from utils.runs.state import RunState
from utils.training.fitting import Fitted
from utils.training.interruptions import Interruptions
from utils.training.loss_scale import LossScale
from utils.training.loss_watch import LossWatch
from utils.training.optimizer import learning_rate, run_tensors
from utils.training.response_loss import ResponseLoss
from utils.training.setup import Setup
from utils.training.step import Stepper, StepResult

MAX_FAILED_STEPS = 10
"""Steps in a row whose gradient may be infinite or not a number before the run stops."""


class Trainer:
    """One run of training, from a base model with its trainable part to its last step.

    Args:
        loss_module: as `load_trainable` gives it.
        optimizer: of its trainable parameters.
        data: the examples to learn from and to measure on.
        start: where the run begins; see `resume`.
        fitted: how steps are cut.
    """

    def __init__(
        self,
        config: TrainingConfig,
        setup: Setup,
        loss_module: ResponseLoss,
        optimizer: torch.optim.Optimizer,
        data: Data,
        start: Start,
        fitted: Fitted,
    ) -> None:
        self.config, self.setup, self.world, self.data = config, setup, setup.world, data
        self.identity, self.schedule, self.plan_key = start.identity, setup.schedule, fitted.key
        self.model, self.optimizer = loss_module.model, optimizer
        self.parameters = trainable_parameters(self.model)
        self.stepper = Stepper(config, setup, loss_module, optimizer, data.training, fitted.step_plan)
        self.done = 0
        self.failed_in_a_row = 0
        self.watch = LossWatch()
        self.last_eval_loss: float | None = None
        self.last_saved = time.monotonic()
        self.saver = Saver(config.checkpoints_dir, self.world, config.keep_checkpoints)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's state over: weights, optimizer, loss scale, and the steps that are done.

        Raises:
            UserError: the checkpoint holds other tensors than the run has.
        """
        state = checkpoint.state
        tensors = run_tensors(self.parameters, self.optimizer)
        load_tensors(checkpoint, tensors, together=self.world.size > 1)
        self.stepper.loss_module.refresh()
        loss_scale = LossScale(**state.loss_scale)
        if loss_scale.is_used == self.stepper.loss_scale.is_used:  # another card may compute in another type
            self.stepper.loss_scale = loss_scale
        self.done, self.last_eval_loss = state.step, state.last_eval_loss

    def check_disk_space(self) -> None:
        """Refuse a run whose checkpoints and result would fill the disk; see Saver."""
        self.saver.check_disk_space(self._state_tensors())

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint; asking makes the optimizer's state where there is none yet."""
        return size_of(self._state_tensors())

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
                gc.unfreeze()  # or a notebook would never get the model's memory back

    def _one_step(self, metrics: Metrics, progress: Progress, interruptions: Interruptions) -> None:
        started = time.perf_counter()
        step = self.done
        rate = learning_rate(step, self.config, self.schedule)
        result = self.stepper.take(step, rate)
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
        if self.data.held_out and (is_last or self.schedule.ends_epoch(step)):
            self.last_eval_loss = self.stepper.evaluate(self.data.held_out)
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

    def _guard(self, result: StepResult, progress: Progress) -> None:
        """Take note of steps without a usable gradient; give up when they do not end."""
        self.failed_in_a_row = 0 if result.applied else self.failed_in_a_row + 1
        if result.applied:
            return
        if self.stepper.loss_scale.is_used and np.isfinite(result.loss):
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
        state = RunState(
            step=self.done,
            total_steps=self.schedule.total_steps,
            identity=self.identity,
            world_size=self.world.size,
            batch_size_training=self.config.batch_size_training,
            has_optimizer=self.config.save_optimizer,
            loss_scale=asdict(self.stepper.loss_scale),
            step_plan=Fitted(self.plan_key, self.stepper.step_plan).to_dict(),
            settings=asdict(self.config),
            last_eval_loss=self.last_eval_loss,
        )
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
