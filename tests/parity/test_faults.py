"""Steps whose numbers go wrong, and what they leave of a run."""

import copy
import math

import pytest
import torch
from helpers.command_runs import call_main
from helpers.trainers import make_trainer, train

import llama_finetuning
from configs.errors import UserError
from utils.runs.checkpoint import read_checkpoint
from utils.runs.metrics import read_metrics
from utils.training.loss_scale import LossScale
from utils.training.trainer import MAX_FAILED_STEPS


def state_of(trainer) -> tuple[dict, dict]:
    """Copies of weights and optimizer."""
    weights = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    return weights, copy.deepcopy(trainer.optimizer.state_dict()["state"])


def poison(trainer, monkeypatch, steps: range, where: str) -> dict[int, tuple]:
    """Spoil the loss or the gradient of some steps (counted from 1); returns the state before each step."""
    forward, before = trainer.stepper.loss_module.forward, {}
    parameter = next(iter(trainer.parameters.values()))

    def spoilt(batch, scale):
        loss = forward(batch, scale)
        if scale:
            before.setdefault(trainer.done + 1, state_of(trainer))
        if trainer.done + 1 not in steps:
            return loss
        if where == "loss":
            return loss * math.nan
        return loss + (torch.sqrt(parameter.sum() * 0) if where == "gradient" else 0)  # its derivative is infinite

    monkeypatch.setattr(trainer.stepper.loss_module, "forward", spoilt)
    return before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(
    tiny_model, tmp_path, monkeypatch, capsys, where
):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=5, lr=1e-2)
    before = poison(trainer, monkeypatch, range(3, 4), where)
    losses = train(trainer)

    (weights, optimizer), (weights_after, optimizer_after) = before[3], before[4]
    for name, weight in weights.items():
        assert torch.equal(weights_after[name], weight), name
    for index, state in optimizer.items():
        assert all(torch.equal(optimizer_after[index][key], state[key]) for key in state)
    assert any(not torch.equal(before[3][0][name], before[2][0][name]) for name in weights)  # other steps do move them

    line = read_metrics(tmp_path)[2]
    numbers = [trainer.data.training[i].number for i in trainer.schedule.indices(2)]
    assert (line["step"], line["skipped"], line["records"]) == (3, True, numbers)
    assert [loss is None for loss in losses] == [False, False, where == "loss", False, False]
    said = capsys.readouterr().out
    assert f"step 3: the loss or its gradient is not finite, step left out (records {numbers[0]}, " in said
    assert "fp16" not in said


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_fp16_overflow_is_told_from_a_loss_that_is_not_a_number(tiny_model, tmp_path, monkeypatch, capsys, where):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4)
    trainer.stepper.loss_scale = LossScale.for_dtype(torch.float16)
    poison(trainer, monkeypatch, range(2, 3), where)
    train(trainer)
    said = capsys.readouterr().out
    assert ("step 2: fp16 overflow" in said) == (where == "gradient")
    assert ("step 2: the loss or its gradient is not finite" in said) == (where == "loss")
    assert trainer.stepper.loss_scale.value == 2.0**13


def test_overflows_that_end_leave_the_run_in_peace_and_those_that_do_not_end_it(tiny_model, tmp_path, monkeypatch):
    calm = make_trainer(tiny_model, tmp_path / "calm", num_epochs=9, max_steps=MAX_FAILED_STEPS + 2)
    poison(calm, monkeypatch, range(2, MAX_FAILED_STEPS + 1), "loss")
    train(calm)
    assert calm.done == MAX_FAILED_STEPS + 2

    stuck = make_trainer(tiny_model, tmp_path / "stuck", num_epochs=9, max_steps=MAX_FAILED_STEPS + 8)
    before = poison(stuck, monkeypatch, range(4, 100), "gradient")
    with pytest.raises(UserError, match=f"{MAX_FAILED_STEPS} steps in a row.*learning rate.*--lr.*fp16"):
        train(stuck)
    assert stuck.done == 3 + MAX_FAILED_STEPS
    for name, parameter in stuck.parameters.items():
        assert torch.equal(parameter, before[4][0][name]), name


def test_a_learning_rate_far_too_high_ends_with_a_diagnosis(tiny_model, data_file, tmp_path):
    flags = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", tmp_path / "out"]
    flags += ["--lr", "1e30", "--scheduler", "constant", "--max_steps", 40, "--run_validation", "False"]
    with pytest.raises(UserError, match="steps in a row gave no finite gradient"):
        call_main(llama_finetuning.main, *flags)


def test_a_run_that_goes_on_in_fp16_has_a_loss_scale(tiny_model, tmp_path, monkeypatch):
    """As one does that was begun on another card, or on a CPU."""
    settings = {"batch_size_training": 4, "max_steps": 4, "save_steps": 2}
    train(make_trainer(tiny_model, tmp_path / "begun", **settings))
    checkpoint = read_checkpoint(tmp_path / "begun" / "checkpoints" / "step-2")
    assert checkpoint.state.loss_scale["value"] == 1.0
    monkeypatch.setattr(
        "utils.machine.precision.half_precision", lambda _device, _fp16: (torch.float16, "another card")
    )
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=checkpoint, **settings)
    assert resumed.done == 2
    assert resumed.stepper.loss_scale.is_used
