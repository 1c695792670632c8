"""Weight files, safetensors or pickled, behind one interface."""

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open


class _PickledTensors:
    """A .bin file behind the interface of safetensors' safe_open."""

    def __init__(self, file: Path) -> None:
        import torch

        self.tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    def __enter__(self) -> "_PickledTensors":
        return self

    def __exit__(self, *_error: object) -> None:
        self.tensors = {}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Any:
        return self.tensors[name]

    get_slice = get_tensor


def open_tensors(file: Path) -> Any:
    """A weight file as a context manager with keys(), get_tensor(name) and get_slice(name)."""

    return safe_open(file, framework="pt") if file.suffix == ".safetensors" else _PickledTensors(file)


def tensor_names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def is_whole(file: Path) -> bool:
    """Whether a weight file was not cut short.

    A safetensors file (8 bytes, header, data) is as long as its own header says; a .bin file is a zip archive, whose
    directory stands at its end.
    """
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    size = file.stat().st_size
    with file.open("rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if header_size + 8 > size:
            return False
        try:
            header = json.loads(handle.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)
