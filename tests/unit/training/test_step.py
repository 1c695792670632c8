"""A step as several processes take it, each in turn in this one; and what dropout may depend on."""

import pytest
import torch
from helpers.trainers import make_trainer

from configs.errors import UserError
from configs.peft import LoraConfig
from utils.machine.world import World
from utils.training.loss_scale import LossScale

WITH_DROPOUT = LoraConfig(lora_dropout=0.5)


def as_rank(trainer, rank: int, size: int):
    """The trainer's stepper in the place of one of several processes, which do not meet."""
    trainer.stepper.world = World(rank, size, [torch.device("cpu")])
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


def test_a_loss_scale_is_seen_in_no_number_and_no_weight(tiny_model, tmp_path):
    """Nor in the step that doubles it."""
    trainers = [make_trainer(tiny_model, tmp_path, batch_size_training=4, num_epochs=2) for _each in range(2)]
    trainers[1].stepper.loss_scale = LossScale(2.0**9, growth_interval=2)
    for step in range(4):
        plain, scaled = (trainer.stepper.take(step, 1e-3) for trainer in trainers)
        assert (scaled.loss, scaled.norm) == pytest.approx((plain.loss, plain.norm), rel=1e-5)
    assert trainers[1].stepper.loss_scale.value == 2.0**11
    for one, other in zip(*(trainer.stepper.parameters for trainer in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_that_does_not_fit_is_cut_smaller_down_to_the_longest_example(tiny_model, tmp_path, monkeypatch):
    """Of the eight examples' 155 tokens, the longest has 40."""
    settings = {"batch_size_training": 8}
    expected = make_trainer(tiny_model, tmp_path, **settings).stepper.take(0, 0.0)
    trainer = make_trainer(tiny_model, tmp_path, **settings)
    stepper, forward, rows = trainer.stepper, trainer.stepper.loss_module.forward, []

    def room_for(tokens: int) -> None:
        def narrow(batch, scale):
            rows.append(len(batch.input_ids))
            if rows[-1] > tokens:
                raise torch.cuda.OutOfMemoryError
            return forward(batch, scale)

        monkeypatch.setattr(stepper.loss_module, "forward", narrow)

    room_for(41)
    result = stepper.take(0, 0.0)
    assert (result.loss, result.norm) == pytest.approx((expected.loss, expected.norm), rel=1e-5)
    assert 40 <= stepper.step_plan.token_budget < max(rows) == 155
    room_for(39)
    with pytest.raises(UserError, match="memory does not suffice"):
        stepper.take(0, 0.0)
    assert stepper.step_plan.token_budget == 40


def test_rows_of_training_and_of_validation_have_their_own_limit(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, batch_size_training=8, micro_batch_size=3, val_batch_size=2)
    forward, rows = trainer.stepper.loss_module.forward, []

    def counted(batch, scale):
        rows.append(len(batch.segments.lengths))
        return forward(batch, scale)

    monkeypatch.setattr(trainer.stepper.loss_module, "forward", counted)
    trainer.stepper.take(0, 0.0)
    assert sum(rows) == 8 and max(rows) == 3
    rows.clear()
    trainer.stepper.evaluate(trainer.data.training[:5])
    assert sum(rows) == 5 and max(rows) == 2
