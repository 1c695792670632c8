"""The optimizer and its arithmetic: learning rate, bf16 weights, gradient norm, clipping, steps that are left out."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from utils.model.rounding import round_stochastically
from utils.rows.schedule import Schedule, seed_of

LAST_SHARE = 0.1
"""Where the cosine ends, as a share of the highest learning rate."""


def learning_rate(step: int, config: TrainingConfig, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0."""
    if config.scheduler == "constant":
        return config.lr
    if config.scheduler == "step":
        return config.lr * config.gamma ** schedule.epoch_of(step)
    warmup = math.ceil(config.warmup_ratio * schedule.total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, schedule.total_steps - warmup)
    return config.lr * (LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that a device can't run.

    Raises:
        UserError: a paged one without an NVIDIA card.
    """
    if name.startswith("paged") and device.type != "cuda":
        raise UserError(
            _(
                "--optimizer {name} moves between a card's memory and the host's, and there is no card here: use "
                "--optimizer adamw_8bit.",
                name=name,
            )
        )


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): torch's, fused into few passes over memory, or bitsandbytes' in 8 bits.

    The latter is Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization"; tensors of less than 4,096
    numbers stay in fp32.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}

    def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if config.optimizer == "adamw":
            return torch.optim.AdamW(parameters, **settings, fused=True)
        from bitsandbytes import optim

        return {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[config.optimizer](
            parameters, **settings
        )

    if config.pure_bf16:
        return StochasticRounding(list(parameters), make, config.lr, config.seed)
    return make(list(parameters))


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter that has had no step yet the state that an optimizer of make_optimizer begins with."""
    optimizer = optimizer.inner if isinstance(optimizer, StochasticRounding) else optimizer
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if state:
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                moments = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _moment in range(2)]
                steps = torch.zeros((), dtype=torch.float32, device=parameter.device)
                # All or nothing: memory may give out on the way.
                state.update(step=steps, exp_avg=moments[0], exp_avg_sq=moments[1])
            else:
                optimizer.init_state(group, parameter, group_index, index)


class StochasticRounding(torch.optim.Optimizer):
    """Lets an optimizer update bf16 weights in fp32, one tensor at a time, and rounds the results stochastically.

    Rounded to the nearest, an update below half of bf16's spacing (1/256 of the weight, or less) would always be lost;
    rounded up or down with the odds of its nearness to either, it is kept on average: Zamirai et al. 2020, "Revisiting
    BFloat16 Training". The optimizer's state is as for fp32 weights. The random numbers depend on the run's seed and
    on the number of the step alone, and are the same on every process that has the same weights.

    Args:
        parameters: bf16 weights, whole or sharded by FSDP.
        make: makes the optimizer for the fp32 copies of the weights.
        lr: its learning rate.
        seed: the run's.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        lr: float,
        seed: int,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.seed = seed
        self.exact = []
        for parameter in parameters:
            self.exact.append(nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)))
            _local(self.exact[-1]).untyped_storage().resize_(0)  # only `step` fills it, for a moment
        self.inner = make(self.exact)
        for parameter, exact in zip(parameters, self.exact, strict=True):
            self.state[parameter] = self.inner.state[exact]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights from their gradients."""
        (group,), (inner_group,) = self.param_groups, self.inner.param_groups
        inner_group["lr"] = group["lr"]
        steps_done = int(self.state[group["params"][0]].get("step", 0))
        for index, (parameter, exact) in enumerate(zip(group["params"], self.exact, strict=True)):
            if parameter.grad is None:
                continue
            copy = _local(exact)
            copy.untyped_storage().resize_(copy.numel() * copy.itemsize)
            exact.copy_(parameter)
            exact.grad = parameter.grad.float()
            self.inner.step()
            exact.grad = None
            # Of several dimensions the last one shards; replicas must round alike.
            shard = parameter.device_mesh.get_coordinate()[-1] if hasattr(parameter, "device_mesh") else 0
            _local(parameter).copy_(round_stochastically(copy, seed_of(self.seed, steps_done, index, shard)))
            copy.untyped_storage().resize_(0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP may have sharded; it shares the tensor's memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a tensor without dimensions; sharded gradients count whole."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_if_finite(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    loss: torch.Tensor,
    norm: torch.Tensor,
    limit: float | None,
    loss_scale: float,
) -> None:
    """Do a step with gradients clipped to `limit` (None = not), or change nothing if loss or norm is not finite.

    torch's AdamW decides on the card, so that the host goes on without waiting for the numbers.

    Args:
        norm: of the gradients, divided by `loss_scale` already.
        loss_scale: what the gradients are still multiplied with.
    """
    divisor = torch.full_like(norm, loss_scale)
    if limit is not None:
        divisor = divisor * ((norm + 1e-6) / limit).clamp(min=1.0)
    is_finite = torch.isfinite(loss) & torch.isfinite(norm)
    if isinstance(optimizer, torch.optim.AdamW):
        # As torch's own gradient scaler tells it.
        optimizer.grad_scale, optimizer.found_inf = divisor, (~is_finite).float()
        optimizer.step()
    elif is_finite:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor.item())
        optimizer.step()


def run_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """The tensors that make up a run's state, by parameter name; the optimizer's are created where it has none yet.

    They, and the dictionaries of the optimizer, are the run's own, so that to load into them is to resume.
    """
    tensors: dict[str, dict[str, Any]] = {"weights": {name: p.detach() for name, p in parameters.items()}}
    if optimizer is None:
        return tensors
    create_state(optimizer)
    return tensors | {f"optimizer.{name}": optimizer.state[parameter] for name, parameter in parameters.items()}
