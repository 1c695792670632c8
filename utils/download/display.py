"""What people and programs see of a download: bars in a terminal, a line now and then in a log, or JSON lines."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from configs.messages import _

LOG_SECONDS = 10.0
JSON_SECONDS = 1.0
RATE_WINDOW = 15.0
"""Seconds over which the rate is averaged."""
MOST_BARS = 6


def _print_at_once(line: str) -> None:
    print(line, flush=True)


class Display:
    """Counts bytes for one stage at a time, and says a line now and then; subclasses show more.

    `advance` may be called from any thread.

    Args:
        say: where the lines go.
    """

    seconds_between_lines = LOG_SECONDS

    def __init__(self, say: Callable[[str], None] = _print_at_once) -> None:
        self.say = say
        self.stage = self.title = ""
        self.total = self.done = 0
        self.fetched = 0
        """Bytes that came over the network, in all stages, those that were fetched twice included."""
        self.files: dict[str, list[int]] = {}
        """Files under way: path -> [bytes done, size]."""
        self._lock = threading.RLock()
        self._history: deque[tuple[float, int]] = deque()
        self._next_line = 0.0

    def begin(self, stage: str, title: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` bytes, of which `done` were there before. Programs know it by `stage`."""
        with self._lock:
            self.stage, self.title, self.total, self.done = stage, title, total, done
            self.files.clear()
            self._history = deque([(time.monotonic(), done)])
            self._next_line = time.monotonic() + self.seconds_between_lines

    def start_file(self, path: str, size: int, done: int = 0) -> None:
        """Take note that a file is under way, with `done` bytes of it here."""
        with self._lock:
            self.files[path] = [done, size]

    def advance(self, path: str, count: int) -> None:
        """Count bytes of a file that came in (or, below zero, are to come in again)."""
        with self._lock:
            self.done += count
            if path in self.files:
                self.files[path][0] += count

    def received(self, count: int) -> None:
        """Count bytes that came over the network, wanted or not."""
        with self._lock:
            self.fetched += count

    def finish_file(self, path: str) -> None:
        """Take note that a file is proved."""
        with self._lock:
            self.files.pop(path, None)

    def tick(self) -> None:
        """Show the progress where it is time to; called a few times a second while a stage runs."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + self.seconds_between_lines
            with self._lock:
                self.show_progress()

    def end(self) -> None:
        """End a stage that is over, or was broken off."""

    def note(self, text: str, event: str = "note", **values: object) -> None:
        """Say something. Programs get `event` and the values too."""
        with self._lock:
            self.show_note(text, event, values)

    def failure(self, message: str, status: int) -> None:
        """End with a failure; people read its message on standard error, programs also here."""
        self.end()

    def rate(self) -> float:
        """Bytes a second over the last seconds."""
        now = time.monotonic()
        self._history.append((now, self.done))
        while len(self._history) > 2 and self._history[0][0] < now - RATE_WINDOW:
            self._history.popleft()
        began, done = self._history[0]
        return max(0.0, (self.done - done) / max(now - began, 1e-3))

    def show_progress(self) -> None:
        """Show how far the stage is, as a plain line."""
        rate = self.rate()
        left = readable_time((self.total - self.done) / rate) if rate > 0 else _("unknown")
        line = _(
            "{title}: {done} of {total} ({percent:.0f} %), {rate}/s, time left {left}",
            title=self.title,
            done=readable_size(self.done),
            total=readable_size(self.total),
            percent=100 * self.done / max(1, self.total),
            rate=readable_size(rate),
            left=left,
        )
        files = "; ".join(f"{path} {100 * done / max(1, size):.0f} %" for path, (done, size) in self.files.items())
        self.say(f"{line}; {files}" if files else line)

    def show_note(self, text: str, event: str, values: dict[str, object]) -> None:
        """Show a note, as a plain line."""
        self.say(text)


class JsonDisplay(Display):
    """One JSON object a line on standard output; `event` tells its kind.

    progress (stage check or fetch, done, total, bytes_per_second, files), retry, mismatch, source, source_refused,
    left_out, waiting, plan (of --dry_run), note; the last is done, or error with the exit status.
    """

    seconds_between_lines = JSON_SECONDS

    def show_progress(self) -> None:
        self._print(
            event="progress",
            stage=self.stage,
            done=self.done,
            total=self.total,
            bytes_per_second=round(self.rate()),
            files={path: {"done": done, "size": size} for path, (done, size) in self.files.items()},
        )

    def show_note(self, text: str, event: str, values: dict[str, object]) -> None:
        self._print(event=event, message=text, **values)

    def failure(self, message: str, status: int) -> None:
        self._print(event="error", message=message, status=status)

    def _print(self, **values: object) -> None:
        print(json.dumps(values, ensure_ascii=False), flush=True)


class TerminalDisplay(Display):
    """Bars: one for the whole, one for each file under way."""

    seconds_between_lines = 0.2

    def __init__(self) -> None:
        super().__init__()
        self._whole: tqdm | None = None
        self._bars: dict[str, tqdm] = {}

    def begin(self, stage: str, title: str, total: int, done: int = 0) -> None:
        self.end()
        super().begin(stage, title, total, done)
        self._whole = self._bar(title, total, done, position=0)

    def show_progress(self) -> None:
        if self._whole is None:
            return
        self._whole.update(self.done - self._whole.n)
        for path in [path for path in self._bars if path not in self.files]:
            self._bars.pop(path).close()
        for path, (done, size) in [*self.files.items()][:MOST_BARS]:
            if path not in self._bars:
                taken = {bar.pos for bar in self._bars.values()}
                position = next(place for place in range(1, MOST_BARS + 2) if -place not in taken)
                self._bars[path] = self._bar("  " + path, size, done, position)
            self._bars[path].update(done - self._bars[path].n)

    def show_note(self, text: str, event: str, values: dict[str, object]) -> None:
        tqdm.write(text)

    def end(self) -> None:
        with self._lock:
            if self._whole is not None:
                self.files.clear()
                self.show_progress()
                self._whole.close()
                self._whole = None

    def _bar(self, title: str, total: int, done: int, position: int) -> tqdm:
        return tqdm(
            desc=title,
            total=total,
            initial=done,
            position=position,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=position == 0,
            dynamic_ncols=True,
            mininterval=0,  # `tick` keeps the pace
            file=sys.stderr,
        )


def make_display(as_json: bool) -> Display:
    """The display for where the output goes."""
    if as_json:
        return JsonDisplay()
    return TerminalDisplay() if sys.stderr.isatty() else Display()


def readable_size(count: float) -> str:
    """A number of bytes for people: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def readable_time(seconds: float) -> str:
    """A time span for people: 3725 -> 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
