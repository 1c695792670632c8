"""Alpaca JSON -> records -> examples of input_ids and labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from ft_datasets.records import name_records, read_entries


@dataclass(frozen=True)
class Record:
    """One entry of the data file; `number` counts from 1, as a person counts."""

    number: int
    instruction: str
    input: str
    output: str


def load_records(path: str | Path) -> list[Record]:
    """Read and check an Alpaca JSON file.

    Raises:
        UserError: naming the file and the line, or the numbers of the records that are wrong.
    """
    path = Path(path)
    entries = read_entries(path)
    complaints: dict[str, list[int]] = {}
    records = []
    for number, entry in enumerate(entries, 1):
        complaint = _complaint(entry)
        if complaint:
            complaints.setdefault(complaint, []).append(number)
        else:
            records.append(Record(number, entry["instruction"], entry.get("input") or "", entry["output"]))
    if complaints:
        lines = [f"  {complaint}: {name_records(numbers)}" for complaint, numbers in complaints.items()]
        heading = _("{file}: these records can't be used (records count from 1):", file=path)
        advice = _('Each record needs "instruction" and "output" as text, and may have "input".')
        raise UserError("\n".join([heading, *lines, advice]))
    return records


def _complaint(entry: Any) -> str:
    """What keeps an entry from being a record, or ''."""
    if not isinstance(entry, dict):
        return _("not an object with named fields")
    for key in ("instruction", "output"):
        if key not in entry or entry[key] is None:
            return _('without "{key}"', key=key)
    for key in ("instruction", "input", "output"):
        if not isinstance(entry.get(key), str | None):
            return _('"{key}" is not text', key=key)
    for key in ("instruction", "output"):
        if not entry[key].strip():
            return _('"{key}" is empty', key=key)
    for key in ("instruction", "input", "output"):
        if any("\ud800" <= character <= "\udfff" for character in entry.get(key) or ""):
            return _('"{key}" holds half a character (a lone surrogate)', key=key)
    return ""


def count_duplicates(records: Sequence[Record]) -> int:
    """How many records repeat the question and answer of an earlier one."""
    seen = Counter((record.instruction, record.input, record.output) for record in records)
    return sum(seen.values()) - len(seen)
