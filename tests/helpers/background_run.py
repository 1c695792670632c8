"""A training run in the background, for tests that watch it, freeze it and kill it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.environment import ENVIRONMENT, ROOT

NODES_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What the README tells to set for several nodes; it changes nothing for one."""


class BackgroundRun:
    """A torchrun that can be watched, frozen and killed, its workers included."""

    def __init__(self, flags: list[str], log: Path, launcher: list[str], cwd: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "llama_finetuning.py"), *flags]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=ENVIRONMENT | NODES_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    def tree(self) -> list[int]:
        """torchrun and all that descends from it; workers live in sessions of their own."""
        parents = self._parents()
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def workers(self) -> list[int]:
        """torchrun's own children, in the order of ranks."""
        return sorted(child for child, parent in self._parents().items() if parent == self.process.pid)

    @staticmethod
    def _parents() -> dict[int, int]:
        """Every process's parent."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return parents

    def send(self, signum: int) -> list[int]:
        """Send a signal to every process of the run."""
        pids = self.tree()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        return pids

    def interrupt(self, signum: int) -> None:
        """A frozen run goes on, torchrun having got a signal as from a terminal and passed it on to its workers."""
        workers = self.workers()
        for sent in (signum, signal.SIGCONT):
            self.process.send_signal(sent)
        deadline = time.monotonic() + 10  # torchrun kills in 30 what does not end
        while time.monotonic() < deadline and not all(self._awaits(pid, signum) for pid in workers):
            time.sleep(0.005)
        self.send(signal.SIGCONT)

    @staticmethod
    def _awaits(pid: int, signum: int) -> bool:
        """Whether a frozen process will get this signal as soon as it goes on; one that is gone needs none."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            (pending,) = re.findall(r"^ShdPnd:\t(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            return bool(int(pending, 16) >> signum - 1 & 1)
        return True

    def wait_for_step(self, output: Path, step: int) -> None:
        """Freeze the run as soon as it has done so many steps."""
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for line in self._whole_lines(output)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)
        self.send(signal.SIGSTOP)

    @staticmethod
    def _whole_lines(output: Path) -> list[dict]:
        path = output / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def kill(self) -> None:
        """kill -9 for all at once."""
        if self.process.poll() is None:
            self.send(signal.SIGSTOP)
            self.send(signal.SIGKILL)
            self.process.wait(30)
