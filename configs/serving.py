"""Settings of chat and serving, and of how the next token is chosen."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from configs.messages import _
from configs.quantization import Quantization

DEFAULT_BASE_MODEL = "./models/NousResearch/Llama-2-7b-hf"
DEFAULT_ADAPTER = "./output/model"


def _within(default: Any, **bounds: float) -> Any:
    """A field of numbers within bounds, named as in Python's operator module: ge (at least), gt, le (at most), lt."""
    return field(default=default, metadata={"bounds": bounds})


@dataclass
class Sampling:
    """How the next token is chosen, and how many there may be.

    Each field's metadata has its `bounds`; the HTTP interface makes its own fields from them.
    """

    max_new_tokens: int = _within(512, ge=1)
    """Longest answer, in tokens."""
    temperature: float = _within(0.7, ge=0, le=100)
    """Lower is more certain; 0 = always the likeliest token."""
    top_p: float = _within(0.9, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability; 1 = no limit."""
    top_k: int = _within(40, ge=0)
    """Choose among so many of the likeliest tokens; 0 = no limit."""
    repetition_penalty: float = _within(1.0, gt=0, le=100)
    """Above 1, tokens that have occurred become less likely."""
    seed: int | None = _within(None, ge=0, lt=2**63)
    """The same seed gives the same answer; without one, each answer is drawn anew."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        for each in fields(Sampling):
            value, bounds = getattr(self, each.name), each.metadata["bounds"]
            if value is not None and not all(getattr(operator, name)(value, bound) for name, bound in bounds.items()):
                yield _out_of_bounds(each.name, value, **bounds)


def _out_of_bounds(
    name: str, value: float, ge: float = 0, gt: float | None = None, le: float | None = None, lt: int | None = None
) -> str:
    if gt is not None:
        return _("{name} {value}: must be above {least} and at most {most}", name=name, value=value, least=gt, most=le)
    if lt is not None:
        bits = lt.bit_length() - 1
        return _("{name} {value}: must be from {least} to 2^{bits} - 1", name=name, value=value, least=ge, bits=bits)
    if le is not None:
        return _("{name} {value}: must be from {least} to {most}", name=name, value=value, least=ge, most=le)
    return _("{name} {value}: must be at least {least}", name=name, value=value, least=ge)


@dataclass
class ModelConfig:
    """Which model answers."""

    base_model: str = ""
    """Folder of the base model, or of a whole tuned model; left out, the one that the adapter was trained over, or
    without an adapter ./models/NousResearch/Llama-2-7b-hf."""
    lora_weights: str = DEFAULT_ADAPTER
    """Folder of the adapter; '' = the base model alone."""
    load_8bit: bool = False
    """Hold the base model in int8: half the memory."""
    load_4bit: bool = False
    """Hold the base model in NF4: a quarter of the memory."""

    @property
    def quantization(self) -> Quantization | None:
        """The two flags as one setting."""
        return "8bit" if self.load_8bit else "4bit" if self.load_4bit else None

    def problems(self) -> Iterator[str]:
        """Which settings do not go together."""
        if self.load_8bit and self.load_4bit:
            yield _("--load_8bit and --load_4bit exclude each other: choose one")
        yield from ()


@dataclass
class ChatConfig(Sampling, ModelConfig):
    """Talk to a model in the terminal, or ask it one question with --prompt."""

    prompt: str | None = field(default=None, metadata={"any_text": True})
    """Answer this on standard output, and end."""
    system: str = field(default="", metadata={"any_text": True})
    """What the model is told before the conversation: the system message."""

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        yield from ModelConfig.problems(self)
        yield from ("--" + problem for problem in Sampling.problems(self))


@dataclass
class ApiConfig(Sampling, ModelConfig):
    """Serve a model over HTTP: POST /stream, repeated until the answer ends in [stop].

    The sampling flags are the defaults of requests that do not give their own.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = reachable from other machines."""
    port: int = 8000
    """Port to listen on."""

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        yield from ModelConfig.problems(self)
        yield from ("--" + problem for problem in Sampling.problems(self))
        if not 0 <= self.port < 65536:
            yield _("--port {value}: must be from 0 to 65535", value=self.port)
