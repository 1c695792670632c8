"""What the loop does between steps: when it saves and in which order, what it takes along, how it stops."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from helpers.disk import DiskRecord
from helpers.trainers import make_trainer, train

from configs.errors import Interrupted
from utils.runs.checkpoint import read_checkpoint
from utils.runs.metrics import read_metrics
from utils.training import interruptions
from utils.training.interruptions import Interruptions
from utils.training.loss_scale import LossScale
from utils.training.search import Search

pytestmark = pytest.mark.usefixtures("english")

FOUR_EACH = {"batch_size_training": 4, "num_epochs": 9}
"""Two steps a pass over the eight made-up examples."""


def states_saved(trainer, monkeypatch) -> list:
    """The states of the checkpoints that a trainer writes, none of which comes to the disk."""
    states = []
    monkeypatch.setattr(trainer.saver, "save", lambda state, _tensors, report: states.append(state))
    return states


def before_step(trainer, monkeypatch, act) -> None:
    """Have `act` called with the number of each step (from 1) before it is taken."""
    take = trainer.stepper.take

    def acting(step, rate):
        act(step + 1)
        return take(step, rate)

    monkeypatch.setattr(trainer.stepper, "take", acting)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_steps": 3}, [3, 6, 8]),
        ({"save_steps": 4}, [4, 8]),
        ({}, [8]),
        ({"save_minutes": 5}, [3, 6, 8]),  # each step takes 100 seconds
        ({"save_minutes": 5, "save_steps": 4}, [3, 4, 7, 8]),
    ],
)
def test_checkpoints_are_written_when_it_is_time_and_at_the_end(tiny_model, tmp_path, monkeypatch, settings, steps):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("utils.training.trainer.time", clock)
    trainer = make_trainer(tiny_model, tmp_path, max_steps=8, **FOUR_EACH, **settings)
    states = states_saved(trainer, monkeypatch)
    before_step(trainer, monkeypatch, lambda _step: now.__setitem__(0, now[0] + 100))
    train(trainer)
    assert [state.step for state in states] == steps


def test_what_metrics_tell_is_on_the_disk_before_the_checkpoint_that_goes_on_from_there(
    tiny_model, tmp_path, monkeypatch
):
    """Otherwise a power cut would leave a run whose lines end before the step that it goes on from."""
    trainer = make_trainer(tiny_model, tmp_path, max_steps=2, save_steps=1, **FOUR_EACH)
    disk = DiskRecord(tmp_path, monkeypatch)
    train(trainer)
    flushes = [number for number, event in enumerate(disk.events) if event == "flush metrics.jsonl"]
    renames = [
        disk.events.index(f"rename checkpoints/step-{step}.unfinished -> checkpoints/step-{step}") for step in (1, 2)
    ]
    assert len(flushes) == 2 and flushes[0] < renames[0] and flushes[1] < renames[1]
    assert disk.flushed["metrics.jsonl"] == (tmp_path / "metrics.jsonl").read_bytes()


def test_a_checkpoint_at_the_end_of_a_pass_knows_its_held_out_loss(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=3, save_steps=1, **FOUR_EACH)
    trainer.data.held_out[:] = trainer.data.training[:2]
    states = states_saved(trainer, monkeypatch)
    train(trainer)
    measured = [(line["step"], line["eval_loss"]) for line in read_metrics(tmp_path) if "eval_loss" in line]
    assert [step for step, _loss in measured] == [2, 3]
    assert [state.last_eval_loss for state in states] == [None, *(loss for _step, loss in measured)]


def test_a_run_goes_on_with_its_plan_its_loss_scale_and_its_last_held_out_loss(tiny_model, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_steps": 2, **FOUR_EACH}
    begun = make_trainer(tiny_model, tmp_path / "begun", **settings)
    begun.data.held_out[:] = begun.data.training[:2]
    begun.stepper.loss_scale = LossScale(2.0**9, good_steps=5)
    train(begun)
    checkpoint = read_checkpoint(tmp_path / "begun" / "checkpoints" / "step-2")
    monkeypatch.setattr(LossScale, "for_dtype", lambda _dtype: LossScale(2.0**14))
    monkeypatch.setattr(Search, "best", lambda *_arguments: pytest.fail("searched again"))
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=checkpoint, **settings)
    assert resumed.done == 2
    first, _last = (line["eval_loss"] for line in read_metrics(tmp_path / "begun") if "eval_loss" in line)
    assert resumed.last_eval_loss == first
    assert resumed.stepper.loss_scale == LossScale(2.0**9, good_steps=7)
    assert resumed.stepper.step_plan == begun.stepper.step_plan


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_its_step_and_says_how_to_go_on(tiny_model, tmp_path, monkeypatch, signum):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4, **FOUR_EACH)
    before_step(trainer, monkeypatch, lambda step: os.kill(os.getpid(), signum) if step == 2 else None)
    with pytest.raises(Interrupted) as stopped:
        train(trainer)
    assert stopped.value.signum == signum
    assert str(stopped.value) == "Stopped at step 2; everything is saved. The same command goes on from there."
    assert [path.name for path in trainer.config.checkpoints_dir.iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    ("settings", "failure", "said"),
    [
        ({"resume": "none"}, "", "Stopped at step 1; everything is saved. Go on from there with --resume auto."),
        (
            {"save_optimizer": False},
            "",
            "Stopped at step 1. Without the optimizer (--save_optimizer False) this was all.",
        ),
        ({}, "no room", "Stopped at step 1. --resume auto goes on from the last whole checkpoint."),
    ],
)
def test_what_is_said_of_the_way_on(tiny_model, tmp_path, monkeypatch, settings, failure, said):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4, **FOUR_EACH, **settings)
    states = states_saved(trainer, monkeypatch)
    monkeypatch.setattr(trainer.saver, "wait", lambda: failure)
    before_step(trainer, monkeypatch, lambda _step: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        train(trainer)
    assert str(stopped.value) == said and [state.step for state in states] == [1]


def test_to_be_told_to_stop_in_the_last_step_is_to_end(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=2, **FOUR_EACH)
    before_step(trainer, monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    try:
        losses = train(trainer)
    except Interrupted:  # pytest would take it for its own end
        pytest.fail("stopped")
    assert len(losses) == 2 and trainer.done == 2


def test_a_checkpoint_that_can_not_be_written_is_told_and_the_run_goes_on(tiny_model, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4, save_steps=2, **FOUR_EACH)
    monkeypatch.setattr(trainer.saver, "save", lambda _state, _tensors, report: report("No space left on device"))
    train(trainer)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint" in line]
    assert said == [
        f"The checkpoint of step {step} could not be written (No space left on device). The run goes on; earlier "
        f"checkpoints are whole. Make room on the disk of {tmp_path / 'checkpoints'}."
        for step in (2, 4)
    ]


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time that interruptions are told, in seconds, as its one number."""
    time_now = [100.0]
    monkeypatch.setattr(interruptions, "time", SimpleNamespace(monotonic=lambda: time_now[0]))
    return time_now


def test_a_second_sigterm_changes_nothing(now, monkeypatch):
    """It comes by torchrun a little after the first, and a job scheduler may repeat it for as long as it likes."""
    monkeypatch.setattr(signal, "raise_signal", lambda _signum: pytest.fail("ended"))
    with Interruptions() as heard:
        for _again in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 5
        assert heard.signum == signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_echo_of_the_first(now, monkeypatch):
    def raised(signum: int) -> None:
        raise SystemExit(signum, signal.getsignal(signum))

    monkeypatch.setattr(signal, "raise_signal", raised)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended, Interruptions() as heard:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.signum == signal.SIGINT
        now[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert ended.value.args == (signal.SIGINT, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGINT) == before
