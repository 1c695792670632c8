"""The two ways to hold a frozen base model in fewer bits, as flags name them."""

from typing import Any, Literal

Quantization = Literal["8bit", "4bit"]

QUANTIZATION_FLAG: dict[str, Any] = {
    "bare": "8bit",
    "aliases": {"int8": "8bit", "8": "8bit", "true": "8bit", "nf4": "4bit", "4": "4bit", "false": None, "none": None},
}
"""Field metadata of `--quantization`: alone it means int8."""
