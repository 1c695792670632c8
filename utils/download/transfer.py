"""Fetching files in ranges over several connections, and proving each before it takes its name."""

import contextlib
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from configs.errors import UserError
from configs.messages import _
from utils.download.display import Display, readable_size
from utils.download.errors import SourceError, TransientError
from utils.download.failover import SourcePool
from utils.download.http import open_range, origin, whole_answer
from utils.download.listing import Listing, RemoteFile
from utils.download.manifest import STATE_FOLDER, Manifest
from utils.download.options import TransferOptions
from utils.download.part import PartFile, Range, bytes_missing
from utils.download.runs import FileTransfer, Run, Throttle
from utils.download.source import Source
from utils.download.xet import fetch_by_xet
from utils.files import safetensors_problem

MOST_DISAGREEMENTS = 12
"""So often in a row a piece may come differently before the source is called bad."""
MOST_DISK_FAULTS = 3
"""So often a file may be read back other than it was written before the disk is called bad."""
MANIFEST_SECONDS = 2.0
"""Least time between two writes of the manifest while files are fetched."""


class Downloader:
    """Workers that fetch what is missing of a list of files."""

    def __init__(
        self, pool: SourcePool, manifest: Manifest, folder: Path, options: TransferOptions, display: Display
    ) -> None:
        self.pool, self.manifest, self.folder = pool, manifest, folder
        self.options, self.display = options, display
        self.patience = pool.patience
        self.throttle = Throttle(options.bytes_per_second)
        self.unfinished: list[FileTransfer] = []
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._manifest_written = 0.0

    def run(self, missing: Listing) -> None:
        """Fetch and prove the files.

        Raises:
            UserError: a file can't be had from any source, or not be written.
            NetworkGaveUpError: the network failed for longer than allowed.
        """
        largest_first = sorted(missing.files.values(), key=lambda file: -file.size)
        left = sum(bytes_missing(self.folder / STATE_FOLDER, file) for file in largest_first)
        self.display.begin("fetch", _("Fetching"), missing.size, missing.size - left)
        self.unfinished = [FileTransfer(file, self.folder / file.path) for file in largest_first]
        workers = [threading.Thread(target=self._work, daemon=True) for _number in range(self.options.workers)]
        self.patience.stop.clear()  # set at the end of what the same sources fetched before
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive() and not self.patience.stop.is_set():
                    worker.join(0.1)
                    self.display.tick()
        finally:
            self.patience.stop.set()
            deadline = time.monotonic() + 2.0  # time to record what was received; the rest is fetched again
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            for transfer in self.unfinished:
                if transfer.part is not None:
                    with contextlib.suppress(OSError):  # on a full disk; what ended the download is told already
                        transfer.part.close()
            self.manifest.write(self.folder)
            self.display.end()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                transfer, run = task
                if run is None:
                    self._open(transfer)
                else:
                    self._fetch(transfer, run)
                self._after(transfer, run)
        except BaseException as error:  # carried to the main thread, which raises it
            self._failure = self._failure or error
            self.patience.stop.set()
        with self._changed:
            self._changed.notify_all()

    def _next_task(self) -> tuple[FileTransfer, Run | None] | None:
        """A range of a file that is under way, or a file to begin with; None when there is nothing left to do."""
        with self._changed:
            while not self.patience.stop.is_set():
                for transfer in self.unfinished:
                    if transfer.part is not None and (run := transfer.take()) is not None:
                        return transfer, run
                    if transfer.part is None and not transfer.running:
                        transfer.running = 1
                        return transfer, None
                if not self.unfinished:
                    return None
                self._changed.wait(1.0)
        return None

    def _open(self, transfer: FileTransfer) -> None:
        """Begin with a file: find out what of it is here, and share out the rest."""
        file = transfer.file
        part = PartFile(self.folder / STATE_FOLDER, file)
        missing = part.missing()
        here = file.size - sum(end - start for start, end in missing)
        self.display.start_file(file.path, file.size, here)
        if self.options.use_xet and here == 0 and file.size > 0:
            source, own = self.pool.choose(file)
            if fetch_by_xet(source, own, part, self.display):
                missing = part.missing()
        with self._changed:
            transfer.waiting = self._share_out(missing)
            transfer.part = part
            self._changed.notify_all()

    def _share_out(self, ranges: list[Range]) -> list[Run]:
        total = sum(end - start for start, end in ranges)
        longest = min(self.options.longest_run, max(self.options.piece, -(-total // self.options.workers)))
        return [
            Run(position, min(position + longest, end))
            for start, end in ranges
            for position in range(start, end, longest)
        ]

    def _fetch(self, transfer: FileTransfer, run: Run) -> None:
        """Get a range from whichever source can give it, for as long as patience lasts."""
        file = transfer.file
        failures = 0
        while run.position < run.end and not self.patience.stop.is_set():
            if transfer.knows_no_ranges and transfer.running > 1:
                return  # another worker takes this range along
            source, own = self.pool.choose(file)
            before = run.position
            try:
                self._stream(source, own, transfer, run)
            except TransientError as error:
                if run.position == run.end:
                    return  # only the end of the answer was missing
                failures = 1 if run.position > before else failures + 1
                self.pool.failed(source, file)
                self.patience.wait(error, failures, file.path)
            except SourceError as error:
                self.pool.ban(source, file, error)

    def _stream(self, source: Source, own: RemoteFile, transfer: FileTransfer, run: Run) -> None:
        """Receive bytes of a range from one source until its end, or until something fails."""
        url = source.url(own)
        request = open_range(source.client, url, source.headers, run.position, run.end, own.size, self.options.timeout)
        with source.refusals(), request as (answers, body):
            for answer in answers:
                if origin(str(answer.url)) == origin(url):
                    source.check_answer(own, answer.headers)
            skip = run.position if whole_answer(answers[-1]) else 0
            if skip and not transfer.knows_no_ranges:
                transfer.ignored_ranges += 1
                raise TransientError(_("{host} sent the file from its beginning", host=source.name))
            try:
                for data in self._not_too_slow(body, source.name):
                    self.display.received(len(data))
                    if self.patience.stop.is_set() or run.position == run.end:
                        return
                    wanted = data[skip : skip + run.end - run.position]
                    skip -= min(skip, len(data))
                    self._keep(transfer, run, wanted)
            finally:
                self._record(transfer, run)
        if run.position < run.end:
            raise TransientError(_("{host} ended its answer too early", host=source.name))

    def _keep(self, transfer: FileTransfer, run: Run, data: bytes) -> None:
        transfer.part.write(run.position, data)
        run.crc = zlib.crc32(data, run.crc)
        run.position += len(data)
        self.patience.renew()
        self.display.advance(transfer.file.path, len(data))
        self.throttle.spend(len(data))
        is_good_piece = run.position == run.end or run.position - run.recorded >= self.options.piece
        if is_good_piece:
            self.pool.succeeded()
        if is_good_piece or time.monotonic() - run.recorded_at > self.options.flush_seconds:
            self._record(transfer, run)

    def _record(self, transfer: FileTransfer, run: Run) -> None:
        """Note down what was received since the last time. A suspect range is judged as a whole, in `_settle`."""
        if run.position > run.recorded and not run.is_suspect:
            transfer.part.record(run.recorded, run.position, run.crc)
            run.recorded, run.recorded_at, run.crc = run.position, time.monotonic(), 0

    def _not_too_slow(self, body: Iterator[bytes], host: str) -> Iterator[bytes]:
        """The body, until it comes more slowly than the slowest rate for as long as the timeout."""
        waited = received = 0.0
        while True:
            began = time.monotonic()
            data = next(body, None)
            waited += time.monotonic() - began  # only the network's time: the throttle and the disk don't count
            if data is None:
                return
            received += len(data)
            if waited > self.options.timeout:
                if received < self.options.slowest * waited:
                    raise TransientError(
                        _("{host} sends almost nothing ({rate}/s)", host=host, rate=readable_size(received / waited))
                    )
                waited = received = 0.0
            yield data

    def _after(self, transfer: FileTransfer, run: Run | None) -> None:
        """A range, or the opening of a file, is done with: put the rest back; after the last range prove the file."""
        if run is not None and not run.is_suspect:
            transfer.part.hash_ahead()
        elif run is not None and run.position == run.end:
            self._settle(transfer, run)
        with self._changed:
            transfer.running -= 1
            if run is not None and run.position < run.end:
                transfer.put_back(run)
            is_last = not transfer.waiting and not transfer.running
        if is_last:
            self._prove(transfer)
        with self._changed:
            self._changed.notify_all()

    def _settle(self, transfer: FileTransfer, run: Run) -> None:
        """A suspect range came again: it stands once two fetches in a row brought the same bytes."""
        file = transfer.file
        _end, crc = transfer.part.recorded[run.start]
        if run.crc == crc:
            return
        transfer.part.record(run.start, run.end, run.crc)
        run.disagreements += 1
        if run.disagreements > MOST_DISAGREEMENTS:
            run.disagreements = 0
            source, _own = self.pool.choose(file)
            self.pool.ban(source, file, SourceError(self._fickle_source(source, file)))
        self.display.advance(file.path, run.start - run.end)
        with self._changed:
            transfer.put_back(run)

    def _prove(self, transfer: FileTransfer) -> None:
        """All of a file is here: give it its name if the hash is right, or find out what to fetch again."""
        file, part = transfer.file, transfer.part
        if not part.is_proved():
            self._find_wrong_bytes(transfer)
            return
        if file.path.endswith(".safetensors") and (problem := safetensors_problem(part.path)):
            raise UserError(
                _(
                    "{file} came as its hash says, but it is a damaged safetensors file: {problem}. The repository "
                    "itself is broken; choose another one or another --revision.",
                    file=file.path,
                    problem=problem,
                )
            )
        part.move_to(transfer.destination)
        self.display.finish_file(file.path)
        with self._changed:
            self.unfinished.remove(transfer)
            self.manifest.files[file.path].proved = True
            if time.monotonic() - self._manifest_written > MANIFEST_SECONDS:
                self._manifest_written = time.monotonic()
                self.manifest.write(self.folder)

    def _find_wrong_bytes(self, transfer: FileTransfer) -> None:
        """Tell a fault of the disk from one of the network or the source, and queue what is to be fetched again.

        Raises:
            UserError: the disk is at fault again and again.
        """
        file, part = transfer.file, transfer.part
        damaged = part.damaged()
        everything = [(start, end) for start, (end, _crc) in sorted(part.recorded.items())]
        if damaged:
            transfer.disk_faults += 1
            if transfer.disk_faults > MOST_DISK_FAULTS:
                raise UserError(
                    _("The disk gives back other bytes of {file} than were written. Check it.", file=part.path)
                )
            part.forget(damaged)
            runs = self._share_out(damaged)
        elif transfer.mismatches == 0:
            # Every range is what was received, so the network or the source is wrong: which range was it?
            transfer.mismatches += 1
            damaged = everything
            runs = [Run(start, end, is_suspect=True) for start, end in everything]
        else:
            # Two fetches agree on every range, and still the hash is wrong.
            source, _own = self.pool.choose(file)
            self.pool.ban(source, file, SourceError(self._bad_source(source, file)))
            transfer.mismatches = 0
            damaged = everything
            part.forget(everything)
            runs = self._share_out([(0, file.size)])
        self.display.note(
            _("{file} has a wrong byte: fetching {size} again", file=file.path, size=readable_size(_total(damaged))),
            event="mismatch",
            file=file.path,
        )
        self.display.advance(file.path, -_total(damaged))
        with self._changed:
            transfer.waiting = runs

    def _fickle_source(self, source: Source, file: RemoteFile) -> str:
        return _(
            "{host} sends other bytes of {file} each time that they are fetched. Something on the way changes them: "
            "try another network, another --endpoint (hf-mirror, modelscope), or without the proxy.",
            host=source.name,
            file=file.path,
        )

    def _bad_source(self, source: Source, file: RemoteFile) -> str:
        return _(
            "{host} sends wrong bytes for {file}: fetched twice, they are the same but do not have the hash that the "
            "list of files promises ({algorithm} {digest}). They were thrown away. Try another --endpoint (hf-mirror, "
            "modelscope); if you are behind a proxy, try without.",
            host=source.name,
            file=file.path,
            algorithm=file.algorithm,
            digest=file.digest,
        )


def _total(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)
