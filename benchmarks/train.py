"""Training speed and memory of this project beside its peers: same machine, same data, one call.

    python benchmarks/train.py --make_model tiny --cases bf16 int8 --steps 6 --batch 8       # a CPU, a minute
    python benchmarks/train.py --make_model 7b --tokenizer tokenizer.model --data data.json  # a GPU: all cases
    python benchmarks/train.py --model models/NousResearch/Llama-2-7b-hf --cases nf4 --peers unsloth

Each run is a process of its own: ours is llama_finetuning.py as a user starts it, the peers are in train_peers.py. All
of them append a line to metrics.jsonl when a step is done; this program watches the file with its own clock. Useful
tokens/s = tokens without padding over the time from the last step of the warm-up to the last step. The table and a
chart go to --output, between two marks where it has them.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.make_model import SHAPES, write_long_data
from benchmarks.train_peers import ALL_LINEAR, Run
from benchmarks.train_report import OURS, PEERS, Result, chart, machine, table, versions, write_report

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.1
"""How far metrics.jsonl may be from the stopwatch."""


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        run: the settings, without model, data and output.
        more: further flags of llama_finetuning.py.
        shape: the model that it takes where models are made; '' = the one that is asked for.
    """

    run: Run
    more: list[str] = field(default_factory=list)
    shape: str = ""


def cases() -> dict[str, Case]:
    """All cases by name."""
    # For every new row length the matrix library looks for kernels, so the first steps are slow ones.
    lora = Run("", "", "", None, ALL_LINEAR, batch=45, steps=40, warm_up=10)
    compiled = ["--torch_compile", "true"]
    readme = replace(lora, quantization="8bit", targets=["q_proj", "v_proj"], fp16=True, batch=40)
    return {
        "bf16": Case(lora, compiled),
        "int8": Case(replace(lora, quantization="8bit"), compiled),
        "nf4": Case(replace(lora, quantization="4bit"), compiled),
        "nf4-9gb": Case(replace(lora, quantization="4bit", gpu_memory_gb=9, checkpointing=True), compiled),
        "readme-16gb": Case(replace(readme, gpu_memory_gb=16, checkpointing=True), compiled),
        "long-16k": Case(
            replace(
                lora,
                quantization="4bit",
                gpu_memory_gb=24,
                max_seq_length=16_384,
                batch=1,
                steps=6,
                warm_up=2,
                checkpointing=True,
            ),
            compiled,
        ),
        "full-1b": Case(replace(lora, targets=[], full=True), compiled, shape="1b"),
        "first-step": Case(replace(lora, steps=3, warm_up=1), compiled),
    }


def our_command(case: Case) -> list[str]:
    """llama_finetuning.py with the case's settings; nothing is written but metrics and one checkpoint at the end."""
    run = case.run
    flags = {
        "model_name": run.model,
        "alpaca_dataset.data_path": run.data,
        "output_dir": run.output,
        "max_seq_length": run.max_seq_length,
        "batch_size_training": run.batch,
        "max_steps": run.steps,
        "num_epochs": 1_000_000,
        "scheduler": "constant",
        "run_validation": False,
        "save_minutes": 0,
        "save_model": False,
        "save_optimizer": False,
        "keep_checkpoints": 1,
    }
    if not run.full:
        flags |= {"use_peft": True, "lora_config.target_modules": ",".join(run.targets)}
    optional = {"quantization": run.quantization, "use_fp16": run.fp16, "gpu_memory_gb": run.gpu_memory_gb}
    flags |= {name: value for name, value in optional.items() if value}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "llama_finetuning.py", *words, *case.more]


def peer_command(name: str, run: Run) -> list[str]:
    """A peer with the case's settings."""
    settings = Path(run.output) / "run.json"
    settings.write_text(json.dumps(asdict(run)), encoding="utf-8")
    return [sys.executable, "benchmarks/train_peers.py", name, str(settings)]


def measure(command: list[str], run: Run, timeout: float) -> Result:
    """Start a run and time the steps that appear in its metrics.jsonl."""
    folder = Path(run.output)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],  # one card for everybody
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    lines, times = [], []
    with (folder / "log").open("w") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for line in follow(folder / "metrics.jsonl", process, began + timeout):
                times.append(time.monotonic())
                lines.append(json.loads(line))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode or len(lines) < run.steps:
        text = (folder / "log").read_text(errors="replace")
        print(text[-3000:], file=sys.stderr)  # the folder goes with the next run
        return Result(note=why_it_failed(text, process.returncode))
    timed = lines[run.warm_up : run.steps]
    tokens = sum(line["tokens"] for line in timed)
    own = sum(line["tokens"] / line["tokens_per_second"] for line in timed if "tokens_per_second" in line)
    return Result(
        tokens=tokens,
        seconds=times[run.steps - 1] - times[run.warm_up - 1],
        said=tokens / own if own else 0.0,
        peak_gb=max(line.get("max_memory_gb", 0.0) for line in lines),
        first_step=times[0] - began,
        first_loss=lines[0]["train_loss"],
    )


def follow(path: Path, process: subprocess.Popen, deadline: float) -> Iterator[str]:
    """The lines of a file as they are written, until the process ends or the time is over."""
    file, text, ended = None, "", False
    while not ended and time.monotonic() < deadline:
        ended = process.poll() is not None
        if file is None and path.exists():
            file = path.open(encoding="utf-8")
        if file is not None:
            text += file.read()
            *whole, text = text.split("\n")
            yield from whole
        time.sleep(0.002)
    if file is not None:
        file.close()


def why_it_failed(log: str, status: int) -> str:
    """A word on a run that gave no figures."""
    if "out of memory" in log.lower() or "memory does not suffice" in log:
        return "out of memory"
    if status == -signal.SIGKILL:
        return "took too long, or was killed"
    last = [line for line in log.splitlines() if line.strip()][-1:] or ["no output"]
    return f"failed: {last[0].strip()[:120]}"


def run_peer(name: str, run: Run, timeout: float) -> Result:
    """A peer, its step cut into more and more micro-batches until it fits into memory."""
    if name != "padded" and find_spec(name) is None:
        return Result(note="not installed")
    result = Result()
    while True:
        fresh(run.output)
        result = measure(peer_command(name, run), run, timeout)
        if result.note != "out of memory" or run.parts >= run.batch:
            break
        run = replace(run, parts=run.parts * 2)
    if result.speed:
        unusual = [f"{run.parts} micro-batches"] * (run.parts > 1) + ["layers recompute"] * run.checkpointing
        result = replace(result, note=", ".join(unusual))
    return result


def run_ours(case: Case, timeout: float) -> Result:
    """This project, and whether it tells its own speed rightly."""
    fresh(case.run.output)
    result = measure(our_command(case), case.run, timeout)
    if result.speed and abs(result.said / result.speed - 1) > LIMIT:
        result = replace(result, note=f"metrics.jsonl says {result.said:,.0f} tokens/s")
    return result


def fresh(folder: str) -> None:
    """An empty folder in the place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)


def options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--make_model", choices=list(SHAPES), help="random weights in Llama's shape")
    model.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model of a made model; needed but for tiny")
    parser.add_argument("--data", type=Path, default=ROOT / "ft_datasets/alpaca_data.json", help="Alpaca JSON")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()), metavar="CASE")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    for name in "steps warm_up batch max_seq_length".split():
        parser.add_argument(f"--{name}", type=int, help="instead of the cases' own")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further flags of llama_finetuning.py")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a run may take")
    parser.add_argument("--work", type=Path, default=ROOT / "output/benchmark", help="folder for models and runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks.md", help="file for the table")
    chosen = parser.parse_args(argv)
    if chosen.make_model not in (None, "tiny") and not chosen.tokenizer:
        parser.error(f"--make_model {chosen.make_model} needs --tokenizer")
    return chosen


def prepared(case: Case, name: str, chosen: argparse.Namespace) -> Case:
    """A case with its model, its data, and what the command line changes of it."""
    changes = {key: getattr(chosen, key) for key in "steps warm_up batch max_seq_length".split()}
    run = replace(case.run, **{key: value for key, value in changes.items() if value is not None})
    run = replace(run, warm_up=min(run.warm_up, run.steps - 1))
    model, data = chosen.model, chosen.data.resolve()
    if model is None:
        shape = case.shape if case.shape and chosen.make_model != "tiny" else chosen.make_model
        model = chosen.work / f"model-{shape}"
        # In another process: what CUDA has once taken, a process keeps.
        more = [str(chosen.tokenizer.resolve())] if chosen.tokenizer else []
        command = [sys.executable, "-m", "benchmarks.make_model", shape, str(model.resolve()), str(data), *more]
        subprocess.run(command, cwd=ROOT, check=True)
    if name == "long-16k":
        count = run.batch * (run.steps + 1)
        data = write_long_data(data, model, run.max_seq_length, count, chosen.work / "long.json")
    run = replace(
        run, model=str(model.resolve()), data=str(data.resolve()), output=str((chosen.work / "run").resolve())
    )
    return replace(case, run=run, more=[*case.more, *chosen.more])


def main(argv: list[str]) -> dict[str, dict[str, Result]]:
    """Run everything, and write table and chart after each case; returns case -> who -> result."""
    chosen = options(argv)
    results: dict[str, dict[str, Result]] = {}
    where = machine()
    model = chosen.model or f"random weights, {chosen.make_model}"
    heading = f"{where}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}. {versions()}. "
    heading += f"Model: {model}; data: {chosen.data.name}."
    picture = chosen.output.with_name(f"{chosen.output.stem}-training.png")
    for name in chosen.cases:
        case = prepared(cases()[name], name, chosen)
        results[name] = runs = {OURS: run_ours(case, chosen.timeout)}
        for peer in chosen.peers:
            runs[PEERS[peer]] = run_peer(peer, case.run, chosen.timeout)
        print(table({name: runs}), flush=True)
        write_report(chosen.output, f"{heading}\n\n{table(results)}\n\n![useful tokens/s]({picture.name})")
        chart(results, picture, where)
    shutil.rmtree(chosen.work / "run", ignore_errors=True)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
