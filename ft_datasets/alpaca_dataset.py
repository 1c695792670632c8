"""Entries in Alpaca's form -> records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from configs.text import has_half_character
from ft_datasets.records import DataFiles, Entry, name_entries, read_entries


@dataclass(frozen=True)
class Record:
    """An instruction and its answer; `number` is that of the entry in the data files, from 1, as a person counts."""

    number: int
    instruction: str
    input: str
    output: str


def load_records(source: DataFiles | str | Path) -> list[Record]:
    """Read and check data in Alpaca's form: from one file, or from several one after another.

    Raises:
        UserError: naming the file and the line, or the numbers of the records that are wrong.
    """
    files = source if isinstance(source, DataFiles) else DataFiles((Path(source),))
    complaints: dict[str, list[Entry]] = {}
    records = []
    for entry in read_entries(files):
        complaint, value = _complaint(entry.value), entry.value
        if complaint:
            complaints.setdefault(complaint, []).append(entry._replace(value=None))
        else:
            records.append(Record(entry.number, value["instruction"], value.get("input") or "", value["output"]))
    if complaints:
        lines = [f"  {complaint}: {name_entries(entries, files)}" for complaint, entries in complaints.items()]
        heading = _("{file}: these records can't be used (records count from 1):", file=files)
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
        if has_half_character(entry.get(key) or ""):
            return _('"{key}" holds half a character (a lone surrogate)', key=key)
    return ""
