"""What reaches the disk, in order: the promise that a power cut at any instant leaves whole files."""

import os
import shutil
from pathlib import Path

import pytest


class DiskRecord:
    """What is flushed, renamed and removed below a folder, from now on.

    Attributes:
        events: one line each, in order, with paths relative to the folder.
        flushed: what each file held when it was flushed last, by its name then.
        fsync: os.fsync, noted.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.events, self.flushed = root, [], {}
        fsync, replace, rename, unlink, rmtree = os.fsync, os.replace, os.rename, os.unlink, shutil.rmtree

        def flush(handle) -> None:
            handle = handle if isinstance(handle, int) else handle.fileno()
            path = Path(f"/proc/self/fd/{handle}").readlink()
            self._note("flush", path)
            if path.is_file():
                self.flushed[self._name(path)] = path.read_bytes()
            fsync(handle)

        def move(original):
            def moved(source, destination, **more) -> None:
                self._note("rename", source, destination)
                original(source, destination, **more)

            return moved

        def remove(original):
            def removed(path, *arguments, **more) -> None:
                if Path(path).is_absolute() and Path(path).exists():  # rmtree's own are relative to a folder
                    self._note("remove", path)
                original(path, *arguments, **more)

            return removed

        self.fsync = flush
        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "replace", move(replace))
        monkeypatch.setattr(os, "rename", move(rename))
        monkeypatch.setattr(os, "unlink", remove(unlink))
        monkeypatch.setattr(shutil, "rmtree", remove(rmtree))

    def _name(self, path: object) -> str:
        return str(Path(str(path)).relative_to(self.root))

    def _note(self, what: str, *paths: object) -> None:
        if all(Path(str(path)).is_relative_to(self.root) for path in paths):
            self.events.append(f"{what} {' -> '.join(map(self._name, paths))}")
