"""What becomes of a layer's activations between its forward and its backward pass.

They are kept, or computed again (activation checkpointing, Chen et al. 2016), or wait in host memory, copied out and
back while the card computes. `StepPlan` says which layers do what.
"""

import functools
from collections.abc import Sequence

import torch

from utils.machine.memory import pinned_for


class Activations:
    """The activations of one layer in one row, from its forward pass to its backward pass."""

    def __init__(self) -> None:
        self.tensors: Sequence[torch.Tensor] | None = None

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the tensors that the forward pass leaves."""
        raise NotImplementedError

    def get(self) -> Sequence[torch.Tensor] | None:
        """The tensors for the backward pass, given once; None = they are to be computed again."""
        tensors, self.tensors = self.tensors, None
        return tensors


class Kept(Activations):
    """Activations that stay on their device until the backward pass."""

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """See Activations."""
        self.tensors = tensors


class Recomputed(Activations):
    """Activations that nobody keeps: the backward pass computes them again from the layer's input."""

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """See Activations."""


class Offloaded(Activations):
    """Activations that wait in host memory; on the card, or on their way, are those of two of a row's layers at most.

    Args:
        before: the activations that were offloaded before these in the same forward pass. In the backward pass their
            turn comes after these, and they are fetched beside them.
    """

    def __init__(self, before: "Offloaded | None") -> None:
        super().__init__()
        self.before = before
        self.device = torch.device("cpu")
        self.on_host: list[torch.Tensor] = []
        self.copied: torch.cuda.Event | None = None
        """The end of the copy that was begun last."""

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """See Activations."""
        if self.before:
            self.before._leave()
        self.tensors, self.device = tensors, tensors[0].device
        make = functools.partial(torch.empty_like, device="cpu")
        self.on_host = [pinned_for(self.device, functools.partial(make, tensor)) for tensor in tensors]
        self._copy(tensors, self.on_host)

    def get(self) -> Sequence[torch.Tensor] | None:
        """See Activations."""
        self._fetch()
        if self.before:
            self.before._fetch()
        self._wait()
        self.on_host = []
        return super().get()

    def _leave(self) -> None:
        self._wait()  # what is computed from here on may be written where the tensors are
        self.tensors = None

    def _fetch(self) -> None:
        if self.tensors is None:
            self.tensors = [torch.empty_like(tensor, device=self.device) for tensor in self.on_host]
            self._copy(self.on_host, self.tensors)

    def _copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Begin to copy, after what the card has been told so far and beside what it will be told next."""
        stream = _stream(self.device)
        if stream:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            self.copied = stream.record_event() if stream else None

    def _wait(self) -> None:
        if self.copied:
            torch.cuda.current_stream(self.device).wait_event(self.copied)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """A device's stream for copies; None on a CPU, which does one thing after another."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
