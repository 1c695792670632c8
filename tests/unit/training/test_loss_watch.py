"""Warnings about losses, against sequences made by hand."""

from utils.training.loss_watch import LossWatch


def warnings(losses):
    watch = LossWatch()
    said = [(step, watch.update(step, loss)) for step, loss in enumerate(losses, 1)]
    return [(step, text) for step, text in said if text]


def test_a_run_that_learns_is_left_in_peace():
    assert warnings([3.0 * 0.99**step for step in range(300)]) == []


def test_a_jump_is_told_once_for_a_while():
    losses = [2.0 * 0.995**step for step in range(40)] + [4.0, 4.1, 4.0]
    ((step, text),) = warnings(losses)
    assert step == 41 and "4.000" in text and "--lr" in text


def test_a_run_that_learns_nothing_is_told_so_after_a_hundred_steps():
    ((step, text),) = warnings([2.0 + 0.01 * (step % 3) for step in range(250)])
    assert step == 100 and "100 steps" in text
