"""Data files -> entries; what is wrong with them is said by file and line, or by the number of the record."""

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from configs.errors import UserError
from configs.messages import _
from ft_datasets.tables import not_utf8, read_table

KINDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet", ".arrow")
"""Endings of the files that are read."""
NAMED_AT_MOST = 10
"""How many records one message names."""
LONGEST_LINE = 64 * 2**20
"""Bytes of one JSON line at most: a compressed file of a few kilobytes may hold a line that no memory has room for."""
LARGEST_UNPACKED = 4 * 2**30
"""Bytes of a compressed JSON list at most, which is read whole."""


@dataclass(frozen=True)
class DataFiles:
    """The files that a run's records are read from, one after another.

    Attributes:
        paths: where they lie.
        origin: of data from a hub its repository, configuration, split and commit, as training_config.json names them;
            nothing for files of one's own.
        sources: what several are put together from, each a data_path of its own; () = it is one itself.
    """

    paths: tuple[Path, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    sources: tuple["DataFiles", ...] = ()

    @classmethod
    def here(cls, paths: Iterable[str]) -> "DataFiles":
        """Files that lie here, each a source of its own."""
        return cls.joined([cls((Path(path),)) for path in paths])

    @classmethod
    def joined(cls, sources: Sequence["DataFiles"]) -> "DataFiles":
        """The files of several sources, in their order."""
        if len(sources) == 1:
            return sources[0]
        origins = [source.origin for source in sources]
        paths = tuple(path for source in sources for path in source.paths)
        return cls(paths, {"sources": origins} if any(origins) else {}, tuple(sources))

    def __str__(self) -> str:
        first, more = self.paths[0], len(self.paths) - 1
        return str(first) + (_(" and {count} more", count=more) if more else "")


class Entry(NamedTuple):
    """One entry of the data files, before it is checked.

    Attributes:
        number: the record's, counted from 1 through all files, as a person counts.
        line: where it stands, in files that are read by lines; else 0.
        value: what the file holds there.
        source: which of several sources of the data it is from, from 0.
    """

    number: int
    file: Path
    line: int
    value: Any
    source: int = 0


def read_entries(files: DataFiles) -> Iterator[Entry]:
    """The entries of all files in order; those of JSON lines and of tables pass through memory a few at a time.

    Raises:
        UserError: a file is not there, is of a kind that is not read, or is damaged; or there is no entry in any.
    """
    number = 0
    for source, part in enumerate(files.sources or (files,)):
        for path in part.paths:
            for line, value in _read(path, is_renamable=not part.origin):
                number += 1
                yield Entry(number, path, line, value, source)
    if not number:
        raise UserError(_("{file}: there are no records in it, so there is nothing to learn from.", file=files))


def kind_of(name: str) -> str | None:
    """The ending of a file's name, of those that are read; None where it has another."""
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if name.lower().endswith(kind)), None)


def name_records(numbers: Sequence[object]) -> str:
    """The first of some records' numbers or places, and how many more there are."""
    named = ", ".join(map(str, numbers[:NAMED_AT_MOST]))
    more = len(numbers) - NAMED_AT_MOST
    return named + (_(" and {count} more", count=more) if more > 0 else "")


def name_entries(entries: Sequence[Entry], files: DataFiles) -> str:
    """Some entries by number; with the file where there are several, and with the line where that is another number."""

    def place(entry: Entry) -> str:
        parts = [entry.file.name] if len(files.paths) > 1 else []
        if entry.line not in (0, entry.number):
            parts.append(_("line {line}", line=entry.line))
        return f"{entry.number} ({', '.join(parts)})" if parts else str(entry.number)

    return name_records([place(entry) for entry in entries])


def _read(path: Path, is_renamable: bool) -> Iterator[tuple[int, Any]]:
    """A file's entries, each with its line, or 0."""
    with _refusals(path):
        path.stat()  # what is not there is told before what its name means
        kind = kind_of(path.name) or (".json" if not path.suffix or _begins_with(path.open("rb"), b"[", b"{") else None)
        if kind is None:
            raise UserError(
                _(
                    "{file}: data is read from files whose names end in {kinds}. Convert it, or rename it if it is one "
                    "of these.",
                    file=path,
                    kinds=", ".join(KINDS),
                )
            )
        is_json = kind.startswith(".json")
        # Hubs have JSON lines under names that end in .json.
        if kind.startswith(".jsonl") or (is_json and not is_renamable and _begins_with(_open(path), b"{")):
            yield from _read_lines(path)
        elif is_json:
            for value in _read_list(path):
                yield 0, value
        else:
            for value in read_table(path, kind.removeprefix(".")):
                yield 0, value


def _begins_with(file: IO[bytes], *marks: bytes) -> bool:
    """Whether a file's text begins with one of these marks, after blanks; the file is closed."""
    with file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(marks)


def _read_list(path: Path) -> list[Any]:
    with _open(path) as file:
        raw = file.read(LARGEST_UNPACKED + 1 if path.suffix.lower() == ".gz" else -1)
    if len(raw) > LARGEST_UNPACKED and path.suffix.lower() == ".gz":
        raise UserError(
            _(
                "{file} holds more than {size} GB of text, and a JSON list is read whole. Make it JSON lines "
                "(.jsonl.gz), which are read one by one.",
                file=path,
                size=LARGEST_UNPACKED // 2**30,
            )
        )
    entries = _parse(raw, path)
    if not isinstance(entries, list):
        raise UserError(_("{file}: a JSON list of records is expected, and this is not a list.", file=path))
    if not entries:
        raise UserError(_("{file}: the list is empty, so there is nothing to learn from.", file=path))
    return entries


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        for line, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(raw) > LONGEST_LINE:
                raise UserError(
                    _(
                        "{file}, line {line}: longer than {size} MB. JSON lines hold one record each.",
                        file=path,
                        line=line,
                        size=LONGEST_LINE // 2**20,
                    )
                )
            if text := raw.removeprefix(BOM_UTF8).rstrip():
                yield line, _parse(text, path, line)


def _parse(raw: bytes, path: Path, line: int = 0) -> Any:
    """What JSON stands for; `line` is given where the text is a single line of the file."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line or raw.count(b"\n", 0, error.start) + 1) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if not line and error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = _(" It looks like JSON lines, a record each: name it .jsonl, or make it one JSON list.")
        elif line and text.lstrip().startswith("["):
            hint = _(" It looks like a JSON list: name it .json.")
        raise UserError(
            _(
                "{file}, line {line}, column {column}: not valid JSON ({error}).",
                file=path,
                line=line or error.lineno,
                column=error.colno,
                error=error.msg,
            )
            + hint
        ) from error
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        where = _("{file}, line {line}", file=path, line=line) if line else path
        raise UserError(
            _("{where}: the JSON is nested too deep, or holds too long a number, to be of records.", where=where)
        ) from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Say what the system, or gzip, has against a file.

    Raises:
        UserError: in the place of their errors.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            _(
                "{file} is not there. Give the data file with --alpaca_dataset.data_path (--chat_dataset.data_path).",
                file=path,
            )
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            _("{file} is not a whole gzip file ({error}). Copy it, or pack it, anew.", file=path, error=error)
        ) from error
    except OSError as error:
        raise UserError(_("{file} can't be read: {error}.", file=path, error=error.strerror or error)) from error
