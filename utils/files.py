"""Files that are whole or not there: durable writes, hashes, JSON of others, the header of safetensors."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from configs.messages import _


def write_durably(path: Path, text: str) -> None:
    """Replace a file's text, in a way that survives a power cut at any instant."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace_durably(temporary, path)


def replace_durably(source: Path, destination: Path) -> None:
    """Rename, and have the disk remember it."""
    source.replace(destination)
    if os.name == "posix":  # Windows can't open a folder, and its rename is written through
        folder = os.open(destination.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


LONGEST_HEADER = 100_000_000
"""The safetensors format's own limit."""


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


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make sure that a file's or folder's content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
