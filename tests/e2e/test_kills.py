"""Twenty kills at random instants, each in a process that a server with the libraries loaded has forked: in seconds.

tests/soak_resume.py does the same by the hundred, with torchrun, several processes and every method.
"""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from helpers.command_runs import call_main
from soak_resume import losses, weights_hash

import llama_finetuning

LIBRARIES = ["torch", "transformers", "peft", "matplotlib.figure", "torch.distributed.checkpoint", "utils.finetune"]
RUNS, KILLS_A_RUN, STEPS = 4, 5, 40


def fine_tune(flags: list[str], log: Path) -> None:
    """llama_finetuning.py in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    call_main(llama_finetuning.main, *flags)


@pytest.fixture
def processes():
    """Where fresh processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def test_runs_killed_at_random_instants_end_as_if_never_killed(tiny_model, data_file, tmp_path, processes):
    def start(output: Path, log: Path) -> multiprocessing.Process:
        flags = ["--model_name", tiny_model, "--alpaca_dataset.data_path", data_file, "--output_dir", output]
        flags += ["--use_peft", "--lr", "1e-3", "--batch_size_training", 8, "--num_epochs", 9, "--max_steps", STEPS]
        flags += ["--save_steps", 3]
        process = processes.Process(target=fine_tune, args=([str(flag) for flag in flags], log))
        process.start()
        return process

    def finish(output: Path, log: Path) -> tuple[dict[int, float], str]:
        process = start(output, log)
        process.join(60)
        assert process.exitcode == 0, log.read_text()
        return losses(output), weights_hash(output)

    expected = finish(tmp_path / "whole", tmp_path / "whole.log")
    assert len(expected[0]) == STEPS

    chance, killed, resumed = random.Random(0), 0, 0
    for run in range(RUNS):
        output, log = tmp_path / str(run), tmp_path / f"{run}.log"
        for step in sorted(chance.sample(range(STEPS + 1), KILLS_A_RUN)):
            process = start(output, log)
            while process.is_alive() and max(losses(output), default=0) < step:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)  # while it trains, evaluates, saves or hands over
            process.kill()
            process.join()
            killed += process.exitcode == -9
        assert finish(output, log) == expected, log.read_text()
        resumed += log.read_text().count("Going on from")
    assert killed >= RUNS * KILLS_A_RUN - 2  # a run may end before it is killed after its last step
    assert resumed >= RUNS * KILLS_A_RUN / 2
