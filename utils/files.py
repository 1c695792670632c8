"""Files that are whole or not there: durable writes, hashes, JSON, the header of safetensors, room on a disk."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _

LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header at most: the format's own limit."""


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
        flush(destination.parent)


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of settings holds, which people or other programs have written.

    NaN and Infinity are taken for numbers, as Python writes them.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it can't be read, or holds no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(_("{file} can't be read: {error}.", file=path, error=error.strerror)) from error
    try:
        values = json.loads(content.decode("utf-8"))
        why = "" if isinstance(values, dict) else _("it holds no object with named values")
    except UnicodeDecodeError as error:
        why = _("line {line} is not UTF-8 text", line=content[: error.start].count(b"\n") + 1)
    except json.JSONDecodeError as error:
        why = _("line {line}, column {column}: {error}", line=error.lineno, column=error.colno, error=error.msg)
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        why = _("it is nested too deep, or holds too long a number")
    if why:
        raise UserError(
            _("{file} is not readable JSON ({why}). Correct it, or copy or download it again.", file=path, why=why)
        )
    return values


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
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _("its header is not readable")
    if 8 + header_length + position != size:
        return _("its tensors do not fill it")
    return None


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make sure that a file's or folder's content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_text(value: Any) -> str:
    """A value as JSON that people can read."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that people can read; write_durably is for what a crash must not leave in half."""
    path.write_text(json_text(value), encoding="utf-8")
