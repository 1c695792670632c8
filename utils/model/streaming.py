"""Models whose weights are in memory one part at a time: several are computed side by side, layer by layer.

Of a model of any size that takes the memory of one decoder layer, or of the embedding or the head if that is more.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from utils.model.activations import Kept
from utils.model.attention import NO_PAST
from utils.model.decoder import causal_lm, layer_arguments, run_plain
from utils.rows.segments import Segments

ReadTensor = Callable[[str], torch.Tensor]
"""The tensor of a parameter, by the parameter's name within the causal language model."""

Way = Callable[[nn.Module], AbstractContextManager[object]]
"""A context in which a part of a model, whose weights are there, is computed in one of several ways."""

LOGIT_BYTES = 2**26
"""Bytes of the logits that are held of each way at a time."""


@dataclass(frozen=True)
class StreamedModel:
    """A model that is empty (its weights on the meta device), and where they are read from when they are needed.

    Attributes:
        ways: to compute it, by name: with and without the adapter that lies over it.
    """

    model: nn.Module
    read: ReadTensor
    ways: Mapping[str, Way]
    device: torch.device

    def __post_init__(self) -> None:
        """Give it its rotary frequencies, which are computed, not stored."""
        decoder = causal_lm(self.model).model
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(self.device)

    @contextmanager
    def part(self, name: str) -> Iterator[nn.Module]:
        """One of the model's modules, with its weights within the context alone."""
        part = causal_lm(self.model).get_submodule(name)
        empty = {place: parameter for place, parameter in part.named_parameters() if parameter.is_meta}
        for place, parameter in empty.items():
            tensor = self.read(f"{name}.{place}").to(self.device, parameter.dtype)
            _put(part, place, nn.Parameter(tensor, requires_grad=False))
        try:
            yield part
        finally:
            for place, parameter in empty.items():
                _put(part, place, parameter)


class Comparison:
    """Several models over the same examples.

    Args:
        examples: token ids of each, int64, shape [length].
        budget_seconds: for all the decoder layers. If the first one shows that they take longer, the last examples are
            left out; one always stays.
    """

    def __init__(
        self, models: Sequence[StreamedModel], examples: Sequence[torch.Tensor], budget_seconds: float
    ) -> None:
        self.models, self.budget_seconds = models, budget_seconds
        self.device = models[0].device
        self.examples = [ids.to(self.device) for ids in examples]
        self.hidden: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Compute what the head is applied to, of each way: `hidden`, for each example [length, hidden_size]."""
        self._through("model.embed_tokens", lambda module, _model, ids: module(ids.unsqueeze(0)), self.examples)
        layers = causal_lm(self.models[0].model).config.num_hidden_layers
        for number in range(layers):
            began = time.monotonic()
            loading = self._through(f"model.layers.{number}", self._layer)
            if number == 0:
                self._cut(loading, time.monotonic() - began - loading, layers)
        self._through("model.norm", lambda module, _model, hidden: module(hidden).squeeze(0))

    @torch.no_grad()
    def logits(self, positions: Sequence[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The next tokens' logits of each way, fp32, [some positions, vocab_size], until all positions had their turn.

        Args:
            positions: of each example, int64.
        """
        chosen = {
            way: torch.cat([states[at.to(self.device)] for states, at in zip(hidden, positions, strict=True)])
            for way, hidden in self.hidden.items()
        }
        at_once = max(1, LOGIT_BYTES // 4 // causal_lm(self.models[0].model).config.vocab_size)
        for first in range(0, sum(map(len, positions)), at_once):
            found = {}
            for model in self.models:
                with model.part("lm_head") as head:
                    for way, entered in model.ways.items():
                        with entered(head):
                            found[way] = head(chosen[way][first : first + at_once])
            yield found

    def _through(
        self,
        part: str,
        compute: Callable[[nn.Module, StreamedModel, torch.Tensor], torch.Tensor],
        inputs: Sequence[torch.Tensor] | None = None,
    ) -> float:
        """Replace what each example has become by what a part of its model makes of it; seconds of loading weights."""
        loading = 0.0
        for model in self.models:
            began = time.monotonic()
            with model.part(part) as module:
                loading += time.monotonic() - began
                for way, entered in model.ways.items():
                    with entered(module):
                        given = self.hidden[way] if inputs is None else inputs
                        self.hidden[way] = [compute(module, model, each) for each in given]
        return loading

    def _layer(self, layer: nn.Module, model: StreamedModel, hidden: torch.Tensor) -> torch.Tensor:
        length = hidden.shape[1]
        arguments = layer_arguments(
            causal_lm(model.model).model,
            hidden,
            torch.arange(length, device=self.device),
            Segments.of([length], self.device),
        )
        return run_plain(layer, hidden, Kept(), past=NO_PAST, **arguments)

    def _cut(self, loading: float, computing: float, layers: int) -> None:
        """Leave out the examples for which there is no time, by what one layer of all models took."""
        affordable = (self.budget_seconds / layers - loading) / max(computing, 1e-9) * len(self.examples)
        kept = max(1, min(len(self.examples), int(max(0.0, affordable))))
        del self.examples[kept:]
        for states in self.hidden.values():
            del states[kept:]


def _put(module: nn.Module, place: str, parameter: nn.Parameter) -> None:
    owner, _dot, leaf = place.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
