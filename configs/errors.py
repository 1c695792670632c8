"""What a command does when it can't go on: an exception with one message for a person; a status for the shell.

Exit status: 0 done, 1 a defect of ours (with a traceback), 2 the user must change something (UserError), 3 the network
gave up, run the same command again (NetworkGaveUpError), 128 + n ended by signal n (Interrupted).
"""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from configs.messages import _


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, where, and what to do next."""

    exit_status = 2


class NetworkGaveUpError(Exception):
    """The network failed for as long as the user allowed. The text says what to do: run the same command again."""

    exit_status = 3


class Interrupted(KeyboardInterrupt):
    """The command was asked to end and has put its work away; `signum` is the signal that asked.

    As with every Ctrl-C, `except Exception` in the code that made the call does not stop it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A context that whatever a user can put right leaves as a UserError, Ctrl-C as Interrupted; for a `main`.

    Raises:
        UserError: a file may not be read or written, the disk is full, or the card's memory does not suffice.
        Interrupted: SIGINT came.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, _("Stopped.")) from None
    except PermissionError as error:
        where = error.filename or error
        raise UserError(
            _("Permission denied: {file}. Change its permissions (chmod), or give another one.", file=where)
        ) from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; it need not be imported for this
            raise UserError(out_of_memory()) from error
        if not _is_full_disk(error):
            raise
        raise UserError(
            _("The disk is full ({error}). Make room, then give the same command again.", error=error)
        ) from error


def run_main(main: Callable[[], object]) -> NoReturn:
    """Call `main` and leave with the exit status that its end deserves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with explained():
            main()
            sys.stdout.flush()
    except (UserError, NetworkGaveUpError) as error:
        _leave(str(error), error.exit_status)
    except Interrupted as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # all workers stop together, and rank 0 says so
            _end(128 + error.signum)
        _leave(str(error), 128 + error.signum)
    except BrokenPipeError:  # `generate.py --prompt … | head` closes our standard output: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    _end(0)


def root_cause(error: BaseException) -> BaseException:
    """The exception that an exception began with: the innermost of its causes."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


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
