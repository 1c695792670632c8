"""Files of others: what is wrong with one is said by file and line; the room on a disk, and what stays on it."""

import math
import shutil
from collections import namedtuple

import pytest
from helpers.disk import DiskRecord

from configs.errors import UserError
from utils.files import flush, free_space, read_json, write_durably


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "(line 1, column 1: "),
        (b'{"a": 1,\n "b" 2}', "(line 2, column 6: "),
        (b'{"a": 1}{', "(line 1, column 9: "),
        (b'{"a": 1,\n\n "b": "\xc4\xe3"}', "(line 3 is not UTF-8 text)"),
        (b'\xef\xbb\xbf{"a": 1}', "(line 1, column 1: "),
        (b'{"a":' + b"[" * 100_000, "(it is nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too long a number"),
        (b"[1, 2]", "(it holds no object"),
        (b'"llama"', "(it holds no object"),
    ],
    ids=["empty", "syntax", "more behind", "GBK", "mark", "deep", "long number", "list", "text"],
)
def test_what_is_wrong_with_a_json_file_is_said_with_its_place(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(tmp_path / "config.json")
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "config.json")) and words in message
    assert "copy or download it again" in message


def test_a_json_file_as_python_writes_it(tmp_path):
    (tmp_path / "a.json").write_text('{"loss": NaN, "best": Infinity, "你好": [1]}', encoding="utf-8")
    values = read_json(tmp_path / "a.json")
    assert math.isnan(values["loss"]) and values["best"] == math.inf and values["你好"] == [1]


def test_a_json_file_that_can_not_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder can't be read: Is a directory"):
        read_json(tmp_path / "folder")


def test_room_is_looked_for_where_a_folder_will_be(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, {tmp_path: 7}[path]))
    monkeypatch.chdir(tmp_path)
    assert free_space(tmp_path) == free_space(tmp_path / "not" / "yet") == 7
    assert free_space(type(tmp_path)("relative/path")) == 7


def test_a_text_is_on_the_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    disk = DiskRecord(tmp_path, monkeypatch)
    write_durably(tmp_path / "a.json", "你好\n")
    assert disk.events == ["flush a.json.tmp", "rename a.json.tmp -> a.json", "flush ."]
    assert disk.flushed["a.json.tmp"] == (tmp_path / "a.json").read_bytes() == "你好\n".encode()


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    disk = DiskRecord(tmp_path, monkeypatch)
    flush(tmp_path / "a")
    flush(tmp_path)
    assert disk.events == ["flush a", "flush ."]
