"""The polling contract: a client repeats one request, and gets the answer's text so far, until it ends in [stop].

A body with a `session_id` has a stream of its own. Without one, equal requests from one address share a stream, so that
a plain curl loop works. A stream whose end was delivered is replayed for a few seconds, in case that answer was lost;
then the same request starts anew. A stream that nobody asks for any more is cancelled.
"""

import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

STOP = "[stop]"
"""The end of a `response` after which nothing more will come."""
REPLAY_SECONDS = 8.0
"""How long an answer whose end was delivered is given again to the same request."""
ABANDONED_SECONDS = 60.0
"""After so long without a poll, a stream is cancelled."""


@dataclass
class Stream:
    """One answer in the making.

    Attributes:
        text: what was generated so far.
        error: why the generation failed; '' = it did not.
        ended: nothing more will come.
        last_asked: when a client last asked for it (monotonic seconds).
        delivered: when a client was first told of its end; None = not yet.
        cancel: set when nobody wants it any more.
    """

    session_id: str
    text: str = ""
    error: str = ""
    ended: bool = False
    last_asked: float = 0.0
    delivered: float | None = None
    cancel: threading.Event = field(default_factory=threading.Event)


Generate = Callable[[threading.Event], Iterator[str]]
"""A function that generates an answer piece by piece, until the event is set."""


class StreamSessions:
    """All streams of a server.

    Args:
        workers: how many answers are generated at the same time; others wait their turn.
        clock: seconds that never go back.
    """

    def __init__(self, workers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="generate")
        self._clock = clock
        self._streams: dict[Hashable, Stream] = {}
        self._lock = threading.Lock()

    def poll(self, address: str, session_id: str | None, request: Hashable, generate: Generate) -> Stream:
        """The stream of a request as it is now; the first poll starts it.

        Args:
            address: the client's, which tells requests without a session_id apart.
            session_id: the client's own, or one that an earlier answer gave.
            request: everything that the answer depends on.
            generate: makes the text, piece by piece, until the event is set.
        """
        with self._lock:
            self._forget_old()
            owner = ("session", session_id) if session_id else ("address", address)
            stream = self._streams.get((owner, request))
            if stream is None:
                stream = Stream(session_id or uuid.uuid4().hex)
                self._streams[owner, request] = stream
                # Whoever goes on with the id that the answer gives stays with this stream.
                self._streams[("session", stream.session_id), request] = stream
                self._executor.submit(self._run, stream, generate)
            stream.last_asked = self._clock()
            if stream.ended and stream.delivered is None:
                stream.delivered = self._clock()
            return Stream(stream.session_id, stream.text, stream.error, stream.ended)

    def close(self) -> None:
        """Cancel everything and wait for the workers."""
        with self._lock:
            for stream in self._streams.values():
                stream.cancel.set()
        self._executor.shutdown(cancel_futures=True)

    def _run(self, stream: Stream, generate: Generate) -> None:
        error = ""
        try:
            if not stream.cancel.is_set():
                for piece in generate(stream.cancel):
                    with self._lock:
                        stream.text += piece
                        if self._clock() - stream.last_asked > ABANDONED_SECONDS:
                            stream.cancel.set()
        except Exception as failure:  # whatever went wrong is told to the client, and the server lives on
            error = f"{type(failure).__name__}: {failure}"
        with self._lock:
            stream.error, stream.ended = error, True

    def _forget_old(self) -> None:
        now = self._clock()
        for key, stream in list(self._streams.items()):
            if stream.delivered is not None and now - stream.delivered > REPLAY_SECONDS:
                del self._streams[key]
            elif now - stream.last_asked > ABANDONED_SECONDS:
                stream.cancel.set()
                del self._streams[key]
