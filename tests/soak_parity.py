"""Every way to share a run out among one, two and four processes, and every way to go on with it in another.

    python tests/soak_parity.py        # 245 runs, a quarter of an hour on two cores; `make soak` runs it

Real processes (gloo) train a small random model: alone, data parallel, FSDP, hybrid sharded. A run is right when its
losses are those of one process (1e-5, relative) and its weights too (2e-4), and when its last checkpoint, converted,
holds the weights that it saved, bit for bit. The table goes into docs/reliability.md.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.runs_together import Case, Result, run_all  # noqa: E402
from helpers.tiny_models import make_model  # noqa: E402
from soak_resume import make_data  # noqa: E402

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 2e-4
MIDDLE = 3
RUN = f"--max_steps 6 --save_steps {MIDDLE} --save_minutes 0 --keep_checkpoints 9 --lr 1e-3 --val_set_size 10"
METHODS = {
    "full": "",
    "full, layers frozen": "--freeze_layers",
    "LoRA": "--use_peft --lora_config.target_modules all-linear",
    "int8 LoRA": "--use_peft --quantization",
    "NF4 LoRA": "--use_peft --quantization 4bit",
}
HYBRID = "--enable_fsdp --fsdp_config.sharding_strategy HYBRID_SHARD --fsdp_config.sharding_group_size 2"
WAYS = {
    "1": (1, ""),
    "DDP 2": (2, ""),
    "DDP 4": (4, ""),
    "FSDP 1": (1, "--enable_fsdp"),
    "FSDP 2": (2, "--enable_fsdp"),
    "FSDP 4": (4, "--enable_fsdp --fsdp_config.fsdp_activation_checkpointing"),
    "hybrid 4": (4, HYBRID),
}


def cases_of(method: str) -> list[Case]:
    """Each way from the beginning, then each going on in each other from the middle."""
    flags = f"{RUN} {METHODS[method]} "
    whole = [Case(f"{method}: {way}", count, flags + more) for way, (count, more) in WAYS.items()]
    resumed = [
        Case(f"{method}: {old} -> {new}", WAYS[new][0], flags + WAYS[new][1], (f"{method}: {old}", MIDDLE))
        for old in WAYS
        for new in WAYS
        if new != old
    ]
    return whole + resumed


def compare(run: Result, one: Result) -> tuple[float, float]:
    """Largest difference of losses (relative) and of weights; infinite where they can't be compared."""
    if any(run.errors) or len(run.losses) != len(one.losses) or run.weights.keys() != one.weights.keys():
        return float("inf"), float("inf")
    pairs = zip(run.losses + run.eval_losses, one.losses + one.eval_losses, strict=True)
    weights = (float((run.weights[name] - weight).abs().max()) for name, weight in one.weights.items())
    return max(abs(a - b) / b for a, b in pairs), max(weights)


def is_converted_alike(output: Path, model: Path) -> bool:
    """Whether the run's last checkpoint, converted, is what the run saved."""
    from utils.model.folder import ModelFolder
    from utils.results.consolidating import consolidate
    from utils.runs.checkpoint import newest_whole

    checkpoint, _broken = newest_whole(output / "checkpoints")
    converted = output.with_name(output.name + " converted")
    consolidate(checkpoint, ModelFolder(model), converted)
    files = list(converted.glob("*.safetensors"))
    return bool(files) and all(file.read_bytes() == (output / file.name).read_bytes() for file in files)


def main() -> None:
    """Run all; print the table; exit with 1 if any run was not right."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    right = True
    print("| method | processes | runs | worst loss difference | worst weight difference | converted bit for bit |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        model = make_model(work / "model", kv_heads=2, tie_word_embeddings=True, attention_bias=True)
        data = make_data(work / "data.json")
        for number, method in enumerate(METHODS):
            folder = work / str(number)
            cases = cases_of(method)
            results = run_all(cases, model, data, folder)
            one = results[f"{method}: 1"]
            for error in filter(None, (error for result in results.values() for error in result.errors)):
                print(error, file=sys.stderr)
            rows = {way: [f"{method}: {way}"] for way in WAYS}
            rows["going on with other processes"] = [case.name for case in cases if case.goes_on]
            for row, names in rows.items():
                differences = [compare(results[name], one) for name in names]
                loss, weight = (max(column) for column in zip(*differences, strict=True))
                converted = sum(is_converted_alike(folder / name, model) for name in names)
                print(
                    f"| {method} | {row} | {len(names)} | {loss:.1e} | {weight:.1e} | {converted} of {len(names)} |",
                    flush=True,
                )
                right &= loss <= LOSS_TOLERANCE and weight <= WEIGHT_TOLERANCE and converted == len(names)
    sys.exit(not right)


if __name__ == "__main__":
    main()
