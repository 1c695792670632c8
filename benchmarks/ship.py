"""What shipping a tuned model takes: QLoRA, merging with its proof, GGUF; seconds, memory and errors of each.

    python -m benchmarks.ship                                             # a tiny model, on a CPU, a minute
    python -m benchmarks.ship --make_model 7b --tokenizer tokenizer.model --data data.json
    python -m benchmarks.ship --model models/NousResearch/Llama-2-7b-hf

Each stage is a process of its own, started as a user starts it; its memory is the most that the process held.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.make_model import SHAPES, make_model
from benchmarks.train_report import machine, versions

MERGE = "inference/hf-text-generation-inference/merge_lora_weights.py"


def main() -> None:
    """Run the stages one after another; print a table in Markdown, and what each said last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make_model", choices=SHAPES, default="tiny")
    parser.add_argument("--model", type=Path, help="a folder, in the place of a made one")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model for the made one; left out: one is learnt")
    parser.add_argument("--data", type=Path, default=Path("ft_datasets/alpaca_data.json"))
    parser.add_argument("--work", type=Path, default=Path("output/ship"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--gguf_types", nargs="*", default=["f16", "q8_0"])
    parser.add_argument("--merge_flags", default="", help="more flags of merging")
    arguments = parser.parse_args()
    work, model = arguments.work, arguments.model or arguments.work / arguments.make_model
    if arguments.model is None:
        make_model(arguments.make_model, model, arguments.data, arguments.tokenizer)

    adapter, merged = work / "adapter", work / "merged"
    for earlier in (merged, *work.glob("gguf-*")):
        shutil.rmtree(earlier, ignore_errors=True)
    tune = (
        f"llama_finetuning.py --model_name {model} --alpaca_dataset.data_path {arguments.data} --output_dir {adapter} "
        f"--use_peft --quantization 4bit --lora_config.target_modules all-linear --max_steps {arguments.steps} "
        "--batch_size_training 45 --max_seq_length 512 --lr 1e-3 --save_minutes 0 --resume none"
    )
    merge = f"{MERGE} --base_model {model} --peft_model {adapter} --output_dir {merged} {arguments.merge_flags}"
    stages = {f"QLoRA, {arguments.steps} steps": tune, "merging, with its proof": merge}
    for kind in arguments.gguf_types:
        out = work / f"gguf-{kind}"
        stages[f"GGUF, {kind}"] = (
            f"{MERGE} --base_model {merged} --peft_model '' --output_dir {out} --format gguf --gguf_type {kind}"
        )
    rows = [run(name, command) for name, command in stages.items()]
    print(f"{machine()}; {versions()}\n\n| stage | seconds | GB of main memory |\n| --- | --- | --- |")
    for row in rows:
        print(row)
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    del report["likeliest_next_token"]  # prompt by prompt
    print("\n" + json.dumps(report, ensure_ascii=False, indent=1))


def run(name: str, command: str) -> str:
    """A stage's row of the table.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = process.stdout.read().decode()
    _pid, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed: {command}\n{said[-3000:]}")
    print(f"$ python {command}\n{said.strip().splitlines()[-1]}\n", flush=True)
    return f"| {name} | {time.monotonic() - began:.0f} | {usage.ru_maxrss / 1e6:.1f} |"


if __name__ == "__main__":
    main()
