"""Learning rates, clipping and the fp16 loss scale against values worked out by hand."""

import math

import pytest
import torch

from configs.training import TrainingConfig
from utils.rows.schedule import Schedule
from utils.training.loss_scale import LossScale
from utils.training.optimizer import gradient_norm, learning_rate, make_optimizer, step_if_finite


def rates(total: int, examples: int = 1000, batch: int = 1, **settings) -> list[float]:
    config = TrainingConfig(lr=1.0, **settings)
    schedule = Schedule(examples, batch, num_epochs=1000, max_steps=total, seed=0)
    return [learning_rate(step, config, schedule) for step in range(total)]


def test_cosine_rises_over_the_warm_up_and_falls_towards_a_tenth():
    # 10 steps, 20 % warm-up: 1/2, 1, then 0.1 + 0.9 (1 + cos(pi k/8)) / 2 for k = 0..7.
    expected = [0.5, 1.0, 1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
    assert rates(10, scheduler="cosine", warmup_ratio=0.2) == pytest.approx(expected, abs=1e-6)


def test_cosine_ends_next_to_a_tenth_on_a_long_run():
    long = rates(2000, scheduler="cosine", warmup_ratio=0.03)
    assert long[0] == pytest.approx(1 / 60)
    assert long[59] == pytest.approx(1.0)
    assert max(long) == pytest.approx(1.0)
    assert long[-1] == pytest.approx(0.1, abs=1e-5)


def test_a_warm_up_of_a_part_of_a_step_is_a_step():
    # 15 % of 10 steps are one and a half.
    assert rates(10, scheduler="cosine", warmup_ratio=0.15)[:3] == pytest.approx([0.5, 1.0, 1.0])
    # 3 % of 10: one, at the highest rate.
    assert rates(10, scheduler="cosine", warmup_ratio=0.03)[:2] == pytest.approx([1.0, 1.0])


def test_cosine_without_warm_up_begins_at_the_highest_rate():
    assert rates(4, scheduler="cosine", warmup_ratio=0.0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 1.0])
def test_cosine_is_never_zero_nor_above_the_highest_rate(warmup_ratio):
    for total in (1, 2, 3, 50):
        assert all(0 < rate <= 1 for rate in rates(total, scheduler="cosine", warmup_ratio=warmup_ratio))


def test_step_multiplies_by_gamma_once_an_epoch():
    # 5 examples, 2 a step: 3 steps an epoch.
    expected = [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert rates(10, examples=5, batch=2, scheduler="step", gamma=0.5) == pytest.approx(expected)


def test_constant_is_constant():
    assert rates(5, scheduler="constant", warmup_ratio=0.5) == [1.0] * 5


def parameters_with_gradients() -> list[torch.nn.Parameter]:
    one, two, three = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])  # `three` has none
    return [one, two, three]


def test_norm_is_taken_over_all_gradients_together():
    assert gradient_norm(parameters_with_gradients()) == pytest.approx(5.0)


def test_norm_of_a_gradient_with_nan_or_infinity_is_not_finite():
    for bad in (math.nan, math.inf):
        parameters = parameters_with_gradients()
        parameters[0].grad[1] = bad
        assert not math.isfinite(gradient_norm(parameters))


class Recorder(torch.optim.SGD):
    """Stands for any optimizer that is not torch's AdamW: plain descent, so that a step shows its gradient."""


@pytest.mark.parametrize("limit", [None, 1.0, 100.0])
@pytest.mark.parametrize("kind", [Recorder, torch.optim.AdamW])
def test_a_step_takes_gradients_unscaled_and_clipped(kind, limit):
    """A gradient of norm 5, held times 8 for fp16."""
    parameters = parameters_with_gradients()
    for parameter in parameters[:2]:
        parameter.grad *= 8
    optimizer = kind(parameters, lr=1.0) if kind is Recorder else kind(parameters, lr=1.0, eps=10.0, fused=True)
    norm = gradient_norm(parameters) / 8
    step_if_finite(optimizer, parameters, torch.tensor(2.0), norm, limit, 8.0)
    factor = 0.2 if limit == 1.0 else 1.0
    expected = [3.0 * factor, 0.0, -4.0 * factor]
    if kind is torch.optim.AdamW:  # the first step moves by g / (|g| + eps)
        expected = [g / (abs(g) + 10) for g in expected]
    moved = [-number for parameter in parameters[:2] for number in parameter.tolist()]
    assert moved == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [Recorder, torch.optim.AdamW])
def test_no_step_is_taken_with_a_loss_or_norm_that_is_not_finite(kind, bad):
    parameters = parameters_with_gradients()
    optimizer = kind(parameters, lr=1.0) if kind is Recorder else kind(parameters, lr=1.0, fused=True)
    for loss, norm in ((torch.tensor(bad), torch.tensor(5.0)), (torch.tensor(1.0), torch.tensor(bad))):
        step_if_finite(optimizer, parameters, loss, norm, 1.0, 1.0)
    assert all(not parameter.any() for parameter in parameters)
    assert all(not state["step"] and not state["exp_avg"].any() for state in optimizer.state.values())


def test_optimizer_is_adamw_as_its_paper_has_it():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = make_optimizer([parameter], TrainingConfig(lr=0.1, weight_decay=0.5))
    weight, mean, square = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.3, -1.0, 0.2), 1):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weight -= 0.1 * 0.5 * weight
        weight -= 0.1 * (mean / (1 - 0.9**step)) / (math.sqrt(square / (1 - 0.999**step)) + 1e-8)
        assert parameter.item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_fp16_has_a_loss_scale(dtype):
    scale = LossScale.for_dtype(dtype)
    scale.update(overflowed=True)
    assert scale.value == 1.0
    assert not scale.is_used


def test_loss_scale_is_halved_by_an_overflow_and_doubled_after_a_calm_while():
    scale = LossScale.for_dtype(torch.float16)
    scale.growth_interval = 3
    assert scale.value == 2**14
    assert scale.is_used
    seen = []
    for overflowed in (True, True, False, False, False, False, False, True, False, False, False):
        scale.update(overflowed)
        seen.append(math.log2(scale.value))
    assert seen == [13, 12, 12, 12, 13, 13, 13, 12, 12, 12, 13]


def test_loss_scale_stays_within_bounds_and_in_use():
    scale = LossScale(4.0, growth_interval=1)
    for _ in range(10):
        scale.update(overflowed=True)
    assert scale.value == 2.0
    assert scale.is_used
    for _ in range(100):
        scale.update(overflowed=False)
    assert scale.value == 2**24
