"""Which source to ask, and how long to go on asking."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from configs.download import DownloadConfig
from configs.errors import NetworkGaveUpError, UserError
from configs.messages import _
from utils.download.display import Display, readable_time
from utils.download.errors import SourceError, TransientError
from utils.download.http import read_at_once
from utils.download.listing import Listing, RemoteFile
from utils.download.options import TransferOptions
from utils.download.source import Source
from utils.download.sources import make_sources

FAILURES_BEFORE_CHANGE = 2
"""After so many failures in a row the next source is tried, if there is one."""
SECONDS_OF_SILENCE = 5.0
"""The same trouble of the same file is told once in that time, though many connections may meet it."""


class Patience:
    """How long failures are put up with. Progress anywhere renews it."""

    def __init__(
        self, give_up_after: float, display: Display, first_delay: float = 1.0, longest_delay: float = 60.0
    ) -> None:
        self.give_up_after = give_up_after or float("inf")
        self.display = display
        self.first_delay, self.longest_delay = first_delay, longest_delay
        self.stop = threading.Event()
        self._last_progress = time.monotonic()
        self._told: dict[tuple[str, str], float] = {}

    def renew(self) -> None:
        """Take note that something got through: the patience begins anew."""
        self._last_progress = time.monotonic()

    def wait(self, error: TransientError, failures: int, what: str) -> None:
        """Say what failed, and wait before the next try: longer each time, and never all workers at once.

        Raises:
            NetworkGaveUpError: nothing got through for as long as the user allows.
        """
        delay = min(self.longest_delay, self.first_delay * 2.0 ** min(failures - 1, 16)) * random.uniform(0.5, 1.0)
        delay = max(delay, error.retry_after or 0.0)
        left = self.give_up_after - (time.monotonic() - self._last_progress)
        if delay > left:
            raise NetworkGaveUpError(
                _(
                    "{what}: {reason}. Gave up after {time} without progress. What is here stays: run the same command "
                    "again to go on. Or try another --endpoint (hf-mirror, modelscope), or a longer --give_up_after.",
                    what=what,
                    reason=error,
                    time=readable_time(self.give_up_after),
                )
            ) from error
        trouble = (what, str(error))
        if time.monotonic() - self._told.get(trouble, -SECONDS_OF_SILENCE) >= SECONDS_OF_SILENCE:
            self._told[trouble] = time.monotonic()
            self._tell(error, failures, what, delay)
        self.stop.wait(delay)

    def _tell(self, error: TransientError, failures: int, what: str, delay: float) -> None:
        self.display.note(
            _(
                "{what}: {reason}; next try in {delay:.1f} s (number {count})",
                what=what,
                reason=error,
                delay=delay,
                count=failures,
            ),
            event="retry",
            file=what,
            delay=round(delay, 3),
        )


@contextmanager
def open_sources(config: DownloadConfig, display: Display, options: TransferOptions) -> Iterator["SourcePool"]:
    """The sources that the command line names."""
    read_at_once(options.read)
    patience = Patience(config.give_up_after * 60, display, options.first_delay, options.longest_delay)
    sources = make_sources(config.endpoint, config.repo_id, config.repo_type, config.token, options.timeout)
    try:
        yield SourcePool(sources, patience, display)
    finally:
        for source in sources:
            source.close()


class SourcePool:
    """The sources in the user's order; one is current, and another takes over where it has the same bytes."""

    def __init__(self, sources: list[Source], patience: Patience, display: Display) -> None:
        self.sources = sources
        self.patience = patience
        self.display = display
        self._revision = ""
        self._pinned = Listing("", {})
        self._listings: dict[Source, Listing] = {}
        self._banned: dict[tuple[Source, str], SourceError] = {}
        self._current = sources[0]
        self._failures = 0
        self._lock = threading.RLock()

    @property
    def current(self) -> Source:
        """The source that is asked first."""
        return self._current

    def pin(self, revision: str) -> Listing:
        """List the repository at the first source that answers; from now on this is the revision.

        Raises:
            UserError: no source has it, or lets us in.
            NetworkGaveUpError: none answers.
        """
        refusals: dict[Source, SourceError] = {}
        failures = 0
        while True:
            transient: TransientError | None = None
            for source in self.sources:
                if source in refusals:
                    continue
                try:
                    self._pinned = self._listings[source] = source.list_files(revision)
                    self._current, self._revision = source, revision
                    self.patience.renew()
                    return self._pinned
                except SourceError as error:
                    refusals[source] = error
                except TransientError as error:
                    transient = error
            if transient is None:
                raise UserError("\n".join(str(error) for error in refusals.values()))
            failures += 1
            self.patience.wait(transient, failures, _("list of files"))

    def choose(self, file: RemoteFile) -> tuple[Source, RemoteFile]:
        """The source to ask for a file, and the file as that source lists it.

        Raises:
            UserError: no source can give it.
        """
        with self._lock:
            for source in self._from_current():
                own = self._own(source, file)
                if own is not None:
                    return source, own
            reasons = [str(error) for (_source, path), error in self._banned.items() if path == file.path]
        raise UserError("\n".join(reasons))

    def succeeded(self) -> None:
        """Take note that a good piece came through from a source."""
        self._failures = 0

    def failed(self, source: Source, file: RemoteFile) -> None:
        """A request failed in a way that may pass. After a few in a row another source that has the file takes over."""
        with self._lock:
            if source is not self._current:
                return
            self._failures += 1
            if self._failures < FAILURES_BEFORE_CHANGE:
                return
            self._failures = 0
            for other in self._from_current()[1:]:
                if self._own(other, file) is not None:
                    self._current = other
                    self.display.note(_("Going on with {host}", host=other.name), event="source", host=other.name)
                    return

    def ban(self, source: Source, file: RemoteFile, error: SourceError) -> None:
        """Don't ask this source for this file again."""
        with self._lock:
            self._banned[source, file.path] = error

    def _from_current(self) -> list[Source]:
        place = self.sources.index(self._current)
        return self.sources[place:] + self.sources[:place]

    def _own(self, source: Source, file: RemoteFile) -> RemoteFile | None:
        """The file at a source; None where the source can't be used for it, or doesn't answer now."""
        if (source, file.path) in self._banned:
            return None
        if source not in self._listings:
            try:
                self._listings[source] = source.list_like(self._pinned, self._revision)
            except TransientError:
                return None
            except SourceError as error:
                self._listings[source] = Listing("", {})
                self.display.note(str(error), event="source_refused", host=source.name)
        own = self._listings[source].files.get(file.path)
        return own if file.same_content(own) else None
