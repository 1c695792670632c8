"""A model in fewer bits on the disk, as transformers writes one that bitsandbytes has quantised, and loads it again."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.quantization import Quantization
from utils.files import read_json, write_json
from utils.model.folder import ModelFolder
from utils.model.quantization import NF4_BLOCK, is_quantized

SCALE, FORMAT = ".SCB", ".weight_format"
"""Ends of the names of an int8 weight's largest value a row, and of its layout."""
STATE = ".weight.quant_state.bitsandbytes__nf4"
"""End of the name of what an NF4 weight's other tensors are about."""


def quantized_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], kind: Quantization
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors, its decoder's linear layers as bitsandbytes stores them: several tensors for each weight."""
    for name, weight in tensors:
        if not is_quantized(name, weight):
            yield name, weight
        elif kind == "8bit":
            yield from _int8(name.removesuffix(".weight"), weight)
        else:
            yield from _nf4(name, weight)


def describe_quantized(folder: Path, kind: Quantization, dtype: str) -> None:
    """Say in a folder's config.json how its weights are quantised.

    Args:
        dtype: of the other weights, and of the computation.
    """
    # The keys, and the values of those without a meaning here, are BitsAndBytesConfig's.
    settings: dict[str, Any] = {
        "_load_in_4bit": kind == "4bit",
        "_load_in_8bit": kind == "8bit",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if kind == "4bit" else "fp4",
        "bnb_4bit_use_double_quant": kind == "4bit",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": kind == "4bit",
        "load_in_8bit": kind == "8bit",
        "quant_method": "bitsandbytes",
    }
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": settings})


class QuantizedFolder(ModelFolder):
    """A folder that holds what `quantized_tensors` gives; its tensors come back as they were before, rounded."""

    def tensor(self, name: str) -> torch.Tensor:
        """One weight, on the CPU; fp32 where it is quantised."""
        module = name.removesuffix(".weight")
        stored = super().tensor(name)
        if module + SCALE in self.tensor_files:
            return stored.float() * (super().tensor(module + SCALE) / 127)[:, None]
        if module + STATE not in self.tensor_files:
            return stored
        from bitsandbytes import functional

        names = [each for each in self.tensor_files if each.startswith(f"{name}.")]
        others = {each: ModelFolder.tensor(self, each) for each in names}
        state = functional.QuantState.from_dict(others, stored.device)
        state.dtype = torch.float32
        return functional.dequantize_4bit(stored, state)

    def _check_weights(self, config: dict[str, Any]) -> None:
        """Take weights that are quantised already."""


def _int8(module: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    largest = weight.float().abs().amax(dim=1)
    scaled = weight.float() * (127 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    yield f"{module}.weight", scaled.round().to(torch.int8)
    yield module + SCALE, largest
    yield module + FORMAT, torch.tensor(0, dtype=torch.uint8)  # row by row


def _nf4(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from bitsandbytes import functional

    # fp32 first: the same stored bits come out whatever dtype the weight has.
    packed, state = functional.quantize_4bit(
        weight.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    state.dtype = weight.dtype  # in which it is dequantised
    yield name, packed
    for each, tensor in state.as_dict(packed=True).items():
        yield f"{name}.{each}", tensor
