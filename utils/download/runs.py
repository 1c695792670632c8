"""The work that workers share: a file's ranges that wait to be fetched, and the rate they keep together."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from utils.download.listing import RemoteFile
from utils.download.part import PartFile

MOST_IGNORED_RANGES = 3
"""So often a server may answer a range with the whole file before it is taken to know no ranges."""


@dataclass
class Run:
    """A range that one worker fetches. A suspect one is here already, but the file's hash is wrong."""

    start: int
    end: int
    is_suspect: bool = False
    disagreements: int = 0
    """How often in a row a suspect range came with other bytes than the time before."""
    position: int = field(init=False)
    """Where the next byte goes."""
    recorded: int = field(init=False)
    """Up to here the journal knows."""
    recorded_at: float = field(default_factory=time.monotonic, init=False)
    crc: int = field(default=0, init=False)
    """CRC-32 of the bytes from `recorded` to `position`."""

    def __post_init__(self) -> None:
        self.position = self.recorded = self.start


class FileTransfer:
    """One file on its way: which ranges wait, and how many are being fetched."""

    def __init__(self, file: RemoteFile, destination: Path) -> None:
        self.file, self.destination = file, destination
        self.part: PartFile | None = None
        self.waiting: list[Run] = []
        self.running = 0
        self.ignored_ranges = 0
        self.mismatches = 0
        self.disk_faults = 0

    @property
    def knows_no_ranges(self) -> bool:
        """Whether the server sends the whole file, whatever range is asked for."""
        return self.ignored_ranges >= MOST_IGNORED_RANGES

    def take(self) -> Run | None:
        """The next range for a worker. Without ranges one worker takes all that follows."""
        if not self.waiting or (self.knows_no_ranges and self.running):
            return None
        run = self.waiting.pop(0)
        while self.knows_no_ranges and self.waiting and self.waiting[0].start == run.end and not run.is_suspect:
            run.end = self.waiting.pop(0).end
        self.running += 1
        return run

    def put_back(self, run: Run) -> None:
        """What is left of a range waits again."""
        rest = Run(run.start if run.is_suspect else run.position, run.end, run.is_suspect, run.disagreements)
        self.waiting = sorted([*self.waiting, rest], key=lambda waiting: waiting.start)


class Throttle:
    """Holds all connections together to a number of bytes a second."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def spend(self, count: int) -> None:
        """Wait until `count` more bytes are due."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.bytes_per_second
            wait = self._free_at - now
        time.sleep(wait)
