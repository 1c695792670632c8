"""A whole model's files, as a hub repository would hold them."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.files import read_json, write_json
from utils.results.tokenizer_files import sentencepiece_as_json

INDEX = "model.safetensors.index.json"

SHARD_BYTES = 4e9
"""Largest file of a saved model."""


def stored_dtype(folder: Path) -> str:
    """The dtype of a base model's files, which a fully trained model is stored in as well."""
    config = read_json(folder / "config.json")
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
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if (folder / "tokenizer.model").is_file():
        _have_transformers_read_sentencepiece(folder, settings, tokenizer)
    settings.setdefault("bos_token", tokenizer.bos_token or None)
    settings.setdefault("eos_token", tokenizer.eos_token)
    settings["chat_template"] = template.chat_template(tokenizer.bos_token, tokenizer.eos_token)
    write_json(settings_file, settings)
    generation = {"bos_token_id": (tokenizer.bos_ids or [None])[0], "eos_token_id": sorted(tokenizer.stop_ids)}
    if (base / "generation_config.json").is_file():
        original = read_json(base / "generation_config.json")
        generation = {**original, "eos_token_id": generation["eos_token_id"]}
    write_json(folder / "generation_config.json", generation)


def _have_transformers_read_sentencepiece(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Give transformers the ids of a folder's tokenizer.model, through a tokenizer.json where one can hold them."""
    settings.setdefault("add_bos_token", bool(tokenizer.bos_ids))
    settings.setdefault("add_eos_token", False)
    exact = sentencepiece_as_json(folder, tokenizer.bos_token)
    if exact is None:
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        # What stands behind a special token begins with a space, as SentencePiece has it and training had it; otherwise
        # transformers would read the chat template's `<s>Below` as `B elow`.
        settings["legacy"] = True
        return
    exact.save(str(folder / "tokenizer.json"))
    settings.setdefault("unk_token", exact.model.unk_token)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one that takes tokenizer.json as it is
    # transformers would put these in the place of what tokenizer.json says of the same tokens.
    for name in ("legacy", "add_prefix_space", "added_tokens_decoder", "auto_map"):
        settings.pop(name, None)
    for name, value in settings.items():
        if isinstance(value, dict) and "content" in value:
            settings[name] = value["content"]
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
