"""What is said of how far a run is."""

import io
import sys

import pytest

from utils.runs import progress
from utils.runs.progress import Progress, duration

pytestmark = pytest.mark.usefixtures("english")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in seconds, as its one number."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_the_last(clock, capsys):
    """Of the 10 steps that are left of 30, each takes 4 seconds."""
    told = Progress(total=30, done=20, is_main=True)
    for step in range(21, 31):
        clock[0] += 4
        told.update(step, loss=1.23456, tokens_per_second=1234.5, memory_gb=0 if step < 30 else 7.25)
    told.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 21/30  loss 1.2346  1234 tokens/s  0:36 left",
        "step 24/30  loss 1.2346  1234 tokens/s  0:24 left",
        "step 27/30  loss 1.2346  1234 tokens/s  0:12 left",
        "step 30/30  loss 1.2346  1234 tokens/s  7.2 GB  0:00 left",
    ]


def test_other_processes_say_nothing(clock, capsys):
    told = Progress(total=2, done=0, is_main=False)
    told.update(2, 1.0, 1.0, 1.0)
    told.say("a")
    told.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_goes_on_where_the_run_does_and_messages_stand_beside_it(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    told = Progress(total=30, done=20, is_main=True)
    told.update(25, 1.25, 100.0, 3.5)
    told.say("a message")
    assert (told.bar.n, told.bar.total) == (25, 30)
    assert told.bar.postfix == "loss 1.250, 100 tok/s, 3.5 GB"
    told.close()
    assert capsys.readouterr().out == "a message\n"


def test_a_run_goes_on_though_nobody_listens(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    told = Progress(total=2, done=0, is_main=True)
    monkeypatch.setattr(sys, "stdout", Closed())
    told.say("a")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03"), (90000, "25:00:00")],
)
def test_a_time_span_as_a_person_writes_it(seconds, text):
    assert duration(seconds) == text
