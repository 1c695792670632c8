"""training_config.json at any instant of its being written."""

import os
from pathlib import Path

import pytest

from utils.runs.description import DESCRIBED, read_training_config, write_training_config


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_description_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch, where):
    before = dict.fromkeys(DESCRIBED) | {"trained_steps": 5}
    write_training_config(tmp_path, before)

    def full(*_arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        write_training_config(tmp_path, before | {"trained_steps": 9})
    assert read_training_config(tmp_path) == before
