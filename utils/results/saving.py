"""What a run hands over: PEFT's or transformers' own files, and beside them how they were made."""

import json
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.model.adapters import TRAINING_CONFIG

UNFINISHED = ".saving"
"""Folder within the output folder where a result is written before it takes its place."""
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4e9
"""Largest file of a saved model."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "sentencepiece", "tokenizers", "safetensors")


def describe_run(
    config: TrainingConfig, tokenizer: Tokenizer, template: PromptTemplate, base_fingerprint: str
) -> dict[str, Any]:
    """What training_config.json holds: every resolved setting and all that the adapter's user must do alike."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "settings": asdict(config),
        "prompt_template": template.to_dict(),
        "bos_ids": tokenizer.bos_ids,
        "eos_id": tokenizer.eos_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "base_model_fingerprint": base_fingerprint,
        "versions": versions,
    }


def write_training_config(folder: Path, description: dict[str, Any]) -> None:
    """Write training_config.json at a run's start; it is whole at any instant."""
    staging = folder / (TRAINING_CONFIG + ".new")
    _write_json(staging, description)
    staging.replace(folder / TRAINING_CONFIG)


def save_result(
    config: TrainingConfig,
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    description: dict[str, Any],
    card: str,
) -> None:
    """Hand a run's result over into its output folder: an adapter, or the whole model with its tokenizer.

    Each file appears whole or not at all.

    Args:
        tensors: (parameter name, tensor), whole and on the CPU: the adapter's, or all of a model's. A model's are taken
            one at a time and written before the next file's are asked for.
    """
    folder = Path(config.output_dir)
    staging = folder / UNFINISHED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if config.use_peft:
        model.save_pretrained(str(staging), state_dict=dict(tensors))
    else:
        base = Path(config.model_name)
        dtype = getattr(torch, stored_dtype(base))
        template = PromptTemplate(**description["prompt_template"])
        write_model(base, ((name, tensor.to(dtype)) for name, tensor in tensors), staging, template, SHARD_BYTES)
    (staging / "README.md").write_text(card, encoding="utf-8")
    _write_json(staging / TRAINING_CONFIG, description)
    make_readable(staging)
    # training_config.json goes last: its `trained_steps` says that the files beside it are this run's.
    for file in sorted(staging.iterdir(), key=lambda file: file.name == TRAINING_CONFIG):
        file.replace(folder / file.name)
    staging.rmdir()


def stored_dtype(folder: Path) -> str:
    """The dtype of a base model's files, which a fully trained model is stored in as well."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def write_model(
    base: Path, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, template: PromptTemplate, shard_bytes: float
) -> int:
    """Write a model as a hub repository would hold it, with its base's tokenizer; returns the weights' bytes."""
    size = write_shards(tensors, folder, shard_bytes)
    copy_tokenizer(base, folder, template)
    shutil.copyfile(base / "config.json", folder / "config.json")
    return size


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: float) -> int:
    """Write safetensors files of at most `shard_bytes` (and at least one tensor) with their index.

    No more than one file's tensors are in memory at a time. Returns the bytes of all.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, str(folder / f"shard-{len(shards)}"), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    count = len(shards)
    if count == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        (folder / f"shard-{number - 1}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def make_readable(folder: Path) -> None:
    """Give the files of a folder the usual permissions; safetensors makes its own readable by their owner alone."""
    for file in folder.iterdir():
        file.chmod(0o644)


def copy_tokenizer(base: Path, folder: Path, template: PromptTemplate) -> None:
    """Give a saved model its base's tokenizer and generation settings, and the chat template of its training."""
    tokenizer = Tokenizer(base)
    for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    if (folder / "tokenizer.model").is_file():
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        settings.setdefault("add_bos_token", bool(tokenizer.bos_ids))
        settings.setdefault("add_eos_token", False)
        settings.setdefault("legacy", False)
    settings.setdefault("bos_token", tokenizer.bos_token or None)
    settings.setdefault("eos_token", tokenizer.eos_token)
    settings["chat_template"] = template.chat_template(tokenizer.bos_token, tokenizer.eos_token)
    _write_json(settings_file, settings)
    generation = {"bos_token_id": (tokenizer.bos_ids or [None])[0], "eos_token_id": sorted(tokenizer.stop_ids)}
    if (base / "generation_config.json").is_file():
        original = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
        generation = {**original, "eos_token_id": generation["eos_token_id"]}
    _write_json(folder / "generation_config.json", generation)


def chat_command(config: TrainingConfig) -> str:
    """The command that talks to a run's result."""
    base, adapter = (config.model_name, config.output_dir) if config.use_peft else (config.output_dir, "")
    quantized = {"8bit": " --load_8bit", "4bit": " --load_4bit"}.get(config.quantization or "", "")
    return f"python generate.py --base_model {shlex.quote(base)} --lora_weights {shlex.quote(adapter)}{quantized}"


def model_card(config: TrainingConfig, facts: dict[str, str]) -> str:
    """README.md of an adapter or a model: how it was made and how to use it, in a form that hubs understand."""
    library = "peft" if config.use_peft else "transformers"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\nbase_model: {config.model_name}\nlanguage: zh\n"
        f"pipeline_tag: text-generation\n---\n\n# {Path(config.output_dir).resolve().name}\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n"
        + _(
            "Every setting, the prompt template's exact text and the package versions are in `{file}`.",
            file=TRAINING_CONFIG,
        )
        + f"\n\n```bash\n{chat_command(config)}\n```\n"
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
