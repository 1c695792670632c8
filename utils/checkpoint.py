"""Checkpoints of a run: trainable weights and optimizer, written so that a kill at any instant leaves a whole one.

The tensors are torch.distributed.checkpoint's, so that what N processes saved is read by M. A checkpoint is written
beside its place, flushed, hashed, and renamed into it; its completion mark, with the hashes, is written last.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from configs.errors import UserError
from configs.messages import _
from utils.distributed import World, barrier, from_main, same_on_all
from utils.optimization import create_state

COMPLETE = "complete.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; `state` is what `save_checkpoint` was given."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was written."""
        return self.state["step"]


def run_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """The tensors that make up a run's state, by parameter name; the optimizer's are created where it has none yet.

    They, and the dictionaries of the optimizer, are the run's own, so that to load into them is to resume.
    """
    tensors: dict[str, dict[str, Any]] = {"weights": {name: p.detach() for name, p in parameters.items()}}
    if optimizer is None:
        return tensors
    create_state(optimizer)
    return tensors | {f"optimizer.{name}": optimizer.state[parameter] for name, parameter in parameters.items()}


def save_checkpoint(
    folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Any]], world: World, keep: int
) -> str:
    """Write `folder/step-N`, N being state["step"], and remove all but the newest `keep`.

    Returns:
        '' or, where it could not be written, why; earlier checkpoints are untouched then.
    """
    final = folder / f"step-{state['step']}"
    staging = final.with_name(final.name + UNFINISHED)
    error = ""
    if world.is_main:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as failure:
            error = str(failure)
    if error := str(from_main(error)):
        return error
    try:
        with warnings.catch_warnings():  # a single process has no process group, which torch finds worth a warning
            warnings.simplefilter("ignore")
            dcp.save(tensors, checkpoint_id=staging, no_dist=world.size == 1)
    except Exception as failure:  # dcp wraps what went wrong on any rank in a type of its own
        error = _root_cause(failure)
    if not any(same_on_all(error)) and world.is_main:
        try:
            _seal(staging, state)
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            _flush(folder)
        except OSError as failure:
            error = str(failure)
    error = next(filter(None, same_on_all(error)), "")
    if world.is_main:
        if error:
            shutil.rmtree(staging, ignore_errors=True)
        else:
            for old in numbered(folder)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
    barrier()
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
        complete = json.loads(mark.read_text(encoding="utf-8"))
        hashes, state = complete["sha256"], complete["state"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            _("{path} is not a whole checkpoint: {file} is missing or broken.", path=path, file=COMPLETE)
        ) from None
    for name, digest in hashes.items():
        file = path / name
        if not file.is_file():
            raise UserError(_("The checkpoint {path} is not whole: {file} is missing.", path=path, file=name))
        if _sha256(file) != digest:
            raise UserError(_("The checkpoint {path} is damaged: {file} has changed.", path=path, file=name))
    return Checkpoint(path, state)


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, dict[str, Any]], world: World) -> None:
    """Fill `tensors` (see run_tensors) in place from a checkpoint.

    Raises:
        UserError: the checkpoint holds other tensors than the run has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=checkpoint.path, no_dist=world.size == 1)
    except Exception as failure:  # dcp has no common type for a missing key or another shape
        raise UserError(
            _(
                "The checkpoint {path} belongs to another model or adapter: {error}",
                path=checkpoint.path,
                error=_root_cause(failure),
            )
        ) from failure


def size_of(tensors: dict[str, dict[str, Any]]) -> int:
    """Bytes that a checkpoint of these tensors takes."""
    return sum(t.nbytes for group in tensors.values() for t in group.values() if isinstance(t, torch.Tensor))


def numbered(folder: Path) -> list[Path]:
    """The folders step-N, newest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _seal(folder: Path, state: dict[str, Any]) -> None:
    hashes = {}
    for file in sorted(folder.iterdir()):
        _flush(file)
        hashes[file.name] = _sha256(file)
    mark = folder / COMPLETE
    mark.write_text(json.dumps({"state": state, "sha256": hashes}, indent=1) + "\n", encoding="utf-8")
    _flush(mark)
    _flush(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file's or folder's content has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _root_cause(failure: BaseException) -> str:
    """The innermost message of an exception, in one line."""
    nested = getattr(failure, "failures", None)  # dcp's CheckpointException: rank -> (exception, traceback)
    if nested:
        failure = next(iter(nested.values()))[0]
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return str(failure).strip().split("\n")[0] or type(failure).__name__
