"""Weight files, safetensors or pickled, behind one interface."""

import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from utils.files import safetensors_problem


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
        return self.tensors[name].detach()  # some files hold parameters

    get_slice = get_tensor


def open_tensors(file: Path) -> Any:
    """A weight file as a context manager with keys(), get_tensor(name) and get_slice(name)."""
    return safe_open(file, framework="pt") if file.suffix == ".safetensors" else _PickledTensors(file)


def tensor_names(file: Path) -> list[str]:
    """The names of all tensors of a weight file."""
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def is_whole(file: Path) -> bool:
    """Whether a weight file was not cut short; a .bin file is a zip archive, whose directory stands at its end."""
    return safetensors_problem(file) is None if file.suffix == ".safetensors" else zipfile.is_zipfile(file)
