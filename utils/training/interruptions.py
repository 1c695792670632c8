"""SIGINT and SIGTERM during training: noted, and met between two steps."""

import signal
import threading
import time
from types import TracebackType

from utils.machine.world import World, sum_across


class Interruptions:
    """A context in which SIGINT and SIGTERM ask for an end after the current step; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signum, self.at = 0, 0.0

    def __enter__(self) -> "Interruptions":
        # Python lets no other thread meet signals; some notebooks call from one.
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {signum: signal.signal(signum, self._note) for signum in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: object) -> None:
        # `pkill -TERM -f` reaches torchrun and the worker, and torchrun passes it on, so that the worker gets it twice.
        # Only a second Ctrl-C, a while after the first, is meant to end at once.
        if signum == self.signum == signal.SIGINT and time.monotonic() - self.at > 1:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if not self.signum:
            self.signum, self.at = signum, time.monotonic()

    def heard_by_any(self, world: World, is_due: bool) -> tuple[int, bool]:
        """The signal that any process has had (0 = none), and whether `is_due` is true for any: the same on all."""
        mine = [self.signum == signal.SIGINT, self.signum == signal.SIGTERM, is_due]
        by_int, by_term, due = sum_across([float(flag) for flag in mine], world.device)
        return signal.SIGTERM if by_term else signal.SIGINT if by_int else 0, bool(due)
