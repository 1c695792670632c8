"""Training runs of one, two and four real processes (gloo), many after another in the same four processes.

Starting a process takes seconds, a run of a tiny model less than one: so four processes are started once, and for each
case as many of them as it asks for form a process group of their own.
"""

import contextlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing

PROCESSES = 4
GLOBAL_BATCH = 12


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        processes: how many take part.
        flags: as on the command line; model, data, batch size and output folder are added.
        goes_on: (name of an earlier case, step): resume a copy of its output folder from that step's checkpoint.
        flags_of_rank: more flags for single processes.
        instead: what to call in the place of a training run: (config, world, base model's folder).
    """

    name: str
    processes: int
    flags: str
    goes_on: tuple[str, int] | None = None
    flags_of_rank: dict[int, str] = field(default_factory=dict)
    instead: Callable | None = None


@dataclass(frozen=True)
class Result:
    """What a case left behind; `error` is the message of each process, "" where it ended well."""

    losses: list[float]
    eval_losses: list[float]
    weights: dict[str, torch.Tensor]
    errors: list[str]


def run_all(cases: list[Case], model: Path, data: Path, folder: Path) -> dict[str, Result]:
    """Run the cases in order; output folders are folder/NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(case.processes for case in cases)
    multiprocessing.spawn(_work, (cases, model, data, folder), nprocs=min(count, PROCESSES))
    return {case.name: _result(case, folder) for case in cases}


def _work(rank: int, cases: list[Case], model: Path, data: Path, folder: Path) -> None:
    with (folder / f"rank-{rank}.log").open("w") as log, contextlib.redirect_stdout(log):
        for case in cases:
            if rank < case.processes:
                _take_part(rank, case, model, data, folder)


def _take_part(rank: int, case: Case, model: Path, data: Path, folder: Path) -> None:
    from configs.command_line import parse
    from configs.errors import UserError
    from configs.training import TrainingConfig
    from ft_datasets.tokenizer import Tokenizer
    from utils.finetune import fine_tune
    from utils.machine.world import World
    from utils.model.folder import ModelFolder

    output = folder / case.name
    if case.goes_on and rank == 0:
        earlier, step = case.goes_on
        shutil.copytree(folder / earlier, output, ignore=shutil.ignore_patterns(".lock"))
        for path in (output / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
    os.environ["LOCAL_WORLD_SIZE"] = str(case.processes)
    store = dist.FileStore(str(folder / f"{case.name}.store"), case.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.processes)
    flags = ["--model_name", str(model), "--alpaca_dataset.data_path", str(data), "--output_dir", str(output)]
    flags += ["--batch_size_training", str(GLOBAL_BATCH // case.processes)]
    flags += [*case.flags.split(), *case.flags_of_rank.get(rank, "").split()]
    error = ""
    try:
        config = parse(TrainingConfig, flags)
        base = ModelFolder(config.model_name)
        world = World(rank, case.processes, [torch.device("cpu")])
        if case.instead:
            case.instead(config, world, base)
        else:
            fine_tune(config, world, base, Tokenizer(base.path))
    except UserError as refused:
        error = str(refused)
    except Exception:
        error = traceback.format_exc()
    (folder / f"{case.name}.error-{rank}").write_text(error)
    dist.barrier()
    dist.destroy_process_group()


def _result(case: Case, folder: Path) -> Result:
    errors = [(folder / f"{case.name}.error-{rank}").read_text() for rank in range(case.processes)]
    output = folder / case.name
    metrics = output / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        weights |= load_file(file)
    return Result(
        [line["train_loss"] for line in lines if "train_loss" in line],
        [line["eval_loss"] for line in lines if "eval_loss" in line],
        weights,
        errors,
    )
