"""Several machines: what multi_node.slurm starts, and what is refused before workers wait for one another for ever."""

import subprocess
import threading

import pytest
from helpers.environment import ENVIRONMENT, ROOT
from torch.distributed.run import get_args_parser

from configs.command_line import parse
from configs.errors import UserError
from configs.training import TrainingConfig
from utils.machine.launch import joined_world, start_world


def executable(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_the_slurm_script_starts_one_torchrun_a_node_with_what_torchrun_and_the_script_understand(tmp_path):
    """SLURM's own commands are stood in for: `srun` prints what it would start on each node."""
    executable(
        tmp_path / "bin" / "scontrol", '#!/bin/bash\n[ "$*" = "show hostnames node[7-8]" ] && echo -e "node7\\nnode8"\n'
    )
    executable(tmp_path / "bin" / "srun", '#!/bin/bash\nenv | grep ^TORCH_\nprintf "> %s\\n" "$@"\n')
    executable(tmp_path / ".venv" / "bin" / "activate", "")
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    result = subprocess.run(
        ["bash", str(ROOT / "multi_node.slurm"), "--use_peft", "--output_dir", "a folder"],
        cwd=tmp_path,
        env=ENVIRONMENT | slurm | {"PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    command = [line.removeprefix("> ") for line in result.stdout.splitlines() if line.startswith("> ")]
    assert command[0] == "torchrun"
    arguments = get_args_parser().parse_args(command[1:])
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("2", "gpu", 3)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", "node7:23456")
    assert arguments.rdzv_id == "123456"
    assert arguments.training_script == "llama_finetuning.py"
    config = parse(TrainingConfig, arguments.training_script_args)
    assert config.use_peft
    assert config.output_dir == "a folder"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in result.stdout.splitlines()


def test_restarts_over_nodes_need_a_store_of_their_own(monkeypatch):
    """As torchrun sets the environment of workers when TORCH_DISABLE_SHARE_RDZV_TCP_STORE was not given."""
    nodes = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in nodes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        start_world(one_gpu=False)
    for name, harmless in (("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_MAX_RESTARTS", "0")):
        with monkeypatch.context() as changed:
            changed.setenv(name, harmless)
            assert start_world(one_gpu=False).size == 1


def test_the_watch_over_torchrun_ends_with_the_run(monkeypatch):
    def watching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "end-with-torchrun"]

    with joined_world(one_gpu=False):
        assert watching() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with joined_world(one_gpu=False):
        (watch,) = watching()
    watch.join(10)
    assert not watch.is_alive()
