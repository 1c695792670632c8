"""Cross-entropy on the labelled positions alone, in chunks, so that the full logits never exist.

(utils/rows/packing.py says which positions these are, `ResponseLoss` picks them out.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from utils.rows.segments import ROW_MULTIPLE

CHUNK = 1024
"""Rows of logits in memory at a time; a large vocabulary takes 150,000 numbers a row."""


ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A function with the arguments of `chunk_loss`."""


def chunk_loss(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of each row of logits [rows, vocab_size], and `scale` times its gradient in their dtype."""
    wide, target = logits.float(), labels[:, None]
    log_total = wide.logsumexp(dim=1, keepdim=True)
    losses = (log_total - wide.gather(1, target)).squeeze(1)
    # d loss / d logits = softmax - one-hot; scaled before it is rounded to half precision.
    grad = (wide - log_total).exp_().scatter_add_(1, target, torch.full_like(log_total, -1.0))
    return losses, grad.mul_(scale).to(logits.dtype)


class _LabelledCrossEntropy(torch.autograd.Function):
    """The gradient of the loss is known as soon as the logits are, so it is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        of_chunk: ChunkLoss,
    ) -> torch.Tensor:
        train_hidden, train_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if train_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train_weight else None
        compute_weight = weight.to(hidden.dtype)
        factor = torch.full((), scale, device=hidden.device)  # a tensor: a new number makes no new compiled code
        for start in range(0, hidden.shape[0], CHUNK):
            rows, target = hidden[start : start + CHUNK], labels[start : start + CHUNK]
            count = rows.shape[0]
            if hidden.is_cuda:  # see ROW_MULTIPLE; what the rows of zeros give is cut off again
                filling = -count % ROW_MULTIPLE
                rows, target = pad(rows, (0, 0, 0, filling)), pad(target, (0, filling))
            logits = rows @ compute_weight.t()
            if not (train_hidden or train_weight):
                loss += cross_entropy(logits[:count].float(), target[:count], reduction="sum")
                continue
            losses, grad = of_chunk(logits, target, factor)
            loss += losses[:count].sum()
            if train_hidden:
                grad_hidden[start : start + count] = (grad @ compute_weight)[:count]
            if train_weight:
                grad_weight += grad.t() @ rows  # rows of zeros add nothing
            del logits, grad  # or they would lie beside the next chunk's
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (upstream,) = grad_outputs
        return (
            None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * upstream.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def labelled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 1.0,
    of_chunk: ChunkLoss = chunk_loss,
) -> torch.Tensor:
    """`scale` times the sum of the cross-entropies of `hidden @ weight.T` against `labels`.

    The gradient is exact for an upstream gradient of 1, and rounded in `hidden`'s dtype after `scale` was applied, so a
    gradient scaler's factor belongs into `scale`.

    Args:
        hidden: [rows, hidden_size], the labelled positions alone.
        weight: [vocab_size, hidden_size], the output head.
        labels: [rows], int64; every one counts.
        scale: factor of loss and gradient.
        of_chunk: `chunk_loss`, or the same compiled.
    """
    if not torch.is_grad_enabled():  # needs_input_grad says nothing of that
        hidden, weight = hidden.detach(), weight.detach()
    return _LabelledCrossEntropy.apply(hidden, weight, labels, scale, of_chunk)
