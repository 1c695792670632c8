"""A file on its way: a .part file filled in any order, and a journal of what safely lies on the disk.

A journal line `start end crc32` is written only after the bytes it speaks of were flushed, so after a kill or a power
cut the journal never promises too much. The CRCs prove nothing; they tell which range of a file with a wrong hash is
the damaged one. Both files are named by the content's hash: a new revision of a file starts a new part.
"""

import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path

from utils.download.listing import RemoteFile
from utils.download.proof import BLOCK, new_hash
from utils.files import replace_durably, write_durably

JOURNAL_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]{8})\n")

Range = tuple[int, int]

flush_to_disk = getattr(os, "fdatasync", os.fsync)


class PartFile:
    """The bytes of one file that are here so far. Several threads may write to it."""

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        self.file = file
        self.path = part_path(folder, file)
        self.journal_path = self.path.with_suffix(".journal")
        self.recorded: dict[int, tuple[int, int]] = {}
        """start -> (end, CRC-32) of the ranges that safely lie on the disk; they don't overlap."""
        self._write_lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._hash_lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._open_data()
        self._restart_hash()
        self.recorded = read_journal(self.path)
        self._rewrite_journal()  # drops a line that a kill cut short

    def missing(self) -> list[Range]:
        """The ranges that are not recorded."""
        return missing_ranges(self.recorded, self.file.size)

    def write(self, start: int, data: bytes) -> None:
        """Write bytes at their place; they count only once they are recorded."""
        with self._write_lock:
            self._data.seek(start)
            self._data.write(data)

    def record(self, start: int, end: int, crc: int) -> None:
        """Flush the file, then note down that the range is here."""
        with self._write_lock:
            self._data.flush()
        flush_to_disk(self._data.fileno())
        with self._journal_lock:
            self.recorded[start] = (end, crc)
            self._journal.write(_journal_line(start, end, crc))
            self._journal.flush()
            flush_to_disk(self._journal.fileno())

    def adopt(self) -> None:
        """Record what another program has put into the file, or into a new one of that name."""
        self._data.close()
        self._reader.close()
        self._open_data()
        for start in range(0, self.file.size, BLOCK):
            data = self._read(start, min(start + BLOCK, self.file.size))
            if data:
                self.record(start, start + len(data), zlib.crc32(data))

    def forget(self, ranges: Iterable[Range]) -> None:
        """Strike ranges from the record: they are to be fetched again."""
        with self._journal_lock:
            for start, _end in ranges:
                del self.recorded[start]
            self._journal.close()
            self._rewrite_journal()

    def damaged(self) -> list[Range]:
        """Recorded ranges whose bytes on the disk are no longer those that were recorded."""
        ranges = []
        for start, (end, crc) in sorted(self.recorded.items()):
            found = 0
            for position in range(start, end, BLOCK):
                found = zlib.crc32(self._read(position, min(position + BLOCK, end)), found)
            if found != crc:
                ranges.append((start, end))
        return ranges

    def hash_ahead(self) -> None:
        """Hash what is recorded without a gap from where the hash has got to, if no other thread is doing so."""
        if self._hash_lock.acquire(blocking=False):
            try:
                self._hash_recorded()
            finally:
                self._hash_lock.release()

    def is_proved(self) -> bool:
        """Whether the whole file, read back from the disk, has the right hash. Call it when nothing is missing."""
        with self._hash_lock:
            self._hash_recorded()
            right = self._hash.hexdigest() == self.file.digest
            self._restart_hash()
        return right

    def move_to(self, destination: Path) -> None:
        """Give the proved file its final name."""
        self.close()
        destination.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(self.path, destination)
        self.journal_path.unlink()

    def close(self) -> None:
        """Let go of the files."""
        self._data.close()
        self._reader.close()
        self._journal.close()

    def _open_data(self) -> None:
        self.path.touch()
        self._data = self.path.open("r+b")
        self._reader = self.path.open("rb", buffering=0)

    def _rewrite_journal(self) -> None:
        lines = [_journal_line(start, end, crc) for start, (end, crc) in sorted(self.recorded.items())]
        write_durably(self.journal_path, "".join(lines))
        self._journal = self.journal_path.open("a", encoding="ascii", newline="\n")

    def _hash_recorded(self) -> None:
        while entry := self.recorded.get(self._hash_range):
            end, _crc = entry
            for position in range(self._hash_range, end, BLOCK):
                self._hash.update(self._read(position, min(position + BLOCK, end)))
            self._hash_range = end

    def _restart_hash(self) -> None:
        self._hash = new_hash(self.file.algorithm, self.file.size)
        self._hash_range = 0  # where the first range that is not yet hashed starts

    def _read(self, start: int, end: int) -> bytes:
        self._reader.seek(start)
        return self._reader.read(end - start)


def part_path(folder: Path, file: RemoteFile) -> Path:
    """Where a file's bytes are gathered. The path's hash keeps two files of equal content apart."""
    place = hashlib.sha256(file.path.encode()).hexdigest()[:8]
    return folder / f"{file.digest}-{place}.part"


def read_journal(part: Path) -> dict[int, tuple[int, int]]:
    """The recorded ranges of a part file: start -> (end, CRC-32). Lines that can't be are left out."""
    try:
        size = part.stat().st_size
        text = part.with_suffix(".journal").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return {}
    lines = (JOURNAL_LINE.fullmatch(line) for line in text.splitlines(keepends=True))
    last_word = {int(line[1]): (int(line[2]), int(line[3], 16)) for line in lines if line}
    recorded: dict[int, tuple[int, int]] = {}
    position = 0
    for start, (end, crc) in sorted(last_word.items()):
        if position <= start < end <= size:
            recorded[start] = (end, crc)
            position = end
    return recorded


def bytes_missing(folder: Path, file: RemoteFile) -> int:
    """How much of a file is still to be fetched, given the part file that an earlier run may have left."""
    recorded = read_journal(part_path(folder, file))
    return sum(end - start for start, end in missing_ranges(recorded, file.size))


def missing_ranges(recorded: dict[int, tuple[int, int]], size: int) -> list[Range]:
    """The gaps that the recorded ranges leave in a file of `size` bytes."""
    gaps = []
    position = 0
    for start, (end, _crc) in sorted(recorded.items()):
        if position < start:
            gaps.append((position, start))
        position = end
    if position < size:
        gaps.append((position, size))
    return gaps


def _journal_line(start: int, end: int, crc: int) -> str:
    return f"{start} {end} {crc:08x}\n"
