"""Where a run begins, by what lies in its folder."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.run_states import run_state

from configs.errors import UserError
from configs.peft import LoraConfig, PrefixConfig
from configs.training import TrainingConfig
from utils.rows.schedule import Schedule
from utils.runs.base_model import BaseIdentity
from utils.runs.checkpoint import Checkpoint, write_mark
from utils.runs.description import DESCRIBED, identity_of_base, write_training_config
from utils.runs.folder import hold_folder
from utils.runs.start import find_start, repeated_steps, run_identity

FINGERPRINTS = {"data": "d", "base_model": "b", "tokenizer": "t", "prompt_template": "p"}
BASE = SimpleNamespace(digests={}, first_row_fingerprint=lambda: "the first rows")


def leave_checkpoint(config: TrainingConfig, world_size: int, global_batch_size: int, step: int = 3, **more) -> None:
    """What a run that was stopped leaves, as far as finding a start needs it."""
    schedule = Schedule(100, global_batch_size, config.num_epochs, config.max_steps, config.seed)
    usual = {
        "total_steps": schedule.total_steps,
        "identity": run_identity(config, schedule, FINGERPRINTS),
        "batch_size_training": config.batch_size_training,
    }
    state = run_state(step, world_size=world_size, **usual | more)
    folder = config.checkpoints_dir / f"step-{step}"
    folder.mkdir(parents=True)
    write_mark(folder, state, {})


def settings(tmp_path, **more) -> TrainingConfig:
    return TrainingConfig(output_dir=str(tmp_path / "out"), use_peft=True, max_steps=9, **more)


def test_the_global_batch_stays_however_often_the_number_of_processes_changes(tmp_path):
    config = settings(tmp_path, batch_size_training=4)
    leave_checkpoint(config, world_size=1, global_batch_size=4)
    assert find_start(config, 2, 100, FINGERPRINTS, BASE).schedule.global_batch_size == 4
    leave_checkpoint(config, world_size=2, global_batch_size=4, step=5)
    start = find_start(config, 2, 100, FINGERPRINTS, BASE)
    assert (start.schedule.global_batch_size, start.checkpoint.step, start.notes) == (4, 5, [])
    assert find_start(config, 1, 100, FINGERPRINTS, BASE).schedule.global_batch_size == 4


def test_a_batch_that_was_divided_among_processes_is_the_same_batch(tmp_path):
    leave_checkpoint(settings(tmp_path, batch_size_training=4), world_size=1, global_batch_size=4)
    assert find_start(settings(tmp_path, batch_size_training=2), 2, 100, FINGERPRINTS, BASE).checkpoint.step == 3


def test_changes_are_named_and_can_be_accepted(tmp_path):
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4)
    with pytest.raises(UserError, match=r"lr: 0.0001 -> 0.5\n  weight_decay: 0.0 -> 0.1\n"):
        find_start(settings(tmp_path, lr=0.5, weight_decay=0.1), 1, 100, FINGERPRINTS, BASE)
    start = find_start(settings(tmp_path, lr=0.5, accept_changes=True), 1, 100, FINGERPRINTS, BASE)
    assert "0.0001 -> 0.5" in start.notes[0]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora_config": LoraConfig(r=16)}, "lora_config.r: 8 -> 16"),
        ({"lora_config": LoraConfig(modules_to_save=["lm_head"])}, "lora_config.modules_to_save: [] -> ['lm_head']"),
        ({"prefix_config": PrefixConfig(num_virtual_tokens=5)}, "prefix_config.num_virtual_tokens: 30 -> 5"),
        ({"lora_config": LoraConfig(use_dora=True)}, "lora_config.use_dora: False -> True"),
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw -> adamw_8bit"),
        ({"peft_method": "prefix"}, "peft_method: lora -> prefix"),
    ],
)
def test_what_is_trained_can_not_be_changed_on_the_way(tmp_path, changed, told):
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4)
    for accept in (False, True):
        with pytest.raises(UserError) as refused:
            find_start(settings(tmp_path, accept_changes=accept, **changed), 1, 100, FINGERPRINTS, BASE)
        assert told in str(refused.value)
        assert "--resume none" in str(refused.value)
        assert "--accept_changes" not in str(refused.value)


def test_a_setting_that_the_checkpoints_version_did_not_have_counts_as_its_default(tmp_path):
    schedule = Schedule(100, 4, settings(tmp_path).num_epochs, 9, settings(tmp_path).seed)
    identity = run_identity(settings(tmp_path), schedule, FINGERPRINTS)
    del identity["lora_config.use_rslora"]
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, identity=identity)
    assert find_start(settings(tmp_path), 1, 100, FINGERPRINTS, BASE).checkpoint.step == 3
    with pytest.raises(UserError, match=r"lora_config\.use_rslora: False -> True"):
        find_start(settings(tmp_path, lora_config=LoraConfig(use_rslora=True)), 1, 100, FINGERPRINTS, BASE)


def test_beginning_anew_moves_the_old_run_and_nothing_else(tmp_path):
    config = settings(tmp_path, resume="none")
    leave_checkpoint(config, world_size=1, global_batch_size=4)
    out = tmp_path / "out"
    for name in ("adapter_config.json", "metrics.jsonl", "my notes.txt"):
        (out / name).write_text(name)
    (out / "other-run").mkdir()
    assert find_start(config, 1, 100, FINGERPRINTS, BASE).checkpoint is None
    (aside,) = out.glob("old-*")
    assert sorted(path.name for path in aside.iterdir()) == ["adapter_config.json", "metrics.jsonl"]
    assert (out / "my notes.txt").exists() and (out / "other-run").exists()
    assert [path.name for path in (out / "checkpoints").glob("old-*/*")] == ["step-3"]


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    for step in (3, 5, 7):
        leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, step=step)
    checkpoints = tmp_path / "out" / "checkpoints"
    start = find_start(settings(tmp_path, resume=str(checkpoints / "step-3")), 1, 100, FINGERPRINTS, BASE)
    assert start.checkpoint.step == 3 and "step-5, step-7" in start.notes[0]
    assert sorted(path.name for path in checkpoints.glob("old-*/*")) == ["step-5", "step-7"]
    assert find_start(settings(tmp_path), 1, 100, FINGERPRINTS, BASE).checkpoint.step == 3


def test_a_start_that_is_refused_leaves_the_newer_checkpoints_where_they_are(tmp_path):
    for step in (3, 5):
        leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, step=step)
    checkpoints = tmp_path / "out" / "checkpoints"
    with pytest.raises(UserError, match=r"lr: 0.0001 -> 0.5"):
        find_start(settings(tmp_path, resume=str(checkpoints / "step-3"), lr=0.5), 1, 100, FINGERPRINTS, BASE)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-5"]


def test_what_changes_from_start_to_start_is_told_as_it_was_and_as_it_is(tmp_path):
    leave_checkpoint(settings(tmp_path, batch_size_training=4), world_size=1, global_batch_size=4)
    config = replace(settings(tmp_path, batch_size_training=2), max_steps=0, num_epochs=1)
    assert find_start(config, 2, 100, FINGERPRINTS, BASE).notes == [
        "The run was made by 1 processes and goes on with 2: 4 examples a step, in the same order.",
        "The run is now longer: 25 steps instead of 9; the learning rate follows the new length.",
    ]


def test_a_run_is_finished_once_its_result_is_there(tmp_path):
    """The last checkpoint comes before the result: a kill between them must not make the run a finished one."""
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, step=9)
    described = dict.fromkeys(DESCRIBED)
    for written, is_finished in (({}, False), ({"trained_steps": 5}, False), ({"trained_steps": 9}, True)):
        write_training_config(tmp_path / "out", described | written)
        assert find_start(settings(tmp_path), 1, 100, FINGERPRINTS, BASE).is_finished == is_finished
    longer = replace(settings(tmp_path), max_steps=12)
    assert not find_start(longer, 1, 100, FINGERPRINTS, BASE).is_finished


def test_the_base_models_folder_is_no_output_folder(tmp_path):
    config = settings(tmp_path, resume="none")
    config.model_name = config.output_dir
    model = tmp_path / "out"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model", "generation_config.json"):
        (model / name).write_text(name)
    with pytest.raises(UserError, match="base model's own folder"):
        find_start(config, 1, 100, FINGERPRINTS, BASE)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "generation_config.json"):
        assert (model / name).read_text() == name  # nothing was moved aside


def test_a_checkpoint_without_its_optimizer_is_refused_with_a_way_out(tmp_path):
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, has_optimizer=False)
    with pytest.raises(UserError, match="--resume none"):
        find_start(settings(tmp_path), 1, 100, FINGERPRINTS, BASE)


def test_a_mistyped_resume_is_named(tmp_path):
    with pytest.raises(UserError, match="--resume auto2: expected auto, none"):
        find_start(settings(tmp_path, resume="auto2"), 1, 100, FINGERPRINTS, BASE)


def test_a_damaged_newest_checkpoint_is_set_aside_and_nothing_is_deleted(tmp_path):
    """Otherwise it would count among --keep_checkpoints, and push out the whole ones of lower number."""
    for step in (3, 5):
        leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4, step=step)
    checkpoints = tmp_path / "out" / "checkpoints"
    mark = checkpoints / "step-5" / "complete.json"
    mark.write_text(damaged := mark.read_text()[:-9])
    start = find_start(settings(tmp_path), 1, 100, FINGERPRINTS, BASE)
    assert start.checkpoint.step == 3
    assert "step-5 is not a whole checkpoint: complete.json" in start.notes[0]
    assert "set aside" in start.notes[1] and "step-5" in start.notes[1]
    assert [path.read_text() for path in checkpoints.glob("old-*/step-5/complete.json")] == [damaged]


def test_a_checkpoint_of_another_base_model_or_other_data_is_refused_by_name(tmp_path):
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4)
    chosen = tmp_path / "out" / "checkpoints" / "step-3"
    for name, other in (("base_model", "b2"), ("data", "d2")):
        with pytest.raises(UserError, match=f"{chosen} belongs to a run with other settings") as caught:
            find_start(settings(tmp_path, resume=str(chosen)), 1, 100, FINGERPRINTS | {name: other}, BASE)
        assert f"{name}: {FINGERPRINTS[name]} -> {other}" in str(caught.value)
        assert "--resume none" in str(caught.value)


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_of_an_earlier_version_is_compared_by_first_rows(tmp_path, same):
    """Its fingerprint is 64 hexadecimal digits; that of this version begins with the name of a rule."""
    old, now = ("1" * 64, "2" * 64), FINGERPRINTS | {"base_model": "rows64:" + "3" * 64}
    identity = run_identity(settings(tmp_path), Schedule(100, 4, 3, 9, 42), FINGERPRINTS | {"base_model": old[0]})
    leave_checkpoint(settings(tmp_path), 1, 4, identity=identity)
    base = SimpleNamespace(digests={}, first_row_fingerprint=lambda: old[0 if same else 1])
    if same:
        start = find_start(settings(tmp_path), 1, 100, now, base)
        assert len(start.notes) == 1 and "step-3 was written by an earlier version" in start.notes[0]
        assert start.identity["base_model"] == now["base_model"]
    else:
        with pytest.raises(UserError, match=f"base_model: {old[0]} -> {old[1]}"):
            find_start(settings(tmp_path), 1, 100, now, base)


def test_tensors_that_differ_are_named_below_the_fingerprints(tmp_path):
    config = settings(tmp_path)
    leave_checkpoint(config, world_size=1, global_batch_size=4)
    known = {"base_model_fingerprint": "b", "base_model_digests": {"a": "float32 2 1", "c": "float32 2 2"}}
    write_training_config(tmp_path / "out", dict.fromkeys(DESCRIBED) | known)
    base = SimpleNamespace(digests={"a": "float32 2 1", "c": "float32 2 3"})
    with pytest.raises(UserError, match=r"base_model: b -> other\n    1 of 2 tensors differ: c\.\n"):
        find_start(config, 1, 100, FINGERPRINTS | {"base_model": "other"}, base)
    # What another run in the same folder was trained over says nothing of this one.
    write_training_config(tmp_path / "out", dict.fromkeys(DESCRIBED) | known | {"base_model_fingerprint": "third"})
    with pytest.raises(UserError, match=r"base_model: b -> other\nUse the old settings"):
        find_start(config, 1, 100, FINGERPRINTS | {"base_model": "other"}, base)


def test_a_checkpoint_kept_elsewhere_finds_its_runs_account_of_the_base(tmp_path):
    known = BaseIdentity("b", {"a": "float32 2 1"}, {"a": "12"})
    (tmp_path / "out").mkdir()
    write_training_config(tmp_path / "out", dict.fromkeys(DESCRIBED) | known.to_dict())
    state = run_state(3, identity={"base_model": "b"}, settings={"output_dir": str(tmp_path / "out")})
    assert identity_of_base(Checkpoint(tmp_path / "disk" / "run" / "step-3", state)) == known
    (tmp_path / "out" / "training_config.json").unlink()
    assert identity_of_base(Checkpoint(tmp_path / "disk" / "run" / "step-3", state)) == BaseIdentity("b")


def test_a_run_is_not_made_shorter_unasked(tmp_path):
    leave_checkpoint(settings(tmp_path), world_size=1, global_batch_size=4)
    shorter = settings(tmp_path)
    shorter.max_steps = 5
    with pytest.raises(UserError, match=r"steps: 9 -> 5\n.*--accept_changes") as refused:
        find_start(shorter, 1, 100, FINGERPRINTS, BASE)
    assert "begin anew" in str(refused.value)
    shorter.accept_changes = True
    start = find_start(shorter, 1, 100, FINGERPRINTS, BASE)
    assert start.schedule.total_steps == 5 and "steps: 9 -> 5" in start.notes[0]


def test_steps_that_an_interruption_cost_are_counted_and_an_extension_is_none(tmp_path):
    def leave(steps: int, **described) -> None:
        lines = [{"step": step, "train_loss": 1.0} for step in range(1, steps + 1)] + [{"step": steps, "eval_loss": 1}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "tr')
        write_training_config(tmp_path, dict.fromkeys(DESCRIBED) | described)

    assert repeated_steps(tmp_path, 0) == []
    leave(7)
    assert repeated_steps(tmp_path, 5) == [2]
    leave(8, repeated_steps=[2])
    assert repeated_steps(tmp_path, 8) == [2, 0]
    leave(9, repeated_steps=[2, 0], trained_steps=9)
    assert repeated_steps(tmp_path, 9) == [2, 0]


def test_data_that_lies_elsewhere_is_the_same_data(tmp_path):
    config = settings(tmp_path)
    leave_checkpoint(config, world_size=1, global_batch_size=4)
    config.data.data_path = "elsewhere/data.jsonl"
    start = find_start(config, 1, 100, FINGERPRINTS, BASE)
    assert (start.checkpoint.step, start.notes) == (3, [])
    with pytest.raises(UserError, match="data: d -> other"):
        find_start(config, 1, 100, {**FINGERPRINTS, "data": "other"}, BASE)


def test_a_folder_that_another_run_holds_is_refused_with_who_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.folder.WAIT_FOR_LOCK_SECONDS", 0)
    pid, host = os.getpid(), socket.gethostname()
    with hold_folder(tmp_path), pytest.raises(UserError) as refused, hold_folder(tmp_path):
        pytest.fail("held twice")
    assert str(refused.value) == (
        f"Another run (process {pid} on {host}) is writing to {tmp_path}. Wait until it ends, end it with "
        f"`kill {pid}` there, or give another --output_dir."
    )
    with hold_folder(tmp_path):  # it is free again
        pass


@pytest.mark.parametrize("content", ["{", '{"settings": 1}', None])
def test_an_account_of_the_base_that_can_not_be_read_stops_nobody(tmp_path, content):
    """A colleague's folder may be closed to us, or hold something else by now; it would only name what differs."""
    account = tmp_path / "out" / "training_config.json"
    account.parent.mkdir()
    if content is None:
        account.mkdir()
    else:
        account.write_text(content)
    state = run_state(3, identity={"base_model": "b"}, settings={"output_dir": str(account.parent)})
    assert identity_of_base(Checkpoint(tmp_path / "disk" / "run" / "step-3", state)) == BaseIdentity("b")


def test_a_checkpoint_may_lie_at_the_root_of_a_disk():
    state = run_state(3, identity={"base_model": "b"})
    assert identity_of_base(Checkpoint(Path("/step-3"), state)) == BaseIdentity("b")
