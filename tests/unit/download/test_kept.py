"""What of a download lies on the disk: its manifest before its first byte, its journal until the file has its name."""

import hashlib
import zlib
from types import SimpleNamespace

import pytest
from helpers.disk import DiskRecord
from helpers.downloads import fetch
from soak_download import FILES

from configs.errors import UserError
from utils.download.errors import TransientError
from utils.download.failover import Patience
from utils.download.folder import SPARE_BYTES, check_room
from utils.download.http import check_passing
from utils.download.listing import Listing, RemoteFile
from utils.download.manifest import Manifest, ManifestEntry, unfinished_files
from utils.download.part import PartFile
from utils.download.transfer import Downloader


def test_a_folder_is_known_to_be_unfinished_before_its_first_byte(endpoint, tmp_path, monkeypatch):
    """Else a kill that lets nothing be written any more would leave a folder that may pass for one of other making."""

    class KilledError(Exception):
        pass

    def kill(_downloader, missing) -> None:
        assert sorted(missing.files) == sorted(FILES)
        assert sorted(unfinished_files(tmp_path)) == sorted(FILES)
        raise KilledError

    monkeypatch.setattr(Downloader, "run", kill)
    with pytest.raises(KilledError):
        fetch(tmp_path, endpoint())


def test_every_byte_that_comes_renews_the_patience(endpoint, tmp_path, monkeypatch):
    """A line that is slow but alive is never given up; the list of files alone renews it once."""
    renewed = []
    monkeypatch.setattr(Patience, "renew", lambda _patience: renewed.append(True))
    fetch(tmp_path, endpoint())
    assert len(renewed) >= 1 + sum(file["size"] > 0 for file in FILES.values())


def test_a_proved_file_has_its_name_before_its_journal_goes(tmp_path, monkeypatch):
    """A kill between the two costs nothing; the other way round, every byte would be fetched again."""
    data = b"0123456789" * 100
    file = RemoteFile("sub/weights.bin", len(data), "sha256", hashlib.sha256(data).hexdigest(), "c0ffee")
    part = PartFile(tmp_path / "state", file)
    part.write(0, data)
    part.record(0, len(data), zlib.crc32(data))
    assert part.is_proved()
    disk = DiskRecord(tmp_path, monkeypatch)
    part.move_to(tmp_path / file.path)
    name = part.path.relative_to(tmp_path)
    assert disk.events == [
        f"rename {name} -> sub/weights.bin",
        "flush sub",
        f"remove {name.with_suffix('.journal')}",
    ]
    assert (tmp_path / file.path).read_bytes() == data


def test_bytes_are_on_the_disk_before_the_journal_promises_them(tmp_path, monkeypatch):
    file = RemoteFile("weights.bin", 10, "sha256", hashlib.sha256(b"0123456789").hexdigest(), "c0ffee")
    part = PartFile(tmp_path, file)
    disk = DiskRecord(tmp_path, monkeypatch)
    monkeypatch.setattr("utils.download.part.flush_to_disk", disk.fsync)
    part.write(0, b"01234")
    part.record(0, 5, zlib.crc32(b"01234"))
    assert disk.events == [f"flush {part.path.name}", f"flush {part.journal_path.name}"]
    assert disk.flushed[part.path.name] == b"01234"
    assert disk.flushed[part.journal_path.name] == f"0 5 {zlib.crc32(b'01234'):08x}\n".encode()
    part.close()


def test_a_file_of_the_right_size_is_unfinished_until_it_is_proved(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"12345")
    for size, proved, unfinished in ((5, False, ["a.bin"]), (6, True, ["a.bin"]), (5, True, [])):
        entry = ManifestEntry(size, "sha256", "ab", proved)
        Manifest("owner/model", "model", "c0ffee", "http://hub", {"a.bin": entry}).write(tmp_path)
        assert unfinished_files(tmp_path) == unfinished


@pytest.mark.parametrize(("left", "is_enough"), [(SPARE_BYTES, True), (SPARE_BYTES - 1, False)])
def test_the_disk_keeps_some_room_for_everything_else(tmp_path, monkeypatch, left, is_enough):
    missing = Listing("c0ffee", {"a.bin": RemoteFile("a.bin", 1000, "sha256", "ab", "c0ffee")})
    monkeypatch.setattr("utils.download.folder.free_space", lambda _folder: 1000 + left)
    if is_enough:
        check_room(tmp_path, missing)
    else:
        with pytest.raises(UserError, match="Nothing was fetched"):
            check_room(tmp_path, missing)
    monkeypatch.setattr("utils.download.folder.free_space", lambda _folder: 0)
    check_room(tmp_path, Listing("c0ffee", {}))  # what is whole needs no room


@pytest.mark.parametrize(
    ("status", "passes"), [(200, False), (206, False), (404, False), (408, True), (425, True), (429, True), (503, True)]
)
def test_which_refusals_may_pass(status, passes):
    url = SimpleNamespace(host="hub")
    answer = SimpleNamespace(status_code=status, headers={}, url=url, reason_phrase="a phrase")
    if passes:
        with pytest.raises(TransientError, match=f"hub answers {status} a phrase"):
            check_passing(answer)
    else:
        check_passing(answer)
