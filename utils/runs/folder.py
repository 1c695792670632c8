"""The output folder of a run: held by one run at a time; what an old run left is moved aside, never deleted."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from configs.errors import UserError
from configs.messages import _
from utils.runs.checkpoint import Checkpoint, numbered

LOCK = ".lock"

WAIT_FOR_LOCK_SECONDS = 15

RUN_FILES = (
    "adapter_*",
    "training_config.json",
    "metrics.jsonl",
    "loss.png",
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "special_tokens_map.json",
)
"""What a run writes into its output folder, beside checkpoints."""


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Create a run's output folder where needed, and keep other runs out of it until this one ends.

    Raises:
        UserError: the folder can't be written, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            _(
                "The output folder {folder} can't be written ({error}). Give another one with --output_dir.",
                folder=folder,
                error=error.strerror,
            )
        ) from error
    try:
        _lock(handle, folder)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    # The workers of a run that was just killed need a moment to notice it.
    deadline = time.monotonic() + WAIT_FOR_LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                pid, host = [*os.pread(handle, 300, 0).decode(errors="replace").split(), "?", "?"][:2]
                raise UserError(
                    _(
                        "Another run (process {pid} on {host}) is writing to {folder}. Wait until it ends, end it with "
                        "`kill {pid}` there, or give another --output_dir.",
                        pid=pid,
                        host=host,
                        folder=folder,
                    )
                ) from None
            time.sleep(0.2)
        except OSError:
            return  # some network disks have no locks, and a run must be possible there as well


def move_aside(folder: Path, checkpoints: Path) -> None:
    """Make room for a new run in the folders of an old one."""
    _set_aside(folder, {item for pattern in RUN_FILES for item in folder.glob(pattern)})
    _set_aside(checkpoints, set(checkpoints.glob("step-*")))


def set_newer_aside(checkpoints: Path, chosen: Checkpoint) -> list[str]:
    """Set checkpoints newer than the chosen one aside (damaged, or not chosen): the run must not meet them again.

    Returns:
        What to tell.
    """
    newer = {path for path in numbered(checkpoints) if int(path.name.removeprefix("step-")) > chosen.step}
    _set_aside(checkpoints, newer)
    names = ", ".join(sorted(path.name for path in newer))
    return [_("Newer checkpoints are set aside in {folder}: {names}", folder=checkpoints, names=names)] if newer else []


def _set_aside(place: Path, items: set[Path]) -> None:
    """Move items of a folder into `old-DATE` within it; nothing is deleted.

    Raises:
        UserError: the folder can't be written.
    """
    aside = place / datetime.now().strftime("old-%Y%m%d-%H%M%S")
    try:
        for item in sorted(items):
            aside.mkdir(exist_ok=True)
            item.rename(aside / item.name)
    except OSError as error:
        raise UserError(
            _("{folder}: the old run can't be moved aside ({error}).", folder=place, error=error)
        ) from error
