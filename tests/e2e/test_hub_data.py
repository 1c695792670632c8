"""Fine-tuning on a data set that lies on a hub, as a user starts it."""

import json
import uuid
from pathlib import Path

import pytest
from helpers.command_runs import free_port, run_script
from helpers.environment import ENVIRONMENT, ROOT


@pytest.fixture
def run(hub, data_file, tiny_model, tmp_path):
    """Runs llama_finetuning.py on hub:owner/set in a folder of its own; gives the process and the hub's address."""
    address = hub.scenario(
        uuid.uuid4().hex, files={"train.json": {"file": str(data_file)}}, repo_id="owner/set", repo_type="dataset"
    )
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}

    def start(*flags: object, launcher: tuple[object, ...] = ()):
        flags = ("--model_name", tiny_model, "--alpaca_dataset.data_path", "hub:owner/set", *flags)
        result = run_script(*launcher, ROOT / "llama_finetuning.py", *flags, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    return start, address


def test_rank_0_fetches_for_all_and_the_commit_is_written_down(run, hub, data_file, tmp_path):
    start, address = run
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
    flags = ("--use_peft", "--output_dir", "out", "--batch_size_training", 10, "--max_steps", 2)
    start(*flags, launcher=launcher)
    report = hub.report(address)
    assert report["sent"] == {"train.json": data_file.stat().st_size}
    described = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert described["data"] == {"repository": "owner/set", "split": "train", "revision": report["commit"]}
    assert described["settings"]["alpaca_dataset"]["data_path"] == "hub:owner/set"
    assert (tmp_path / "data" / "owner" / "set" / "train.json").read_bytes() == Path(data_file).read_bytes()


def test_preview_and_plan_fetch_too(run, tmp_path):
    start, _address = run
    shown = start("--preview", 2)
    assert [sorted(json.loads(line)) for line in shown.stdout.splitlines()] == [["input_ids", "labels", "text"]] * 2
    assert "split train, commit" in shown.stderr
    assert "data/owner/set holds commit" in start("--plan").stdout.replace("\\", "/")
