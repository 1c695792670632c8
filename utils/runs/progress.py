"""How far a run is, for people: a bar on a terminal, plain lines in a log."""

import contextlib
import sys
import time

from configs.messages import _

LINE_EVERY_SECONDS = 10.0


class Progress:
    """How far the run is: a bar on a terminal, a plain line now and then in a log file.

    Args:
        total: optimizer steps of the whole run.
        done: steps that were done before this start.
    """

    def __init__(self, total: int, done: int, is_main: bool) -> None:
        self.total, self.first, self.is_main = total, done, is_main
        self.start = time.monotonic()
        self.last_line = 0.0
        self.bar = None
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step", smoothing=0.1)

    def update(self, done: int, loss: float, tokens_per_second: float, memory_gb: float) -> None:
        """Report that `done` steps of the run are done."""
        if self.bar is not None:
            memory = f", {memory_gb:.1f} GB" if memory_gb else ""
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:.0f} tok/s{memory}", refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.is_main:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_SECONDS or done == self.total:
                self.last_line = now
                left = (now - self.start) / max(1, done - self.first) * (self.total - done)
                self.say(
                    _(
                        "step {done}/{total}  loss {loss}  {speed} tokens/s  {memory}{left} left",
                        done=done,
                        total=self.total,
                        loss=f"{loss:.4f}",
                        speed=f"{tokens_per_second:.0f}",
                        memory=f"{memory_gb:.1f} GB  " if memory_gb else "",
                        left=duration(left),
                    )
                )

    def say(self, message: str) -> None:
        """Print a message without tearing the bar."""
        if not self.is_main:
            return
        with contextlib.suppress(BrokenPipeError):  # whoever listened is gone; the run goes on
            if self.bar is not None:
                self.bar.write(message, file=sys.stdout)
            else:
                print(message, flush=True)

    def close(self) -> None:
        """Finish the bar's line."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """A time span as a person writes it: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
