"""How the next token is chosen."""

import torch

from configs.serving import Sampling


def choose(scores: torch.Tensor, seen: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Choose the next token; penalty, temperature, top_k and top_p are applied in transformers' order.

    Args:
        scores: [vocab_size], fp32.
        seen: [vocab_size], bool: tokens that have occurred.

    Returns:
        The chosen id, shape [1].
    """
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    if sampling.temperature == 0:
        return scores.argmax(dim=0, keepdim=True)
    scores = scores / max(sampling.temperature, 1e-4)
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(dim=0)
        # A token goes if those before it already have the probability; the first one always stays.
        beyond = probabilities.cumsum(dim=0) - probabilities >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter_(0, order, beyond), -torch.inf)
    return torch.multinomial(scores.softmax(dim=0), 1, generator=generator)
