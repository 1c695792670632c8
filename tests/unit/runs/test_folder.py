"""The output folder's lock."""

import os
import socket

import pytest

from configs.errors import UserError
from utils.runs import folder
from utils.runs.folder import LOCK, hold_folder


def test_a_folder_is_held_by_one_run_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT_FOR_LOCK_SECONDS", 0)
    output = tmp_path / "a" / "model"
    with hold_folder(output):
        assert (output / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}"
        with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"), hold_folder(output):
            pass
        with hold_folder(tmp_path / "b"):
            pass
    with hold_folder(output):
        pass


def test_a_run_that_fails_lets_its_folder_go(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT_FOR_LOCK_SECONDS", 0)
    for _attempt in range(2):
        with pytest.raises(ValueError), hold_folder(tmp_path):
            raise ValueError
