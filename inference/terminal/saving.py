"""A conversation as data: a line that chat_dataset reads."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.messages import _
from ft_datasets.conversation import Message
from ft_datasets.records import DataFiles, read_entries


def append_record(file: Path, messages: Sequence[Message]) -> None:
    """Append a conversation to a file of JSON lines, which is made where there is none.

    Raises:
        UserError: the file holds something else, or can't be written; it is then as it was before.
    """
    try:
        is_there = file.exists()
        size = file.stat().st_size if is_there else 0
        if not file.name.lower().endswith(".jsonl") or (size and not _holds_conversations(file)):
            raise UserError(
                _(
                    "{file} is not a file of conversations, and stays as it is. Give another name, which ends in "
                    ".jsonl, or a file that /save has made.",
                    file=file,
                )
            )
        record = {"messages": [{"role": message.role, "content": message.text} for message in messages]}
        begin = "\n" if size and not file.read_bytes().endswith(b"\n") else ""
        _append(file, (begin + json.dumps(record, ensure_ascii=False) + "\n").encode(), size, is_there)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        told = getattr(error, "strerror", None) or error
        raise UserError(_("{file} can't be written: {error}.", file=file, error=told)) from error


def _holds_conversations(file: Path) -> bool:
    values = (entry.value for entry in read_entries(DataFiles((file,))))
    return all(isinstance(value, dict) and {"messages", "conversations"} & value.keys() for value in values)


def _append(file: Path, line: bytes, size: int, is_there: bool) -> None:
    with file.open("ab", buffering=0) as written:
        try:
            while line:
                line = line[written.write(line) :]
            os.fsync(written.fileno())
        except OSError:  # half a line would make the file one that can't be read
            with contextlib.suppress(OSError):
                written.truncate(size)
                if not is_there:
                    file.unlink()
            raise
