"""Optimizers that take less memory, against torch's AdamW in fp32 and bounds worked out by hand."""

import pytest
import torch
from helpers.trainers import make_trainer, train

from configs.errors import UserError
from configs.training import TrainingConfig
from utils.model.rounding import round_stochastically
from utils.planning.shape import BytesEach
from utils.runs.checkpoint import read_checkpoint, size_of
from utils.training.optimizer import check_optimizer, make_optimizer, run_tensors

FRUGAL = pytest.mark.parametrize(
    "settings",
    [{"pure_bf16": True}, {"optimizer": "adamw_8bit"}, {"pure_bf16": True, "optimizer": "adamw_8bit"}],
    ids=["bf16", "8bit", "bf16-8bit"],
)


def test_rounding_goes_up_as_often_as_the_value_is_near():
    """Between 1 and 1 + 2^-7, the next bf16: a quarter of the way up, a quarter of the roundings go up."""
    count, value = 100_000, 1 + 2**-7 / 4
    rounded = round_stochastically(torch.full((count,), value), seed=1)
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).float().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5  # five standard deviations
    assert torch.equal(rounded, round_stochastically(torch.full((count,), value), seed=1))
    assert not torch.equal(rounded, round_stochastically(torch.full((count,), value), seed=2))
    # What bf16 holds exactly stays, negative or not.
    exact = torch.tensor([0.0, -1.5, 3.0e-39, -(2.0**100), 1 + 2**-7]).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), seed=3), exact)


def descend(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: int) -> torch.Tensor:
    """Steps along a gradient of 1; the weight after them."""
    for _step in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float()


def test_small_updates_count_in_bf16_though_each_is_below_a_rounding_step():
    """AdamW moves by lr a step where the gradient is constant: 1 -> 0.8 in 200 steps of 0.001.

    bf16 has no number between 1 and 1 - 2^-8 = 0.9961, so to the nearest every step is lost. Rounded at random, a step
    goes 2^-8 down with a chance of p = 0.256, so 200 steps have a standard deviation of sqrt(200 p (1 - p)) 2^-8 =
    0.0241 for one weight, and of 0.0241 / sqrt(10,000) for the mean of as many.
    """
    config = TrainingConfig(lr=1e-3, pure_bf16=True)
    start = torch.ones(10_000, dtype=torch.bfloat16)
    plain, kept = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    assert torch.equal(descend(torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0), plain, 200), start.float())
    moved = descend(make_optimizer([kept], config), kept, 200)
    assert abs(moved.mean().item() - 0.8) < 5 * 0.0241 / 100
    assert moved.std().item() == pytest.approx(0.0241, rel=0.1)


def test_a_step_in_bf16_is_fp32s_to_within_one_rounding():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 80).bfloat16())
    exact = torch.nn.Parameter(weight.detach().float())
    gradient = torch.randn(64, 80).bfloat16()
    weight.grad, exact.grad = gradient, gradient.float()
    make_optimizer([weight], TrainingConfig(lr=0.01, weight_decay=0.1, pure_bf16=True)).step()
    torch.optim.AdamW([exact], lr=0.01, weight_decay=0.1).step()
    spacing = torch.exp2(torch.floor(torch.log2(exact.detach().abs())) - 7)  # 8 significant bits
    assert ((weight.detach().float() - exact.detach()).abs() <= spacing).all()


def test_eight_bits_are_fp32s_adamw_where_rounding_costs_nothing():
    """One gradient everywhere: each moment is its block's largest number, which 8 bits hold exactly."""
    start = torch.linspace(-1, 1, 5000)
    quantised, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    config = TrainingConfig(lr=0.01, weight_decay=0.1, optimizer="adamw_8bit")
    moved = descend(make_optimizer([quantised], config), quantised, 20)
    expected = descend(torch.optim.AdamW([exact], lr=0.01, weight_decay=0.1), exact, 20)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    assert (moved - start).abs().min() > 0.1


@FRUGAL
def test_a_parabola_ends_in_its_minimum(settings):
    """From up to 3 away in 500 steps that shrink from 0.05 to nothing, all of them together 12.5 long.

    bf16's numbers from 2 on are 2^-6 apart: the target is half of that off at most, the last rounding less than all.
    """
    torch.manual_seed(0)
    target = torch.randn(80, 64).clamp(-3, 3)
    dtype = torch.bfloat16 if "pure_bf16" in settings else torch.float32
    weight = torch.nn.Parameter(torch.zeros(80, 64, dtype=dtype))
    optimizer = make_optimizer([weight], TrainingConfig(lr=0.05, **settings))
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 500)
        weight.grad = weight.detach() - target.to(dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    bound = 1.5 * 2**-6 if "pure_bf16" in settings else 1e-4
    assert (weight.detach().float() - target).abs().max() < bound


@FRUGAL
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_and_learns_what_fp32_does(tiny_model, tmp_path, settings):
    common = {"use_peft": False, "max_steps": 6, "lr": 1e-3, "save_steps": 3, "micro_batch_size": 2}
    whole = make_trainer(tiny_model, tmp_path / "whole", **common, **settings)
    losses = train(whole)
    fp32 = train(make_trainer(tiny_model, tmp_path / "fp32", **common))
    # bf16 keeps 8 bits: a relative error of 2^-9 in each of some ten roundings in a row.
    assert losses == pytest.approx(fp32, rel=10 * 2**-9)
    assert losses != fp32
    dtype = torch.bfloat16 if "pure_bf16" in settings else torch.float32
    assert {parameter.dtype for parameter in whole.parameters.values()} == {dtype}

    torch.manual_seed(12345)
    checkpoint = read_checkpoint(tmp_path / "whole" / "checkpoints" / "step-3")
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=checkpoint, **common, **settings)
    assert train(resumed) == losses[3:]
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
        for key, value in whole.optimizer.state[parameter].items():
            other = resumed.optimizer.state[resumed.parameters[name]][key]
            assert torch.equal(torch.as_tensor(other), torch.as_tensor(value)), (name, key)


@FRUGAL
def test_bytes_that_the_plan_counts_are_those_of_a_checkpoint(settings):
    parameter = torch.nn.Parameter(
        torch.zeros(256, 1024, dtype=torch.bfloat16 if "pure_bf16" in settings else torch.float32)
    )
    config = TrainingConfig(**settings)
    stored = size_of(run_tensors({"weight": parameter}, make_optimizer([parameter], config)))
    each = BytesEach.of(config.optimizer, config.pure_bf16)
    assert each.gradient == parameter.itemsize
    assert stored / parameter.numel() == pytest.approx(each.weight + each.optimizer, rel=0.01)


def test_a_paged_optimizer_is_refused_without_a_card():
    with pytest.raises(UserError, match="adamw_8bit"):
        check_optimizer("paged_adamw_8bit", torch.device("cpu"))
    check_optimizer("paged_adamw_8bit", torch.device("cuda"))
    check_optimizer("adamw_8bit", torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pure_bf16": True, "use_peft": True}, "--pure_bf16 has an effect only with full fine-tuning"),
        ({"pure_bf16": True, "use_fp16": True}, "leave --use_fp16"),
        ({"pure_bf16": True, "mixed_precision": False}, "--mixed_precision False out"),
        ({"optimizer": "adamw_8bit", "enable_fsdp": True}, "use --optimizer adamw"),
    ],
)
def test_settings_that_exclude_each_other(settings, said):
    (problem,) = TrainingConfig(**settings).problems()
    assert said in problem
    assert not list(TrainingConfig(pure_bf16=True, optimizer="adamw_8bit").problems())
