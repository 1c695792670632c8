"""Which source is asked for a file, and for how long: with sources that are told what they have."""

from dataclasses import replace

import pytest
from helpers.downloads import Notes

from configs.download import DownloadConfig
from configs.errors import NetworkGaveUpError, UserError
from utils.download import failover
from utils.download.errors import SourceError, TransientError
from utils.download.failover import Patience, SourcePool, open_sources
from utils.download.listing import Listing, RemoteFile
from utils.download.options import TransferOptions

pytestmark = pytest.mark.usefixtures("english")

FILE = RemoteFile("a.bin", 10, "sha256", "ab", "c1")


class ToldSource:
    """A host that lists one file."""

    def __init__(self, name: str, file: RemoteFile) -> None:
        self.name, self.file = name, file

    def list_files(self, _revision: str) -> Listing:
        return Listing(self.file.commit, {self.file.path: self.file})

    def list_like(self, _pinned: Listing, revision: str) -> Listing:
        return self.list_files(revision)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ({}, True),
        ({"commit": "c2"}, True),
        ({"size": 11}, False),
        ({"digest": "cd"}, False),
        ({"algorithm": "x"}, False),
    ],
)
def test_another_source_is_asked_for_the_same_bytes_alone(other, is_same):
    first, second = ToldSource("first", FILE), ToldSource("second", replace(FILE, **other))
    pool = SourcePool([first, second], Patience(0, Notes()), Notes())
    pool.pin("main")
    assert pool.choose(FILE) == (first, FILE)
    pool.ban(first, FILE, SourceError("first is bad"))
    if is_same:
        assert pool.choose(FILE) == (second, second.file)
    else:
        with pytest.raises(UserError, match="first is bad"):
            pool.choose(FILE)


def test_two_failures_in_a_row_make_the_next_source_the_current_one():
    first, second = ToldSource("first", FILE), ToldSource("second", FILE)
    display = Notes()
    pool = SourcePool([first, second], Patience(0, display), display)
    pool.pin("main")
    pool.failed(first, FILE)
    pool.succeeded()
    pool.failed(first, FILE)
    assert pool.current is first
    pool.failed(first, FILE)
    assert pool.current is second and display.notes == [("source", "Going on with second")]
    pool.failed(first, FILE)  # a request that was under way
    pool.failed(first, FILE)
    assert pool.current is second


def test_patience_ends_after_so_many_minutes_without_progress(monkeypatch):
    now, waited = [0.0], []
    monkeypatch.setattr(failover.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(failover.random, "uniform", lambda _low, high: high)
    config = DownloadConfig(repo_id="owner/model", endpoint=["http://127.0.0.1:1"], give_up_after=2)
    with open_sources(config, Notes(), TransferOptions()) as pool:
        patience = pool.patience
        monkeypatch.setattr(patience.stop, "wait", lambda seconds: waited.append(seconds))
        patience.wait(TransientError("broke off"), 1, "a.bin")
        patience.wait(TransientError("broke off"), 3, "a.bin")
        patience.wait(TransientError("busy", 50.0), 1, "a.bin")
        first, longest = patience.first_delay, patience.longest_delay
        assert waited == [first, first * 4, 50.0]
        now[0] = 119.0
        with pytest.raises(NetworkGaveUpError, match=r"a.bin: busy\. Gave up after 2"):
            patience.wait(TransientError("busy", 1.5), 1, "a.bin")
        patience.renew()
        patience.wait(TransientError("busy"), 30, "a.bin")
        assert waited[-1] == longest
