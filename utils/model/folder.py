"""A base model's folder: is it whole, what is in its weight files, which model is it.

torch is imported when a tensor is read, and not before: a folder that is wrong is refused at once.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from utils.download.manifest import unfinished_files
from utils.files import read_json
from utils.model.digests import fingerprint_of, sampled_digest, whole_digest
from utils.model.families import FAMILIES, ROPE_KINDS, Rope, not_computed
from utils.model.tensor_files import is_whole, open_tensors, tensor_names

ADAPTER_CONFIG = "adapter_config.json"

READING_THREADS = 4
"""Threads that read rows: a disk answers several questions at once faster than one after another."""


class ModelFolder:
    """A checked folder with a Hugging Face config.json and its weights.

    Raises:
        UserError: the folder is missing, is something else, is only half there, or is of a kind that can't be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self._read_config()
        if unfinished := unfinished_files(self.path):
            raise self._half_there(unfinished)
        self.tensor_files = self._find_tensors()

    def _read_config(self) -> dict[str, Any]:
        path = self.path
        if not path.is_dir():
            parts = [part for part in path.parts if part not in (".", "models")]
            repo_id = "/".join(parts) if len(parts) == 2 and not path.is_absolute() else "NousResearch/Llama-2-7b-hf"
            raise UserError(
                _(
                    "There is no model folder {folder} (seen from {here}). Download it with\n"
                    "  python model_download.py --repo_id {repo_id}\n"
                    "or give the folder that you have.",
                    folder=path,
                    here=Path.cwd(),
                    repo_id=repo_id,
                )
            )
        config_file = path / "config.json"
        if not config_file.is_file():
            if (path / ADAPTER_CONFIG).is_file():
                raise UserError(
                    _(
                        "{folder} holds an adapter, not a base model. Give the base model that it was made for.",
                        folder=path,
                    )
                )
            raise UserError(_("{folder} is not a model folder: it has no config.json.", folder=path))
        config = read_json(config_file)
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise UserError(
                _(
                    "{folder} is a model of type {type}; this project trains {supported}.",
                    folder=path,
                    type=model_type,
                    supported=", ".join(FAMILIES),
                )
            )
        if found := not_computed(config):
            key, value = found
            raise UserError(
                _(
                    "{folder}: its config.json says {key}: {value}, which is not computed here. Take another model. "
                    "(Rotary embeddings are computed of the kinds {kinds}, with the numbers that each kind needs, over "
                    "whole heads and for all layers alike; layers attend to everything before a token or to a sliding "
                    "window.)",
                    folder=path,
                    key=key,
                    value=json.dumps(value),
                    kinds=", ".join(ROPE_KINDS),
                )
            )
        self._check_weights(config)
        return config

    def _check_weights(self, config: dict[str, Any]) -> None:
        """Refuse weights that can't be computed with."""
        if "quantization_config" in config:
            raise UserError(
                _(
                    "{folder} holds weights that are quantized already. Take the repository with the original weights; "
                    "--quantization (or --load_8bit, --load_4bit) quantizes them while loading.",
                    folder=self.path,
                )
            )

    def depends_on_length(self, tokens: int) -> bool:
        """Whether the angles of a text of so many tokens are others than those of a shorter one that begins alike."""
        unscaled = Rope.of(self.config).unscaled_length
        return unscaled is not None and tokens > unscaled

    def _find_tensors(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it; safetensors are preferred to .bin."""
        for index_name, single_name in (
            ("model.safetensors.index.json", "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            index, single = self.path / index_name, self.path / single_name
            if index.is_file():
                try:
                    weight_map = read_json(index)["weight_map"]
                    missing = sorted({name for name in weight_map.values() if not (self.path / name).is_file()})
                except (UserError, KeyError, TypeError, AttributeError) as error:
                    raise self._half_there([index_name]) from error
                if missing:
                    raise self._half_there(missing)
                found = {tensor: self.path / name for tensor, name in weight_map.items()}
            elif single.is_file():
                found = {}
            else:
                continue
            files = sorted(set(found.values())) or [single]
            broken = [file.name for file in files if not is_whole(file)]
            if broken:
                raise self._half_there(broken)
            return found or dict.fromkeys(tensor_names(single), single)
        raise self._half_there(["model.safetensors"])

    def _half_there(self, files: list[str]) -> UserError:
        return UserError(
            _(
                "{folder} is not whole: {files} missing or cut short. Run the download again; it fetches only what is "
                "missing:\n  python model_download.py --repo_id … --local_dir {folder}",
                folder=self.path,
                files=", ".join(files[:4]) + (" …" if len(files) > 4 else ""),
            )
        )

    def check_vocabulary(self, tokens: int) -> None:
        """Refuse a tokenizer that knows more tokens than the model has embeddings for.

        Raises:
            UserError: the tokenizer was laid into the folder of another model.
        """
        if tokens > self.config["vocab_size"]:
            raise UserError(
                _(
                    "{folder}: the tokenizer has {tokens} tokens, the model {embeddings}: it is not this model's "
                    "tokenizer. Take the tokenizer's files from the repository that the weights came from.",
                    folder=self.path,
                    tokens=tokens,
                    embeddings=self.config["vocab_size"],
                )
            )

    def check_frozen_layers(self, count: int) -> None:
        """Refuse to freeze so many layers that none would be left to train.

        Raises:
            UserError: the model has no more layers.
        """
        layers = self.config.get("num_hidden_layers", 32)  # what transformers takes for given
        if count >= layers:
            raise UserError(
                _(
                    "--num_freeze_layers {count}: the model has {layers} layers, so nothing would be left to train.",
                    count=count,
                    layers=layers,
                )
            )

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, tensor) of every weight, one at a time, on the CPU; nothing else stays in memory."""
        for file, names in self._names_by_file():
            with open_tensors(file) as tensors:
                for name in names:
                    yield name, tensors.get_tensor(name)

    def _names_by_file(self) -> list[tuple[Path, list[str]]]:
        by_file: dict[Path, list[str]] = {}
        for name, file in self.tensor_files.items():
            by_file.setdefault(file, []).append(name)
        return list(by_file.items())

    def tensor(self, name: str) -> Any:
        """One weight, on the CPU."""
        with open_tensors(self.tensor_files[name]) as tensors:
            return tensors.get_tensor(name)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Tensor name -> what tells this tensor from another; see sampled_digest. Of 13 GB it reads some 100 MB."""
        found: dict[str, str] = {}
        with ThreadPoolExecutor(READING_THREADS) as readers:
            for file, names in self._names_by_file():
                with open_tensors(file) as tensors:
                    # Tensors lie in the file, mapped into memory: what is read, is read from its beginning to its end.
                    mapped = {name: tensors.get_tensor(name) for name in names if self.is_weight(name)}
                    in_order = sorted(mapped, key=lambda name: mapped[name].data_ptr())
                    found |= zip(in_order, readers.map(sampled_digest, map(mapped.get, in_order)), strict=True)
        return found

    def sha256(self) -> dict[str, str]:
        """Tensor name -> SHA-256 of the whole tensor. It reads all weights, one tensor at a time."""
        return {name: whole_digest(tensor) for name, tensor in self.tensors() if self.is_weight(name)}

    def is_weight(self, name: str) -> bool:
        """Whether a tensor of the files counts: rotary frequencies and a tied head's second copy have no place."""
        is_copy = name == "lm_head.weight" and self.config.get("tie_word_embeddings", False)
        return not is_copy and not name.endswith("rotary_emb.inv_freq")

    def fingerprint(self) -> str:
        """What tells this base model from any other: one hash over the digests of its tensors.

        How the weights are shared out among files makes no difference.
        """
        return fingerprint_of(self.digests)

    def first_row_fingerprint(self) -> str:
        """What earlier versions knew a base model by: a hash over the first row of every weight."""
        import torch

        rows: dict[str, bytes] = {}
        for file, names in self._names_by_file():
            with open_tensors(file) as tensors:
                for name in names:
                    first_row = tensors.get_slice(name)[0:1]
                    rows[name] = hashlib.sha256(first_row.contiguous().view(torch.uint8).numpy().tobytes()).digest()
        digest = hashlib.sha256()
        for name in sorted(rows):
            digest.update(name.encode() + rows[name])
        return digest.hexdigest()

    @property
    def parameter_bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in set(self.tensor_files.values()))
