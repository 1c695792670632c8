"""loss.png: a run's losses as a picture."""

from pathlib import Path

from matplotlib.figure import Figure  # pyplot would choose how a notebook draws

from utils.runs.metrics import read_metrics, train_losses

LOSS_PICTURE = "loss.png"


def draw_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl."""
    train = train_losses(folder)
    held_out = [(line["step"], line["eval_loss"]) for line in read_metrics(folder) if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
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


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average without a bias at the start."""
    average = weight = 0.0
    smoothed = []
    for value in values:
        average, weight = 0.9 * average + 0.1 * value, 0.9 * weight + 0.1
        smoothed.append(average / weight)
    return smoothed
