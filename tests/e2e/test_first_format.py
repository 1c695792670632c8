"""What the project wrote before checkpoints and adapters knew every tensor of their base: it resumes, chats, merges.

tests/fixtures/first_format holds a base model, a finished run's adapter, and the checkpoint of a run of the same
settings that was interrupted after step 5.
"""

import json
import shutil
from pathlib import Path

import pytest
from helpers.command_runs import adapter_hash, held_out_losses_of, losses_of, run_script
from helpers.environment import ROOT

from utils.files import sha256

FIXTURE = ROOT / "tests" / "fixtures" / "first_format"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
BY_EARLIER_VERSION = "was written by an earlier version"
FLAGS = (
    "--use_peft --quantization --model_name base --alpaca_dataset.data_path data.json --output_dir interrupted "
    "--batch_size_training 8 --num_epochs 4 --lr 5e-3 --save_steps 4 --val_set_size 4"
).split()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy; the settings in it name what lies beside them."""
    return shutil.copytree(FIXTURE, tmp_path / "first_format")


def test_its_checkpoint_is_gone_on_from_to_the_very_same_result(folder):
    before = losses_of(folder / "interrupted")
    done = run_script(ROOT / "llama_finetuning.py", *FLAGS, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(before) == 5 and losses_of(folder / "interrupted")[:5] == before  # step 6 was the first one
    assert losses_of(folder / "interrupted") == losses_of(folder / "finished")
    assert held_out_losses_of(folder / "interrupted") == held_out_losses_of(folder / "finished")
    assert adapter_hash(folder / "interrupted") == EXPECTED["adapter_sha256"]
    assert f"step-5 {BY_EARLIER_VERSION}" in done.stdout
    described = json.loads((folder / "interrupted" / "training_config.json").read_text())
    assert described["base_model_fingerprint"].startswith("rows64:") and len(described["base_model_sha256"]) == 21


def test_its_adapter_answers_as_it_did(folder):
    flags = "--base_model base --lora_weights finished --load_8bit --temperature 0 --repetition_penalty 1.6".split()
    done = run_script(
        ROOT / "generate.py", *flags, "--max_new_tokens", 24, "--prompt", EXPECTED["question"], cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == EXPECTED["answer"] + "\n"
    assert f"finished {BY_EARLIER_VERSION}" in done.stderr


def test_its_adapter_merges_to_the_same_bytes(folder):
    script = ROOT / "inference" / "hf-text-generation-inference" / "merge_lora_weights.py"
    flags = "--base_model base --peft_model finished --output_dir merged".split()
    done = run_script(script, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sha256(folder / "merged" / "model.safetensors") == EXPECTED["merged_sha256"]
    assert f"finished {BY_EARLIER_VERSION}" in done.stderr
