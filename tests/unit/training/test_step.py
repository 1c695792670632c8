"""A step as several processes take it, each in turn in this one; and what dropout may depend on."""

import pytest
import torch
from helpers.trainers import make_trainer

from configs.peft import LoraConfig
from utils.machine.world import World

WITH_DROPOUT = LoraConfig(lora_dropout=0.5)


def as_rank(trainer, rank: int, size: int):
    """The trainer's stepper in the place of one of several processes, which do not meet."""
    trainer.stepper.world = World(rank, rank, size, [torch.device("cpu")])
    return trainer.stepper


def test_losses_of_two_processes_add_up_to_that_of_one(tiny_model, tmp_path):
    """Each divides by the labels of all, though their own are fewer; a third process may have none at all."""
    settings = {"batch_size_training": 2, "lr": 0.0}
    whole = make_trainer(tiny_model, tmp_path, **settings).stepper.take(0, 0.0)
    for size in (2, 3):
        trainer = make_trainer(tiny_model, tmp_path, **settings)
        parts = [as_rank(trainer, rank, size).take(0, 0.0) for rank in range(size)]
        assert sum(part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-6)
        one, other = whole.examples
        assert one.label_count != other.label_count


def alike(trainer, count: int) -> None:
    """Let the run's examples be one example many times, so that only chance tells rows apart."""
    trainer.data.training[:] = [trainer.data.training[1]] * count


def test_dropout_is_another_in_each_row_on_each_process_and_in_each_step(tiny_model, tmp_path):
    """Of equal rows with equal dropout the mean gradient would be that of one of them."""
    settings = {"lora_config": WITH_DROPOUT, "micro_batch_size": 1, "max_steps": 4, "num_epochs": 4}

    def norm(step: int, rank: int = 0, size: int = 1, batch: int = 1) -> float:
        trainer = make_trainer(tiny_model, tmp_path, batch_size_training=batch, **settings)
        alike(trainer, 8)
        return as_rank(trainer, rank, size).take(step, 0.0).norm

    first = norm(step=0)
    assert norm(step=0) == first
    assert norm(step=1) != pytest.approx(first, rel=1e-3)
    assert norm(step=0, batch=2) != pytest.approx(first, rel=1e-3)  # two rows in one process
    on_two = [norm(step=0, rank=rank, size=2, batch=2) for rank in (0, 1)]  # a row each, divided by the labels of both
    assert on_two[0] == pytest.approx(first / 2, rel=1e-5) and on_two[1] != pytest.approx(first / 2, rel=1e-3)


def test_dropout_is_of_training_alone(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, lora_config=WITH_DROPOUT, batch_size_training=4)
    stepper = trainer.stepper
    stepper.take(0, 1e-2)  # from now on the adapter adds something
    held_out = trainer.data.training[:3]
    loss = stepper.evaluate(held_out)
    assert [stepper.evaluate(held_out) for _again in range(3)] == [loss] * 3
    assert stepper.loss_module.training
    stepper.loss_module.eval()
    by_hand = sum(stepper.loss_module(trainer.setup.pack([example]), 1.0).item() for example in held_out)
    assert loss == pytest.approx(by_hand / sum(example.label_count for example in held_out), rel=1e-5)
