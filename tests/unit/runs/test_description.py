"""training_config.json at any instant of its being written."""

import os
from pathlib import Path

import pytest

from utils.runs.description import DESCRIBED, read_training_config, write_training_config


@pytest.mark.parametrize("where", ["write_text", "replace"])
def test_a_description_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch, where):
    before = dict.fromkeys(DESCRIBED) | {"trained_steps": 5}
    write_training_config(tmp_path, before)
    write = Path.write_text

    def torn(path: Path, *arguments, **more):
        if where == "write_text":
            write(path, arguments[0][:9])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, where, torn)
    with pytest.raises(OSError, match="No space left"):
        write_training_config(tmp_path, before | {"trained_steps": 9})
    assert read_training_config(tmp_path) == before
