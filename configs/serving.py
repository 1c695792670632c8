"""Settings of chat, serving, merging and converting."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from configs.messages import _
from configs.quantization import Quantization

DEFAULT_BASE_MODEL = "./models/NousResearch/Llama-2-7b-hf"
DEFAULT_ADAPTER = "./output/model"


@dataclass
class Sampling:
    """How the next token is chosen, and how many there may be."""

    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """Lower is more certain; 0 = always the likeliest token."""
    top_p: float = 0.9
    """Choose among the likeliest tokens that together have this probability; 1 = no limit."""
    top_k: int = 40
    """Choose among so many of the likeliest tokens; 0 = no limit."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have occurred become less likely."""
    seed: int | None = None
    """The same seed gives the same answer; without one, each answer is drawn anew."""

    def problems(self) -> Iterator[str]:
        """What is out of range."""
        if self.max_new_tokens < 1:
            yield _("max_new_tokens {value}: must be at least 1", value=self.max_new_tokens)
        if not 0 <= self.temperature <= 100:
            yield _("temperature {value}: must be from 0 to 100", value=self.temperature)
        if not 0 < self.top_p <= 1:
            yield _("top_p {value}: must be above 0 and at most 1", value=self.top_p)
        if self.top_k < 0:
            yield _("top_k {value}: must be at least 0", value=self.top_k)
        if not 0 < self.repetition_penalty <= 100:
            yield _("repetition_penalty {value}: must be above 0 and at most 100", value=self.repetition_penalty)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield _("seed {value}: must be from 0 to 2^63 - 1", value=self.seed)


@dataclass
class _ModelConfig:
    """Which model answers."""

    base_model: str = DEFAULT_BASE_MODEL
    """Folder of the base model, or of a whole tuned model."""
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
class ChatConfig(Sampling, _ModelConfig):
    """Talk to a model in the terminal, or ask it one question with --prompt."""

    prompt: str | None = field(default=None, metadata={"any_text": True})
    """Answer this on standard output, and end."""

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        yield from _ModelConfig.problems(self)
        yield from ("--" + problem for problem in Sampling.problems(self))


@dataclass
class ApiConfig(Sampling, _ModelConfig):
    """Serve a model over HTTP: POST /stream, repeated until the answer ends in [stop].

    The sampling flags are the defaults of requests that do not give their own.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = reachable from other machines."""
    port: int = 8000
    """Port to listen on."""

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        yield from _ModelConfig.problems(self)
        yield from ("--" + problem for problem in Sampling.problems(self))
        if not 0 <= self.port < 65536:
            yield _("--port {value}: must be from 0 to 65535", value=self.port)
