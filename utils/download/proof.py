"""Proof that bytes are the right ones: SHA-256, git's blob hash, and the header of safetensors."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.messages import _

BLOCK = 4 * 1024**2
LONGEST_HEADER = 100_000_000
"""The safetensors format's own limit."""


def new_hash(algorithm: str, size: int) -> Any:
    """A hashlib object for a file of `size` bytes; `algorithm` is sha256 or git-sha1."""
    if algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def has_digest(path: Path, size: int, algorithm: str, digest: str, read: Callable[[int], None]) -> bool:
    """Read the whole file at `path`: is it this one? `read` hears how many bytes were read."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            proof = new_hash(algorithm, size)
            while block := file.read(BLOCK):
                proof.update(block)
                read(len(block))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return proof.hexdigest() == digest


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with the header of a safetensors file; None where its tensors fill the file exactly."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > min(LONGEST_HEADER, size - 8):
                return _("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(header_length))
        spans = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
        position = 0
        for start, end in spans:
            if start != position or end < start:
                return _("its tensors overlap or leave gaps")
            position = end
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return _("its header is not readable")
    if 8 + header_length + position != size:
        return _("its tensors do not fill it")
    return None
