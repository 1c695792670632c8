"""Checkpoints of a run: trainable weights and optimizer, written so that a kill at any instant leaves a whole one.

The format is torch.distributed.checkpoint's, so that what N processes saved is read by M. A checkpoint is written
beside its place, flushed and hashed; a completion mark with the hashes goes in last, and then the folder is renamed.
Where one process can do that alone and a copy is small enough, a thread does it while training goes on.
"""

import functools
import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from configs.errors import UserError, root_cause
from configs.messages import _
from utils.files import flush, free_space, read_json, sha256
from utils.machine.memory import pinned_for, wait_for
from utils.machine.world import World, gathered_from_all
from utils.runs.state import RunState

COMPLETE = "complete.json"
UNFINISHED = ".unfinished"

COPIED_AT_MOST = 2 * 2**30
"""Bytes of a checkpoint that is copied, so that a thread can write it; a larger one could fill the host's memory."""

ALIGNMENT = 16
"""Bytes: where a tensor of any type may begin."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; `state` is what `save_checkpoint` was given."""

    path: Path
    state: RunState

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was written."""
        return self.state.step


class Saver:
    """Writes a run's checkpoints; in a thread, while training goes on, where no other process is needed for it.

    Args:
        folder: where the folders step-N go.
        world: the run's processes, all of which call `save` and `wait`.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.error = ""
        self.copies: torch.Tensor | None = None
        self.thread: threading.Thread | None = None

    def check_disk_space(self, tensors: dict[str, dict[str, Any]]) -> None:
        """Refuse a run whose checkpoints of these tensors, and its result, would fill the disk.

        Raises:
            UserError: there is too little room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # The newest is written before the oldest goes; the result is as large as the weights.
        needed = size_of(tensors) * (self.keep + 1) + size_of({"weights": tensors["weights"]})
        # What this run has there will be replaced; what was set aside stays.
        folders = [*numbered(self.folder), *self.folder.glob("step-*" + UNFINISHED)]
        reusable = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        free = free_space(self.folder) + reusable
        if needed > free:
            raise UserError(
                _(
                    "Checkpoints and result take up to {needed} MB, and the disk of {folder} has {free} MB. Make room, "
                    "keep fewer (--keep_checkpoints 1), or put them elsewhere (--dist_checkpoint_root_folder).",
                    needed=f"{needed / 1e6:,.1f}",
                    folder=self.folder,
                    free=f"{free / 1e6:,.1f}",
                )
            )

    def save(self, state: RunState, tensors: dict[str, dict[str, Any]], report: Callable[[str], None]) -> None:
        """Write `folder/step-N`, N being state.step, once the checkpoint before is written.

        Args:
            report: is told, on rank 0, why the checkpoint could not be written.
        """
        self.wait()
        if any(isinstance(tensor, DTensor) for group in tensors.values() for tensor in group.values()):
            # Every process writes its part, and collectives from a thread would meet those of training.
            self._write(state, tensors, report, together=True)
        elif self.world.is_main and size_of(tensors) > COPIED_AT_MOST:
            self._write(state, tensors, report)
        elif self.world.is_main:
            copies = self._copies_on_host(tensors)
            self.thread = threading.Thread(target=self._write, args=(state, copies, report), name="checkpoint")
            self.thread.start()

    def _copies_on_host(self, tensors: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The same as parts of one piece of host memory, which the next checkpoint uses again."""
        values = [value for group in tensors.values() for value in group.values() if isinstance(value, torch.Tensor)]
        starts = [0, *itertools.accumulate(-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in values)]
        cards = {value.device for value in values if value.is_cuda}
        if self.copies is None or len(self.copies) != starts[-1]:
            make = functools.partial(torch.empty, starts[-1], dtype=torch.uint8)
            self.copies = pinned_for(next(iter(cards), torch.device("cpu")), make)
        places = iter(starts)

        def copied(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value  # bitsandbytes counts in an int
            start = next(places)
            place = self.copies[start : start + value.nbytes].view(value.dtype).view(value.shape)
            return place.copy_(value, non_blocking=True)

        copies = {name: {key: copied(value) for key, value in group.items()} for name, group in tensors.items()}
        wait_for(cards)
        return copies

    def wait(self) -> str:
        """Wait until nothing is being written; '' or, on rank 0, why the last checkpoint could not be written."""
        if self.thread:
            self.thread.join()
        return self.error

    def _write(
        self,
        state: RunState,
        tensors: dict[str, dict[str, Any]],
        report: Callable[[str], None],
        together: bool = False,
    ) -> None:
        self.error = save_checkpoint(self.folder, state, tensors, self.keep, self.world.is_main, together)
        if self.error:
            report(self.error)


def save_checkpoint(
    folder: Path,
    state: RunState,
    tensors: dict[str, dict[str, Any]],
    keep: int,
    is_main: bool = True,
    together: bool = False,
) -> str:
    """Write `folder/step-N`, N being state.step, and remove all but the newest `keep`.

    Args:
        is_main: whether this process makes and renames folders.
        together: whether all processes call this, each with its shards; otherwise one does, with whole tensors.

    Returns:
        '' or, where it could not be written, why; earlier checkpoints are untouched then.
    """
    final = folder / f"step-{state.step}"
    staging = final.with_name(final.name + UNFINISHED)
    error = ""
    for has_part, action in (
        (is_main, lambda: _make_staging(staging)),
        (True, lambda: dcp.save(tensors, checkpoint_id=staging, no_dist=not together)),
        (is_main, lambda: _seal(staging, final, state)),
    ):
        if has_part:
            error = _failure_of(action)
        if together:
            error = next(filter(None, gathered_from_all(error)), "")
        if error:
            break
    if is_main:
        for old in [staging] if error else numbered(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return error


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of `folder` that is whole, and a line about each newer one that is not."""
    broken = []
    for path in numbered(folder):
        try:
            return read_checkpoint(path), broken
        except UserError as error:
            broken.append(str(error))
    return None, broken


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its hash.

    Raises:
        UserError: it is not a checkpoint, or a file is missing, cut short or changed.
    """
    mark = path / COMPLETE
    try:
        complete = read_json(mark)
        hashes, values = complete["sha256"], complete["state"]
        if complete["sha256_of_this"] != _sha256_of(values, hashes):
            raise ValueError
    except (FileNotFoundError, UserError, ValueError, KeyError):
        raise UserError(
            _("{path} is not a whole checkpoint: {file} is missing or broken.", path=path, file=COMPLETE)
        ) from None
    try:
        state = RunState.from_dict(values)
    except ValueError as error:
        raise UserError(_("{file} can't be read ({error}).", file=mark, error=error)) from error
    for name, digest in hashes.items():
        file = path / name
        try:
            is_right = sha256(file) == digest
        except FileNotFoundError:
            raise UserError(_("The checkpoint {path} is not whole: {file} is missing.", path=path, file=name)) from None
        except OSError as error:
            why = error.strerror
            raise UserError(
                _("The checkpoint {path} is damaged: {file} can't be read ({error}).", path=path, file=name, error=why)
            ) from error
        if not is_right:
            raise UserError(_("The checkpoint {path} is damaged: {file} has changed.", path=path, file=name))
    return Checkpoint(path, state)


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, dict[str, Any]], together: bool = False) -> None:
    """Fill `tensors` (see run_tensors) in place from a checkpoint.

    Args:
        together: whether all processes call this, each for its shards or copies.

    Raises:
        UserError: the checkpoint holds other tensors than the run has.
    """
    try:
        dcp.load(tensors, checkpoint_id=checkpoint.path, no_dist=not together)
    except (Exception, CheckpointException) as failure:  # dcp has no common type for a missing key or another shape
        raise UserError(
            _(
                "The checkpoint {path} belongs to another model or adapter: {error}",
                path=checkpoint.path,
                error=_reason(failure),
            )
        ) from failure


def size_of(tensors: dict[str, dict[str, Any]]) -> int:
    """Bytes that a checkpoint of these tensors takes."""
    return sum(t.nbytes for group in tensors.values() for t in group.values() if isinstance(t, torch.Tensor))


def numbered(folder: Path) -> list[Path]:
    """The checkpoints' folders step-N of a folder, newest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _failure_of(action: Callable[[], None]) -> str:
    """Do something; '' or, in one line, why it failed."""
    try:
        action()
    except (Exception, CheckpointException) as failure:  # dcp's own is no Exception
        return _reason(failure)
    return ""


def _make_staging(staging: Path) -> None:
    """An empty folder to write into; what a kill has left of others goes."""
    for left in staging.parent.glob("step-*" + UNFINISHED):
        shutil.rmtree(left)
    staging.mkdir(parents=True)


def _seal(staging: Path, final: Path, state: RunState) -> None:
    """Flush and hash what was written, add the completion mark, and give it its name."""
    hashes = {}
    for file in sorted(staging.iterdir()):
        flush(file)
        hashes[file.name] = sha256(file)
    write_mark(staging, state, hashes)
    flush(staging)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    flush(final.parent)


def write_mark(folder: Path, state: RunState, hashes: dict[str, str]) -> None:
    """Declare a checkpoint whole: its state, the SHA-256 of each of its files by name, and one of these two."""
    mark, values = folder / COMPLETE, state.to_dict()
    content = {"state": values, "sha256": hashes, "sha256_of_this": _sha256_of(values, hashes)}
    mark.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(mark)


def _sha256_of(state: dict[str, Any], hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([state, hashes], sort_keys=True).encode()).hexdigest()


def _reason(failure: BaseException) -> str:
    """What an exception began with, in one line."""
    nested = getattr(failure, "failures", None)  # dcp's CheckpointException: rank -> (exception, traceback)
    if nested:
        failure = next(iter(nested.values()))[0]
    # torch.save tells of a wrong position in a file that could not be written; the reason stands behind it.
    failure = root_cause(failure)
    return str(failure).strip().split("\n")[0] or type(failure).__name__
