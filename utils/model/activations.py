"""What becomes of a layer's activations between its forward and its backward pass.

They are kept, or computed again (activation checkpointing, Chen et al. 2016), or wait in host memory, copied out and
back while the card computes. `MicroBatch` says which layers do what.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from utils.machine.memory import pinned_for
from utils.rows.segments import ROW_MULTIPLE


class Activations:
    """Those of one layer in one row."""

    def __init__(self) -> None:
        self.tensors: Sequence[torch.Tensor] | None = None

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take them from the forward pass."""
        raise NotImplementedError

    def get(self) -> Sequence[torch.Tensor] | None:
        """Give them to the backward pass, once; None = compute them again."""
        tensors, self.tensors = self.tensors, None
        return tensors


class Kept(Activations):
    """They stay where they are."""

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """See Activations."""
        self.tensors = tensors


class Recomputed(Activations):
    """Nothing stays but the layer's input."""

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """See Activations."""


class Offloaded(Activations):
    """They wait in host memory; those of two of a row's layers, at most, are on their way and on the card.

    Args:
        before: the layer that was offloaded before this one in the same forward pass. In the backward pass its turn
            comes after this one's, and it is fetched beside it.
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
    """For copies; None on a CPU, which does one thing after another."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class HostMemory(NamedTuple):
    """Main memory for offloaded activations.

    Attributes:
        room: bytes.
        bytes_of: how many a layer takes in a row of so many tokens.
        seconds: that the copy of one token's takes.
        pin_seconds: that it takes to pin a byte.
    """

    room: float
    bytes_of: Callable[[int], int]
    seconds: float
    pin_seconds: float = 0.0


def host_seconds(device: torch.device, size: int = 2**25) -> tuple[float, float]:
    """How long the copy of a byte from the card to host memory takes (infinite: no room), and how long to pin one."""
    seconds = [math.inf]
    start = time.perf_counter()
    on_host = pinned_for(device, functools.partial(torch.empty, 8 * size, dtype=torch.uint8))[:size]
    pinning = (time.perf_counter() - start) / (8 * size)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        on_card = torch.empty(size, dtype=torch.uint8, device=device)
        for _repeat in range(5):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            on_host.copy_(on_card, non_blocking=True)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / size, pinning


class MicroBatch(NamedTuple):
    """How a step is cut into rows, and what their layers do with their activations.

    Attributes:
        token_budget: most tokens of a row.
        kept_layers: how many layers of such a row, from the last, keep theirs; of a shorter one more, for as many
            tokens in all.
        offload_every: of the other layers, every so many-th lets them wait in host memory; 0 = none. The rest compute
            them again.
        rows: how many go forward one after another before the first goes backward; see rows_together.
    """

    token_budget: int
    kept_layers: int
    offload_every: int = 0
    rows: int = 1

    def keeps(self, tokens: int, layers: int) -> int:
        """How many of a row's layers keep their activations."""
        full = math.ceil(self.token_budget / ROW_MULTIPLE) * ROW_MULTIPLE
        return min(layers, self.kept_layers * max(full, tokens) // tokens)

    def offloads(self, others: int) -> int:
        """How many of the `others`, which do not keep them, offload them."""
        return math.ceil(others / self.offload_every) if self.offload_every else 0

    def activations(self, tokens: int, layers: int) -> list[Activations]:
        """Where each layer of a row of so many tokens leaves its activations."""
        kept = self.keeps(tokens, layers)
        places: list[Activations] = []
        before = None
        for to_kept in range(layers - kept, 0, -1):
            # The last of them is offloaded in any case: when its turn comes, the card still has its tensors.
            if self.offload_every and (to_kept - 1) % self.offload_every == 0:
                before = Offloaded(before)
                places.append(before)
            else:
                places.append(Recomputed())
        return places + [Kept() for _layer in range(kept)]
