"""A data file -> its entries; what is wrong with it is said by line or by the number of the entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _

NAMED_AT_MOST = 10
"""How many records one message names."""


def read_entries(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            _("{file} is not there. Give the data file with --alpaca_dataset.data_path.", file=path)
        ) from None
    except OSError as error:
        raise UserError(_("{file} can't be read: {error}.", file=path, error=error.strerror)) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            _(
                "{file}, line {line}: not UTF-8 text. Save the file as UTF-8 (for a GBK file: "
                "iconv -f GB18030 -t UTF-8 old.json > new.json).",
                file=path,
                line=line,
            )
        ) from error
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        is_json_lines = error.msg == "Extra data" and text.lstrip().startswith("{")
        hint = _(" It looks like JSON lines; one JSON list is needed.") if is_json_lines else ""
        raise UserError(
            _(
                "{file}, line {line}, column {column}: not valid JSON ({error}).",
                file=path,
                line=error.lineno,
                column=error.colno,
                error=error.msg,
            )
            + hint
        ) from error
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise UserError(
            _("{file}: the JSON is nested too deep, or holds too long a number, to be a list of records.", file=path)
        ) from None
    if not isinstance(entries, list):
        raise UserError(_("{file}: a JSON list of records is expected, and this is not a list.", file=path))
    if not entries:
        raise UserError(_("{file}: the list is empty, so there is nothing to learn from.", file=path))
    return entries


def name_records(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:NAMED_AT_MOST]))
    more = len(numbers) - NAMED_AT_MOST
    return named + (_(" and {count} more", count=more) if more > 0 else "")
