"""Runs that are killed, stopped or short of room: they go on by the same command and lose nothing."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.command_runs import (
    STEPS,
    assert_same_result,
    held_out_losses_of,
    losses_of,
    metrics_of,
    readme_flags,
    run_script,
    torchrun,
)
from helpers.environment import ENVIRONMENT, ROOT

from utils.runs.checkpoint import newest_whole


def test_a_killed_run_goes_on_and_ends_exactly_as_if_never_killed(
    finished, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output)
    run = background(flags)
    run.wait_for_step(output, 12)
    run.kill()
    killed_at = losses_of(output)[-1][0]
    assert killed_at < STEPS, "the run ended before it could be killed"
    newest = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*[0-9]"))
    before = [line for line in metrics_of(output) if line["step"] <= newest]
    assert 5 <= newest <= killed_at

    changed = run_script("llama_finetuning.py", *flags, "--lr", "5e-4")
    assert changed.returncode == 2
    assert "lr: 0.002 -> 0.0005" in changed.stderr
    assert "--accept_changes" in changed.stderr
    assert "--resume none" in changed.stderr
    assert "Traceback" not in changed.stderr

    resumed = torchrun(1, *flags)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoints/step-{newest}" in resumed.stdout
    assert f"Interruptions: 1; steps that had to be done again: {killed_at - newest} of {STEPS}" in resumed.stdout
    # Not begun anew: the lines up to the checkpoint are the killed run's own, its timings among them.
    assert [line for line in metrics_of(output) if line["step"] <= newest] == before
    assert_same_result(output, finished[0])


def test_a_run_is_alone_in_its_folder_and_saves_itself_when_told_to_stop(
    finished, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output)
    run = background(flags)
    run.wait_for_step(output, 7)
    pids = run.tree()
    second = run_script("llama_finetuning.py", *flags)
    assert second.returncode == 2
    assert "Another run" in second.stderr
    assert any(f"process {pid} on " in second.stderr for pid in pids)
    assert "Traceback" not in second.stderr

    for pid in pids:  # as `pkill -TERM -f llama_finetuning.py` does: the workers, and torchrun, which passes it on
        os.kill(pid, signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.process.wait(60) != 0
    said = run.log.read_text()
    stopped_at = losses_of(output)[-1][0]
    assert stopped_at < STEPS, "the run ended before it could be stopped"
    assert f"Stopped at step {stopped_at}" in said
    assert "same command goes on" in said
    assert (output / "checkpoints" / f"step-{stopped_at}" / "complete.json").is_file()

    resumed = torchrun(1, *flags)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"checkpoints/step-{stopped_at}" in resumed.stdout
    assert_same_result(output, finished[0])


def test_a_run_that_loses_one_of_two_processes_goes_on_exactly(
    finished_by_two, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output, batch_size=10)
    run = background(flags, processes=2)
    run.wait_for_step(output, 8)
    os.kill(run.workers()[1], signal.SIGKILL)
    run.send(signal.SIGCONT)
    assert run.process.wait(60) == 1  # torchrun ends the other worker, and itself
    assert losses_of(output)[-1][0] < STEPS, "the run ended before it could be killed"

    resumed = torchrun(2, *flags)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Going on from" in resumed.stdout
    assert_same_result(output, finished_by_two[0])


def test_a_run_is_stopped_in_every_way_and_goes_on_with_another_number_of_processes(
    finished, tiny_model, data_file, tmp_path, background
):
    output = tmp_path / "model"
    flags = readme_flags(tiny_model, data_file, output, batch_size=10)  # 20 a step: the run begins with two processes
    stopped_at = 0
    for processes, signum in [(2, signal.SIGINT), (1, signal.SIGINT), (2, signal.SIGTERM)]:
        run = background(flags, processes)
        run.wait_for_step(output, stopped_at + 4)  # however far the run before it came
        run.interrupt(signum)
        assert run.process.wait(60) != 0
        stopped_at = losses_of(output)[-1][0]
        assert stopped_at < STEPS, "the run ended before it could be stopped"
        assert run.log.read_text().count(f"Stopped at step {stopped_at}; everything is saved") == 1
        assert (output / "checkpoints" / f"step-{stopped_at}" / "complete.json").is_file()

    last = torchrun(1, *flags)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "made by 2 processes and goes on with 1: 20 examples a step" in last.stdout
    assert f"Interruptions: 3; steps that had to be done again: 0 of {STEPS}" in last.stdout
    for losses in (losses_of, held_out_losses_of):
        expected = losses(finished[0])
        assert losses(output) == [(step, pytest.approx(loss, rel=1e-6, abs=1e-6)) for step, loss in expected]


def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(finished, tiny_model, data_file, tmp_path):
    """The limit on a file's size stands for the disk: only a checkpoint's file is larger."""
    output = tmp_path / "model"
    begun = run_script("llama_finetuning.py", *readme_flags(tiny_model, data_file, output), "--lora_config.r", "64")
    assert begun.returncode == 0, begun.stderr
    flags = [*readme_flags(tiny_model, data_file, output), "--lora_config.r", "64", "--num_epochs", "9"]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 256; exec "$0" "$@"', sys.executable, "llama_finetuning.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert limited.returncode == 0, limited.stderr
    assert "The checkpoint of step 25 could not be written (" in limited.stdout
    assert "File too large" in limited.stdout
    assert f"{output / 'checkpoints'}" in limited.stdout
    assert [step for step, _loss in losses_of(output)] == list(range(1, 28))
    newest, damaged = newest_whole(output / "checkpoints")
    assert (newest.step, damaged) == (24, [])
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-20", "step-24"]

    again = run_script("llama_finetuning.py", *flags)  # with room on the disk
    assert again.returncode == 0, again.stderr
    assert newest_whole(output / "checkpoints")[0].step == 27
