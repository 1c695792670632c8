"""Two torchrun agents on one machine, as two nodes: they restart each other's workers, and go on exactly."""

import os
import re
import signal
import socket
from pathlib import Path

from helpers.command_runs import assert_same_result, free_port, readme_flags


def node_launcher(port: int) -> list[str]:
    """torchrun's flags on each of two nodes."""
    fixed = "--nnodes 2 --nproc_per_node 1 --max_restarts 2 --rdzv_backend c10d --rdzv_id test --local_addr 127.0.0.1"
    return [*fixed.split(), "--monitor_interval", "0.1", "--rdzv_endpoint", f"127.0.0.1:{port}"]


def test_two_nodes_go_on_by_themselves_after_the_leading_worker_is_killed(
    finished_by_two, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = [*readme_flags(tiny_model, data_file, output, batch_size=10), "--resume", "none"]
    launcher = node_launcher(free_port())
    nodes = [background(flags, launcher=launcher) for _node in range(2)]
    nodes[0].wait_for_step(output, 7)
    os.kill(int((output / ".lock").read_text().split()[0]), signal.SIGKILL)
    nodes[0].send(signal.SIGCONT)
    ended = [node.process.wait(120) for node in nodes]
    said = "".join(node.log.read_text() for node in nodes)
    assert ended == [0, 0], said
    # Both workers were started again, by their own torchrun, and --resume none did not count a second time.
    assert said.count("Going on from") == 1
    assert re.search(r"Going on from .*step-(5|10|15|20)\.", said)
    assert_same_result(output, finished_by_two[0])


def test_nodes_without_a_common_disk_are_refused(tiny_model, data_file, tmp_path, background):
    flags = readme_flags(tiny_model, data_file, Path("model"), batch_size=10)
    launcher = [*node_launcher(free_port()), "--max_restarts", "0"]
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    nodes = [background(flags, launcher=launcher, cwd=folder) for folder in folders]
    assert all(node.process.wait(120) for node in nodes)
    said = "".join(node.log.read_text() for node in nodes)
    assert f"model is not the same folder on {socket.gethostname()}" in said
    assert "on a disk that they share" in said
    assert not [
        item for folder in folders for item in folder.rglob("*") if item.name not in ("model", ".lock", "checkpoints")
    ]
