"""Kill real runs at random instants, again and again, and compare with the run that was never killed.

    python tests/soak_resume.py --kills 200        # an hour on two cores; `make soak` runs it
    python tests/soak_resume.py --kills 6 --seed 7

Every case is a torchrun of llama_finetuning.py on a small random model: LoRA, int8 LoRA or full fine-tuning, one or two
processes, whole or sharded. `kill -9` hits torchrun with its workers, or one worker alone, at a random moment; the same
command then goes on. Exact = every step's loss in metrics.jsonl and the hash of the final weights equal the unkilled
run's. The table it prints goes into docs/reliability.md.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.command_runs import free_port  # noqa: E402
from helpers.environment import ENVIRONMENT  # noqa: E402
from helpers.tiny_models import make_model  # noqa: E402

STEPS, SAVE_STEPS = 24, 3
METHODS = {
    "LoRA": ["--use_peft", "--lora_config.target_modules", "all-linear"],
    "int8 LoRA": ["--use_peft", "--quantization"],
    "full": [],
}
METHODS |= {f"{method}, FSDP": [*METHODS[method], "--enable_fsdp"] for method in ("LoRA", "full")}
CASES = [(method, processes) for method in METHODS for processes in (1, 2) if processes == 2 or "FSDP" not in method]


@dataclasses.dataclass
class Tally:
    """What came of the kills of one kind of run."""

    runs: int = 0
    kills: int = 0
    resumed: int = 0
    repeated_steps: int = 0
    exact: int = 0


def main() -> None:
    """Run cases until enough kills have happened; print the table; exit with 1 if any run was not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, data = make_model(work / "model"), make_data(work / "data.json")
        references = {case: reference(work, model, data, *case) for case in CASES}
        tallies = {case: Tally() for case in CASES}
        while sum(tally.kills for tally in tallies.values()) < arguments.kills:
            case = CASES[sum(tally.runs for tally in tallies.values()) % len(CASES)]
            one_run(work, model, data, case, references[case], tallies[case], chance)
            print_table(tallies, file=sys.stderr)
    print_table(tallies)
    if any(tally.exact < tally.runs for tally in tallies.values()):
        sys.exit(1)


def make_data(path: Path) -> Path:
    """200 short records."""
    records = [
        {"instruction": f"请说出第{number}个数字。", "input": "", "output": f"是{number}。" * (1 + number % 5)}
        for number in range(200)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def start(model: Path, data: Path, method: str, processes: int, output: Path) -> subprocess.Popen:
    """Start a run, or go on with it."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
    settings = {
        "model_name": model,
        "alpaca_dataset.data_path": data,
        "output_dir": output,
        "batch_size_training": 8 // processes,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "lr": 1e-3,
        "val_set_size": 10,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    log = output.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, *launcher, "--master_port", str(free_port()), "llama_finetuning.py", *flags, *METHODS[method]],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


def reference(work: Path, model: Path, data: Path, method: str, processes: int) -> tuple[dict[int, float], str]:
    """Losses and weights of the run that is never killed."""
    output = work / f"reference-{method.replace(' ', '-')}-{processes}"
    if start(model, data, method, processes, output).wait():
        sys.exit(output.with_suffix(".log").read_text()[-2000:])
    return losses(output), weights_hash(output)


def one_run(
    work: Path,
    model: Path,
    data: Path,
    case: tuple[str, int],
    expected: tuple[dict[int, float], str],
    tally: Tally,
    chance: random.Random,
) -> None:
    """A run that is killed at two random steps and goes on each time."""
    output = work / f"run-{case[0].replace(' ', '-')}-{case[1]}-{tally.runs}"
    for kill_at in sorted(chance.sample(range(2, STEPS - 1), 2)):
        process = start(model, data, *case, output)
        kill_when(process, output, kill_at, chance)
        tally.kills += 1
        reached = max(losses(output), default=0)
        checkpoint = max((int(p.name[5:]) for p in (output / "checkpoints").glob("step-*[0-9]")), default=0)
        tally.resumed += checkpoint > 0
        tally.repeated_steps += reached - checkpoint
    status = start(model, data, *case, output).wait()
    tally.runs += 1
    exact = status == 0 and (losses(output), weights_hash(output)) == expected
    tally.exact += exact
    if not exact:
        print(output.with_suffix(".log").read_text()[-3000:], file=sys.stderr)


def kill_when(process: subprocess.Popen, output: Path, step: int, chance: random.Random) -> None:
    """SIGKILL, shortly after a step: torchrun and all its workers, or (then torchrun ends by itself) one worker."""
    while process.poll() is None and max(losses(output), default=0) < step:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    victims = descendants(process.pid)
    if chance.random() < 0.25 and len(victims) > 1:
        victims = [chance.choice(victims[1:])]
    for victim in reversed(victims):
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """A process and all that it started, itself first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def losses(output: Path) -> dict[int, float]:
    """Step -> training loss, as metrics.jsonl has it now."""
    try:
        lines = (output / "metrics.jsonl").read_text().split("\n")
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "train_loss" in entry:
            found[entry["step"]] = entry["train_loss"]
    return found


def weights_hash(output: Path) -> str:
    """SHA-256 of the weights that the run handed over."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (output / name).exists():
            return hashlib.sha256((output / name).read_bytes()).hexdigest()
    return ""


def print_table(tallies: dict[tuple[str, int], Tally], file: object = None) -> None:
    """The counts so far, in Markdown."""
    print("| method | processes | runs | kills | resumed | steps repeated a kill | exact |", file=file)
    print("| --- | --- | --- | --- | --- | --- | --- |", file=file)
    for (method, processes), tally in tallies.items():
        repeated = f"{tally.repeated_steps / tally.kills:.1f}" if tally.kills else "-"
        counts = f"{tally.runs} | {tally.kills} | {tally.resumed} | {repeated} | {tally.exact} of {tally.runs}"
        print(f"| {method} | {processes} | {counts} |", file=file)
    runs, kills = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("runs", "kills"))
    exact = sum(tally.exact for tally in tallies.values())
    print(f"| all | | {runs} | {kills} | | | {exact} of {runs} |", file=file, flush=True)


if __name__ == "__main__":
    main()
