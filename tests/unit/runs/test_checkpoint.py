"""Checkpoints on a disk that fills up, damages files, or is slower than training."""

import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.disk import DiskRecord
from helpers.run_states import run_state

from configs.errors import UserError
from utils.machine.world import World
from utils.runs import checkpoint
from utils.runs.checkpoint import Saver, load_tensors, newest_whole, read_checkpoint, save_checkpoint

WORLD = World(0, 1, [torch.device("cpu")])


def tensors(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {"a": torch.full((size,), value), "b": torch.full((3, 2), value)}}


def write(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        assert save_checkpoint(folder, run_state(step), tensors(step), keep) == ""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder: Path, step: int) -> float:
    loaded = tensors(-1.0)
    load_tensors(read_checkpoint(folder / f"step-{step}"), loaded)
    assert len(set(loaded["weights"]["a"].tolist() + loaded["weights"]["b"].flatten().tolist())) == 1
    return loaded["weights"]["a"][0].item()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "complete.json"])
@pytest.mark.parametrize("how", ["flipped bit", "cut short", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, how):
    write(tmp_path, 5, 10)
    damaged = tmp_path / "step-10" / name
    data = bytearray(damaged.read_bytes())
    if how == "flipped bit":
        at = data.index(b'"step": 10') + 8 if name == "complete.json" else len(data) // 2
        data[at] ^= 2  # step 10 becomes step 30
        damaged.write_bytes(data)
    elif how == "cut short":
        damaged.write_bytes(data[:-7])
    else:
        damaged.unlink()
    before = content(tmp_path)
    found, (complaint,) = newest_whole(tmp_path)
    assert found.step == 5 and load(tmp_path, 5) == 5
    assert str(tmp_path / "step-10") in complaint and name in complaint
    assert content(tmp_path) == before


def test_what_the_disk_can_not_read_counts_as_damaged(tmp_path, monkeypatch):
    write(tmp_path, 5, 10)

    def sha256(file: Path) -> str:
        if file.parent.name == "step-10":
            raise OSError(5, "Input/output error")
        return original(file)

    original = checkpoint.sha256
    monkeypatch.setattr("utils.runs.checkpoint.sha256", sha256)
    found, (complaint,) = newest_whole(tmp_path)
    assert found.step == 5 and "Input/output error" in complaint


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints(tmp_path):
    write(tmp_path, 5, 10)
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        error = save_checkpoint(tmp_path, run_state(15), tensors(15), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error
    assert content(tmp_path) == before
    write(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-20"]
    assert newest_whole(tmp_path)[0].step == 20


def test_a_power_cut_at_any_instant_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Files, then the mark that promises them, then the folder; then its name; and only then the oldest goes."""

    def save(_tensors, checkpoint_id: Path, no_dist: bool) -> None:
        for name in (".metadata", "__0_0.distcp"):
            (checkpoint_id / name).write_text(f"content of {name}")

    write(tmp_path, 3, 5)
    (tmp_path / "step-7").mkdir()  # of a run that was set back
    monkeypatch.setattr(dcp, "save", save)
    disk = DiskRecord(tmp_path, monkeypatch)
    write(tmp_path, 7)
    assert disk.events == [
        "flush step-7.unfinished/.metadata",
        "flush step-7.unfinished/__0_0.distcp",
        "flush step-7.unfinished/complete.json",
        "flush step-7.unfinished",
        "remove step-7",
        "rename step-7.unfinished -> step-7",
        "flush .",
        "remove step-3",
    ]
    for path in (tmp_path / "step-7").iterdir():
        assert disk.flushed[f"step-7.unfinished/{path.name}"] == path.read_bytes()


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / "step-7.unfinished").mkdir()
    (tmp_path / "step-7.unfinished" / "__0_0.distcp").write_bytes(b"half")
    write(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    go_on, begun, errors = threading.Event(), threading.Event(), []
    original = dcp.save

    def slow_save(*arguments, **more):
        begun.set()
        assert go_on.wait(30)
        return original(*arguments, **more)

    monkeypatch.setattr(dcp, "save", slow_save)
    saver, state = Saver(tmp_path, WORLD, keep=2), tensors(1.0)
    saver.save(run_state(1), state, errors.append)
    assert begun.wait(30)
    assert newest_whole(tmp_path)[0] is None  # `save` came back before anything was whole
    state["weights"]["a"].fill_(2.0)  # training moves the weights meanwhile
    state["weights"]["b"].fill_(2.0)
    second = threading.Thread(target=saver.save, args=(run_state(2), state, errors.append))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # one checkpoint at a time
    go_on.set()
    second.join(30)
    assert saver.wait() == "" and errors == []
    assert (load(tmp_path, 1), load(tmp_path, 2)) == (1.0, 2.0)


def test_a_checkpoint_too_large_for_a_copy_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.checkpoint.COPIED_AT_MOST", 100)
    saver = Saver(tmp_path, WORLD, keep=2)
    saver.save(run_state(1), tensors(1.0), report=pytest.fail)
    assert saver.thread is None and load(tmp_path, 1) == 1.0


def test_what_went_wrong_in_the_background_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    saver, errors = Saver(tmp_path / "checkpoints", WORLD, keep=2), []
    saver.save(run_state(1), tensors(1.0), errors.append)
    assert saver.wait() == errors[0] != ""


@pytest.mark.parametrize("other", [{"weights": {"c": torch.zeros(3)}}, {"weights": {"b": torch.zeros(7, 5)}}])
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, other):
    write(tmp_path, 5)
    with pytest.raises(UserError, match="another model or adapter") as caught:
        load_tensors(read_checkpoint(tmp_path / "step-5"), other)
    (name,) = other["weights"]
    assert str(tmp_path / "step-5") in str(caught.value) and f"weights.{name}" in str(caught.value)


def test_room_is_counted_without_what_was_set_aside(tmp_path, monkeypatch):
    """Two kept and one being written take 3 x 8,000 bytes of weights and optimizer, and the result its weights."""
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _folder: checkpoint.shutil._ntuple_diskusage(0, 0, 100))
    state = tensors(1.0)
    needed = 3 * checkpoint.size_of(state) + checkpoint.size_of({"weights": state["weights"]})
    saver = Saver(tmp_path, World(0, 1, [torch.device("cpu")]), keep=2)
    for folder, is_enough in (("old-20260101-000000/step-3", False), ("step-3", True)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "weights").write_bytes(bytes(needed))
        if is_enough:
            saver.check_disk_space(state)
        else:
            with pytest.raises(UserError, match="Make room"):
                saver.check_disk_space(state)


def test_how_much_room_is_lacking_is_said(tmp_path, monkeypatch):
    """Two checkpoints of 1.5 GB that are kept, the next one, and a result as large."""
    monkeypatch.setattr(checkpoint, "size_of", lambda _tensors: 1_500_000_000)
    monkeypatch.setattr(checkpoint, "free_space", lambda _folder: 2_345_600_000)
    with pytest.raises(UserError) as refused:
        Saver(tmp_path, WORLD, keep=2).check_disk_space(tensors(1.0))
    assert str(refused.value).startswith(
        f"Checkpoints and result take up to 6,000.0 MB, and the disk of {tmp_path} has 2,345.6 MB. Make room, "
    )
