"""What a run tells: metrics.jsonl for programs, a progress bar or plain lines for people, a picture of the losses."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from configs.messages import _

METRICS = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
LINE_EVERY_SECONDS = 10.0


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


def draw_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = train_losses(folder)
    held_out = [(line["step"], line["eval_loss"]) for line in read_metrics(folder) if line.get("eval_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    if train:
        steps, losses = tuple(train), tuple(train.values())
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training, each step")
        axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c8553d", marker="o", linewidth=2, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss a response token")
    axes.set_title(folder.resolve().name, parse_math=False)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / LOSS_PICTURE, dpi=120)
    pyplot.close(figure)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average without a bias at the start."""
    average = weight = 0.0
    smoothed = []
    for value in values:
        average, weight = 0.9 * average + 0.1 * value, 0.9 * weight + 0.1
        smoothed.append(average / weight)
    return smoothed


class Progress:
    """How far the run is: a bar on a terminal, a plain line now and then in a log file.

    Args:
        total: optimizer steps of the whole run.
        done: steps that were done before this start.
    """

    def __init__(self, total: int, done: int, is_main: bool) -> None:
        self.total, self.first, self.is_main = total, done, is_main
        self.start = time.monotonic()
        self.last_line = 0.0
        self.bar = None
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step", smoothing=0.1)

    def update(self, done: int, loss: float, tokens_per_second: float, memory_gb: float) -> None:
        """Report that `done` steps of the run are done."""
        if self.bar is not None:
            memory = f", {memory_gb:.1f} GB" if memory_gb else ""
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:.0f} tok/s{memory}", refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.is_main:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_SECONDS or done == self.total:
                self.last_line = now
                left = (now - self.start) / max(1, done - self.first) * (self.total - done)
                self.say(
                    _(
                        "step {done}/{total}  loss {loss}  {speed} tokens/s  {memory}{left} left",
                        done=done,
                        total=self.total,
                        loss=f"{loss:.4f}",
                        speed=f"{tokens_per_second:.0f}",
                        memory=f"{memory_gb:.1f} GB  " if memory_gb else "",
                        left=duration(left),
                    )
                )

    def say(self, message: str) -> None:
        """Print a message without tearing the bar."""
        if not self.is_main:
            return
        with contextlib.suppress(BrokenPipeError):  # whoever listened is gone; the run goes on
            if self.bar is not None:
                self.bar.write(message, file=sys.stdout)
            else:
                print(message, flush=True)

    def close(self) -> None:
        """Finish the bar's line."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """A time span as a person writes it: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
