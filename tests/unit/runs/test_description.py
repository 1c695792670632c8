"""training_config.json at any instant of its being written."""

import os
from pathlib import Path

import pytest

from configs.training import TrainingConfig
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.runs.description import DESCRIBED, read_training_config, template_for, write_training_config


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


def test_a_run_keeps_a_template_only_where_there_is_something_to_go_on_from(tiny_model, tmp_path):
    tokenizer = Tokenizer(tiny_model)
    kept = PromptTemplate("own.jinja", "{{ messages[0]['content'] }}")
    write_training_config(tmp_path, dict.fromkeys(DESCRIBED) | {"prompt_template": kept.to_dict()})
    config = TrainingConfig(model_name=str(tiny_model), output_dir=str(tmp_path))
    assert template_for(config, tokenizer).name == "alpaca"
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert template_for(config, tokenizer) == kept
    config.resume = "none"
    assert template_for(config, tokenizer).name == "alpaca"
