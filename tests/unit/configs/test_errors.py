"""What a command's end says, and the exit status that a shell gets: one message, no traceback."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from configs import errors
from configs.errors import Interrupted, NetworkGaveUpError, UserError, explained, run_main

pytestmark = pytest.mark.usefixtures("english")


class OutOfMemoryError(RuntimeError):
    """Torch's has this name, and nothing else by which it is known."""


@pytest.fixture(autouse=True)
def as_a_command(monkeypatch):
    """One process, which does not wait; Ctrl-C is the tests' own again afterwards."""
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors.time, "sleep", lambda _seconds: None)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def end_of(error: BaseException | None, capsys) -> tuple[int, str]:
    """Exit status and standard error of a command that ends with an exception, or of one that does not."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as left:
        run_main(main)
    out, said = capsys.readouterr()
    assert out == ""
    return left.value.code, said


FULL = "The disk is full ({}). Make room, then give the same command again.\n"
MEMORY = (
    "The card's memory does not suffice. Try --quantization 4bit, a smaller --max_seq_length, or end other programs "
    "on the card.\n"
)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (UserError("Do this."), 2, "Do this.\n"),
        (NetworkGaveUpError("Later."), 3, "Later.\n"),
        (Interrupted(signal.SIGTERM, "Saved."), 143, "Saved.\n"),
        (Interrupted(signal.SIGINT, "Saved."), 130, "Saved.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, FULL.format("[Errno 28] No space left")),
        (OSError(errno.EDQUOT, "Quota exceeded"), 2, FULL.format("[Errno 122] Quota exceeded")),
        (OSError(errno.EFBIG, "File too large"), 2, FULL.format("[Errno 27] File too large")),
        (RuntimeError("I/O error: no room (os error 28)"), 2, FULL.format("I/O error: no room (os error 28)")),
        (OutOfMemoryError("tried to allocate"), 2, MEMORY),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/file"),
            2,
            "Permission denied: /a/file. Change its permissions (chmod), or give another one.\n",
        ),
    ],
    ids=repr,
)
def test_what_the_user_can_put_right_has_a_status_and_one_message(capsys, error, status, said):
    assert end_of(error, capsys) == (status, said)


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EIO, "broken"), RuntimeError("os error 5"), AssertionError()], ids=repr
)
def test_a_defect_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)) as left:
        run_main(lambda: (_ for _ in ()).throw(error))
    assert left.value is error


def test_a_message_that_was_made_elsewhere_is_not_made_anew():
    for error in (UserError("a"), NetworkGaveUpError("b"), Interrupted(signal.SIGTERM, "c")):
        with pytest.raises(type(error)) as left, explained():
            raise error
        assert left.value is error


def test_another_worker_speaks_for_itself_alone_and_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert end_of(UserError("Do this."), capsys) == (2, "[process 3] Do this.\n")
    assert end_of(Interrupted(signal.SIGTERM, "Saved."), capsys) == (143, "")  # rank 0 has said so


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (UserError("a"), 2), (NetworkGaveUpError("b"), 3), (Interrupted(signal.SIGTERM, "c"), 143)],
    ids=repr,
)
def test_a_worker_of_torchrun_leaves_at_once_with_the_same_status(capsys, monkeypatch, error, status):
    def leave(status: int) -> None:
        raise SystemExit(("at once", status))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setattr(os, "_exit", leave)
    assert end_of(error, capsys)[0] == ("at once", status)


def test_an_impatient_second_ctrl_c_finds_no_python_to_print_a_traceback(capsys):
    end_of(KeyboardInterrupt(), capsys)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("where", ["while it runs", "at its end"])
def test_whoever_reads_no_further_has_not_made_it_fail(monkeypatch, tmp_path, where):
    """As in `generate.py --prompt … | head`: what is still in the buffer goes nowhere, and says nothing."""

    class Closed:
        def write(self, _text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            return out.fileno()

    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", Closed())
        with pytest.raises(SystemExit) as left:
            run_main(lambda: print("a") if where == "while it runs" else None)
        assert left.value.code == 0
        assert os.path.samestat(os.fstat(out.fileno()), Path(os.devnull).stat())
