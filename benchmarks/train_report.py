"""What benchmarks/train.py found, as a table and a chart."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OURS = "this project"
PEERS = {"unsloth": "Unsloth", "trl": "TRL", "padded": "padded PEFT loop"}
COLOURS = dict(zip((OURS, *PEERS.values()), ("#1f5fa8", "#c8553d", "#e0a458", "#9aa5b1"), strict=True))
PACKAGES = "torch transformers peft bitsandbytes trl unsloth liger_kernel xformers".split()
BEGIN, END = "<!-- benchmarks/train.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        tokens: useful tokens of the timed steps.
        seconds: how long these took, by this program's clock.
        said: tokens/s by the run's own metrics.jsonl; 0 = it does not say.
        peak_gb: most memory allocated, GB; 0 on a CPU.
        first_step: seconds from the start of the program to the end of its first step.
        first_loss: of the first step.
        note: why there are no figures, or what is unusual.
    """

    tokens: int = 0
    seconds: float = 0.0
    said: float = 0.0
    peak_gb: float = 0.0
    first_step: float = 0.0
    first_loss: float | None = None
    note: str = ""

    @property
    def speed(self) -> float:
        """Useful tokens a second; 0 = it did not run."""
        return self.tokens / self.seconds if self.seconds else 0.0


def table(results: dict[str, dict[str, Result]]) -> str:
    """Case -> who -> result, as Markdown."""
    rows = [
        f"| case | who | useful tokens/s | {OURS} is | peak GB | first step after s | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, runs in results.items():
        for who, result in runs.items():
            if not result.speed:
                rows.append(f"| {case} | {who} | - | - | - | - | {who}: {result.note} |")
                continue
            ratio = "" if who == OURS else f"{runs[OURS].speed / result.speed:.2f} x" if runs[OURS].speed else "-"
            peak = f"{result.peak_gb:.1f}" if result.peak_gb else "-"
            figures = f"{result.speed:,.0f} | {ratio} | {peak} | {result.first_step:.1f} | {result.note}"
            rows.append(f"| {case} | {who} | {figures} |")
    return "\n".join(rows)


def chart(results: dict[str, dict[str, Result]], path: Path, title: str) -> None:
    """Bars of useful tokens/s, a group a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in (OURS, *PEERS.values()) if any(name in r and r[name].speed for r in results.values())]
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.8 * len(results)), layout="constrained")
    height = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        speeds = [runs[name].speed if name in runs else 0.0 for runs in results.values()]
        positions = [index + height * place for index in range(len(results))]
        axes.barh(positions, speeds, height=height, label=name, color=COLOURS[name])
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(results))], list(results))
    axes.invert_yaxis()
    axes.set(xlabel="useful tokens/s", title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(path: Path, text: str) -> None:
    """Put `text` between the marks of a file, or, where it has none, in its place."""
    before, begin, rest = (path.read_text(encoding="utf-8") if path.is_file() else "").partition(BEGIN)
    after = rest.partition(END)[2] if begin else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before if begin else ''}{BEGIN}\n\n{text}\n\n{END}{after or chr(10)}", encoding="utf-8")


def machine() -> str:
    """The card, or the CPU and its cores."""
    # Asked in another process: a CUDA context in this one would take memory from the runs.
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    card = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    return card or f"CPU ({platform.machine()}, {os.cpu_count()} cores), fp32"


def versions() -> str:
    """Names and versions of what took part."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])
