"""Rounding to 16 bits that keeps the mean."""

import torch


def round_stochastically(values: torch.Tensor, seed: int) -> torch.Tensor:
    """fp32 -> bf16, up or down at random with odds that keep the mean.

    bf16 is the upper half of an fp32's bits; adding a random number to the lower half carries into the upper one with
    the probability that the lower half stands for.
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    bits = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
    return bits.view(torch.float32).to(torch.bfloat16)
