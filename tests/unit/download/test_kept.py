"""What of a download lies on the disk: its manifest before its first byte, its journal until the file has its name."""

import hashlib
import zlib

import pytest
from helpers.disk import DiskRecord
from helpers.downloads import fetch
from soak_download import FILES

from utils.download.listing import RemoteFile
from utils.download.manifest import unfinished_files
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
