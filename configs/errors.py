"""What a program does when it can't go on: one message for a person, a status for the shell.

Exit status: 0 done, 1 a defect of ours (with a traceback), 2 the user must change something, 128 + n ended by
signal n; 3 (model_download.py) the network gave up, run the same command again.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from configs.messages import _


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, where, and what to do next."""


class Interrupted(Exception):
    """The run was asked to end and has put its work away; `signum` is the signal that asked."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Call `main` with the command line's arguments and leave with the exit status that its end deserves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _leave(str(error), 2)
    except Interrupted as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # all workers stop together, and rank 0 says so
            _end(128 + error.signum)
        _leave(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        _leave(_("Stopped."), 128 + signal.SIGINT)
    except BrokenPipeError:  # `generate.py --prompt … | head` closes our standard output: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except PermissionError as error:
        where = error.filename or error
        _leave(_("Permission denied: {file}. Change its permissions (chmod), or give another one.", file=where), 2)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; it need not be imported for this
            _leave(out_of_memory(), 2)
        if not _is_full_disk(error):
            raise
        _leave(_("The disk is full ({error}). Make room, then give the same command again.", error=error), 2)
    _end(0)


def out_of_memory() -> str:
    """What to tell when a card's memory does not suffice."""
    return _(
        "The card's memory does not suffice. Try --quantization 4bit, a smaller --max_seq_length, or end other "
        "programs on the card."
    )


def _is_full_disk(error: Exception) -> bool:
    # safetensors has an exception of its own, which carries the system's number in its text alone.
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(f"os error {number})" in str(error) for number in numbers)


def _leave(message: str, status: int) -> NoReturn:
    # Every worker of a torchrun usually meets the same error. Rank 0 speaks for all; torchrun then ends the others.
    # Another rank speaks only if it is still alive after a while, because then the error was its own.
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(5)
        message = _("[process {rank}] {message}", rank=rank, message=message)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from an impatient second Ctrl-C too, no traceback
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    _end(status)


def _end(status: int) -> NoReturn:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A worker leaves without taking torch apart: once in some hundred runs, a thread of its process groups that
        # still lived has aborted it there, after all was done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
