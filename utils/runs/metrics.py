"""metrics.jsonl: a run's figures, step by step, for programs and for the picture of the losses."""

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl: one object an optimizer step, one an evaluation.

    Args:
        folder: the run's output folder.
        is_main: whether this process writes.
        done: steps that the run goes on from; later lines, of steps that will be repeated, are cut off.
    """

    def __init__(self, folder: Path, is_main: bool, done: int) -> None:
        self.path = folder / METRICS
        self.file = None
        if is_main:
            kept = [line for line in read_metrics(folder) if line["step"] <= done]
            staging = self.path.with_suffix(".new")
            staging.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            staging.replace(self.path)
            self.file = self.path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl; a last line that was cut short by a kill is left out."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def train_losses(folder: Path) -> dict[int, float]:
    """Step -> training loss, of the steps whose loss was finite, in order."""
    lines = read_metrics(folder)
    return {line["step"]: line["train_loss"] for line in lines if line.get("train_loss") is not None}
