"""A LoRA adapter merged into its base model, tensor by tensor."""

import errno
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from ft_datasets.prompt import PromptTemplate
from utils.files import free_space, read_json
from utils.model.adapters import LORA_SETTINGS, WITHOUT_EFFECT, adapter_file
from utils.model.digests import whole_digest
from utils.model.folder import ADAPTER_CONFIG, ModelFolder
from utils.model.lora_forward import row_lengths
from utils.model.quantization import is_quantized, rounded_weight
from utils.model.rounding import round_stochastically
from utils.model.tensor_files import open_tensors
from utils.results.adapter_folder import check_whole_base
from utils.results.model_files import make_readable, stored_dtype, write_model
from utils.results.quantized_folder import describe_quantized, quantized_tensors
from utils.runs.description import TRAINING_CONFIG

PREFIX = "base_model.model."
SAMPLED_ROWS = 256
"""Rows of a weight that tell how much of what is added to it a rounding leaves."""
ARRIVES = 0.95
"""As much of it as must be left."""

QUANTIZED_SHARD_GB = 1.0
"""Largest file of quantised weights. A shard's tensors, made among larger ones that go, take twice their bytes."""

MERGED_SETTINGS = LORA_SETTINGS.union(
    WITHOUT_EFFECT,
    "rank_pattern alpha_pattern exclude_modules layers_to_transform layers_pattern target_parameters bias".split(),
    "ensure_weight_tying loftq_config eva_config megatron_config megatron_core qalora_group_size".split(),
)
"""Settings of a LoRA with any value of which it is merged as PEFT computes it."""
INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
"""What A and B may have begun with; others (PiSSA, OLoRA, ...) took theirs out of the base's weights."""


class LoraDelta:
    """What an adapter adds to each weight of its base model.

    Raises:
        UserError: it is not a LoRA adapter, or one of a kind that can't be merged exactly.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / ADAPTER_CONFIG)
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise UserError(
                _(
                    "{folder} is an adapter of kind {kind}, which adds no weights that could be merged. Use it with "
                    "generate.py or api_stream.py as it is.",
                    folder=folder,
                    kind=kind,
                )
            )
        for setting in _not_computed(self.config):
            raise UserError(
                _("{folder}: adapters with {setting} can't be merged here.", folder=folder, setting=setting)
            )
        file = adapter_file(folder)
        if not file.is_file():
            raise UserError(_("{folder} has no adapter_model.safetensors: it is not whole.", folder=folder))
        with open_tensors(file) as tensors:
            self.tensors = {name.removeprefix(PREFIX): tensors.get_tensor(name) for name in list(tensors.keys())}
        self.unused = set(self.tensors)

    def apply(self, name: str, weight: torch.Tensor, quantization: Quantization | None) -> torch.Tensor:
        """The merged weight, in the dtype of `weight`."""
        replacement = self._take(name)  # modules_to_save: trained whole
        if replacement is None and name.endswith(".bias"):  # trained beside the matrices
            replacement = self._take(f"{name.removesuffix('.bias')}.base_layer.bias")
        if replacement is not None:
            return _in_place_of(weight, replacement, name)
        module = name.removesuffix(".weight")
        a, b = self._take(f"{module}.lora_A.weight"), self._take(f"{module}.lora_B.weight")
        saved = self._take(f"{module}.base_layer.weight")  # PEFT saves an adapted head whole
        if saved is not None:
            weight = _in_place_of(weight, saved, name)
        # As load_base_model quantises, whether or not the layer has an adapter.
        is_rounded = quantization and is_quantized(name, weight)
        base = rounded_weight(weight, quantization) if is_rounded else weight
        if a is None or b is None:
            return base.to(weight.dtype)
        _check_shape(weight, (b.shape[0], a.shape[1]), name)
        base = base.float()
        added = self._scale(module, a.shape[0]) * (b.float() @ a.float())
        magnitude = self._take(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            directed = base + added
            added = directed * (magnitude.float() / row_lengths(directed))[:, None] - base
        return rounded_sum(base, added, weight.dtype, seed=zlib.crc32(name.encode()))

    def check_all_used(self) -> None:
        """Refuse an adapter with weights for modules that the base model does not have."""
        if self.unused:
            raise UserError(
                _(
                    "The adapter in {folder} has weights for {name}, which this base model does not have.",
                    folder=self.folder,
                    name=sorted(self.unused)[0],
                )
            )

    def _take(self, name: str) -> torch.Tensor | None:
        self.unused.discard(name)
        return self.tensors.get(name)

    def _scale(self, module: str, rank: int) -> float:
        try:
            alpha = _pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
            return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        except (KeyError, TypeError, AttributeError, re.error) as error:  # the file was changed by hand
            setting = f"lora_alpha {self.config.get('lora_alpha')}, alpha_pattern {self.config.get('alpha_pattern')}"
            raise UserError(
                _("{folder}: adapters with {setting} can't be merged here.", folder=self.folder, setting=setting)
            ) from error


def _in_place_of(weight: torch.Tensor, saved: torch.Tensor, name: str) -> torch.Tensor:
    """A weight that the adapter holds whole, in the dtype of the base's."""
    _check_shape(weight, tuple(saved.shape), name)
    return saved.to(weight.dtype)


def _check_shape(weight: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(weight.shape) != shape:
        raise UserError(
            _(
                "{name} has shape {base} in the base model and {adapter} in the adapter: they do not belong together.",
                name=name,
                base=tuple(weight.shape),
                adapter=shape,
            )
        )


def _not_computed(config: dict[str, Any]) -> Iterator[str]:
    """The settings of an adapter that make it something else than W + scale * B A over the base's own W."""
    import peft

    usual = peft.LoraConfig().to_dict()
    for name, value in config.items():
        is_unusual = bool(value) and value != usual.get(name)
        if name == "init_lora_weights":
            is_unusual = isinstance(value, str) and value not in INITIALISATIONS
        if is_unusual and name not in MERGED_SETTINGS:
            yield f"{name} {value}" if isinstance(value, str) else name


def _pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's per-module settings: the first pattern that matches the end of the module's name counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def rounded_sum(base: torch.Tensor, added: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """base + added, both fp32, in `dtype`.

    What an adapter adds after few steps is smaller than the last bit of a bf16 weight: rounded to the nearest, most of
    it would be gone. Where it would, the sum is rounded up or down at random, which keeps the mean.

    Args:
        seed: of that; the same sum is always rounded alike.
    """
    total = base + added
    nearest = total.to(dtype)
    sample = slice(SAMPLED_ROWS)
    arriving = ((nearest[sample].float() - base[sample]) * added[sample]).sum() / added[sample].square().sum()
    if dtype == torch.bfloat16 and arriving < ARRIVES:  # nothing is lost of nothing: no number is smaller than 0 / 0
        return round_stochastically(total, seed)
    return nearest


def merge(
    base: ModelFolder,
    adapter: Path,
    output: Path,
    template: PromptTemplate,
    shard_gb: float,
    quantization: Quantization | None = None,
    save_quantized: Quantization | None = None,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write the merged model as a hub repository would hold it; the folder appears whole or not at all.

    Args:
        quantization: merge into the base's decoder weights as this quantization rounds them.
        save_quantized: as what to store the merged decoder weights; None = in the dtype of the base's.
        check: is given the folder that all is written in, before it becomes `output`; what it raises leaves nothing.

    Returns:
        Bytes of the weights.

    Raises:
        UserError: `output` holds something already, the disk is too small, or base and adapter do not belong together.
    """
    delta, output = LoraDelta(adapter), output.resolve()
    staging = output.with_name(output.name + ".unfinished")
    try:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(_("{folder} is not empty. Give another --output_dir, or remove it.", folder=output))
        if output.exists() and not output.is_dir():  # told before the work is done
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        free = free_space(staging)
        if free < base.parameter_bytes:
            raise UserError(
                _(
                    "The merged model needs {needed} GB, and the disk of {folder} has {free} GB left.",
                    needed=f"{base.parameter_bytes / 1e9:.1f}",
                    folder=output,
                    free=f"{free / 1e9:.1f}",
                )
            )
        tensors = _merged(base, delta, quantization)
        if save_quantized:
            tensors, shard_gb = quantized_tensors(tensors, save_quantized), min(shard_gb, QUANTIZED_SHARD_GB)
        size = write_model(base.path, tensors, staging, template, shard_gb * 1e9)
        if save_quantized:
            describe_quantized(staging, save_quantized, stored_dtype(base.path))
        delta.check_all_used()
        if (adapter / TRAINING_CONFIG).is_file():  # generate.py finds the prompt template there
            shutil.copyfile(adapter / TRAINING_CONFIG, staging / TRAINING_CONFIG)
        if check:
            check(staging)
        make_readable(staging)
        if output.is_dir():
            output.rmdir()
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            _("{folder} can't be written ({error}).", folder=output, error=getattr(error, "strerror", None) or error)
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return size


def _merged(
    base: ModelFolder, delta: LoraDelta, quantization: Quantization | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged tensors; at the end, a base model that is not throughout the adapter's own is refused."""
    sha256: dict[str, str] = {}
    with ThreadPoolExecutor(1) as hasher:
        for name, weight in base.tensors():
            digest = hasher.submit(whole_digest, weight) if base.is_weight(name) else None
            yield name, delta.apply(name, weight, quantization)
            if digest:
                sha256[name] = digest.result()
    check_whole_base(delta.folder, base, sha256)
