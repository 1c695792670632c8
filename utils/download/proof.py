"""Proof that bytes are the right ones: SHA-256, git's blob hash, and the header of safetensors."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 4 * 1024**2


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
