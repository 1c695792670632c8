"""What tells one tensor of a base model from another: a digest over rows spread over it, and a hash of all of it."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

SAMPLED_ROWS = 64
"""Rows of a large tensor that its digest is over; the first and the last are among them."""
WHOLE_BYTES = 2**20
"""A tensor of at most so many bytes is hashed whole."""


def sampled_digest(tensor: "torch.Tensor") -> str:
    """A tensor's dtype, its shape, and a hash over rows spread over it: `float16 32000x4096 3f5a…`."""
    import torch

    dtype, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))
    if tensor.nbytes > WHOLE_BYTES and len(tensor) > SAMPLED_ROWS:
        last = len(tensor) - 1
        tensor = tensor[torch.tensor([i * last // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)])]
    return f"{dtype} {shape} {whole_digest(tensor)}"


def whole_digest(tensor: "torch.Tensor") -> str:
    """SHA-256 of all bytes of a tensor on the CPU, in the order of its rows."""
    import torch

    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def fingerprint_of(digests: dict[str, str]) -> str:
    """One hash over the digests of all tensors by name, after the name of the rule that they were made by."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return f"rows{SAMPLED_ROWS}:{hashlib.sha256(text.encode()).hexdigest()}"


def in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Do something in a thread that the end of the program does not wait for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name=work.__name__, daemon=True).start()
    return future
