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


def test_of_a_small_loss_a_jump_of_twice_its_size_is_noise_until_it_is_one_point_high():
    calm = [0.1] * 40
    assert warnings([*calm, 0.4, 0.9, 1.0]) == []
    ((step, text),) = warnings([*calm, 1.2])
    assert step == 41 and "from about 0.100 to 1.200" in text


def test_of_a_large_loss_a_jump_must_be_twice_its_size():
    calm = [3.0] * 40
    assert warnings([*calm, 5.9]) == []
    ((step, text),) = warnings([*calm, 6.1])
    assert step == 41 and "from about 3.000 to 6.100" in text


def test_the_next_jump_is_told_once_a_hundred_steps_have_passed():
    losses = [3.0 * 0.999**step for step in range(300)]
    for step in (50, 60, 149, 150):  # counted from 1
        losses[step - 1] = 9.0
    assert [step for step, _text in warnings(losses)] == [50, 150]


def test_the_first_ten_steps_may_do_what_they_like():
    assert warnings([1.0, 9.0] * 5) == []
