"""A conversation that /save writes: what it is read as, and what it may not harm."""

import errno

import pytest

from configs.errors import UserError
from ft_datasets.chat_dataset import read_messages
from ft_datasets.conversation import Message
from ft_datasets.records import DataFiles, read_entries
from inference.terminal.saving import append_record

pytestmark = pytest.mark.usefixtures("english")
TALK = [Message("system", "简短。"), Message("user", "你好\n"), Message("assistant", "  “好” 👋")]


def read(file):
    """The conversations of a file, as training reads them."""
    return [read_messages(entry.value) for entry in read_entries(DataFiles((file,)))]


def test_it_is_read_as_it_was_said_and_stands_behind_what_was_there(tmp_path):
    file = tmp_path / "talk.jsonl"
    learnt = [*TALK[:2], Message("assistant", "  “好” 👋", is_learnt=True)]
    append_record(file, TALK)
    assert read(file) == [learnt]
    file.write_text(file.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")  # as some editors leave it
    append_record(file, TALK[1:])
    assert read(file) == [learnt, learnt[1:]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("talk.json", b"[]"),
        ("notes.txt", b""),
        ("other.jsonl", b'{"instruction": "a", "output": "b"}\n'),
        ("list.jsonl", b'[{"messages": []}]\n'),
        ("mixed.jsonl", b'{"messages": []}\nnotes\n'),
    ],
)
def test_other_files_stay_as_they_are(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        append_record(file, TALK)
    assert file.read_bytes() == content


def test_folders_that_are_not_there_and_names_of_folders(tmp_path):
    for file in (tmp_path / "nowhere" / "talk.jsonl", tmp_path / "folder.jsonl"):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=file.name):
            append_record(file, TALK)


@pytest.mark.parametrize("before", [None, b'{"messages": []}\n'])
def test_a_disk_that_is_full_leaves_no_half_line(tmp_path, monkeypatch, before):
    file = tmp_path / "talk.jsonl"
    if before:
        file.write_bytes(before)

    def fill(_descriptor):
        assert file.stat().st_size > len(before or b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("inference.terminal.saving.os.fsync", fill)
    with pytest.raises(UserError, match="No space left"):
        append_record(file, TALK)
    assert (file.read_bytes() if file.exists() else None) == before
