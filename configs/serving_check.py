"""Settings of the comparison of a server with our own engine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from configs.messages import _
from configs.serving import ModelConfig


@dataclass
class ServingCheckConfig(ModelConfig):
    """Ask a server (vLLM, LMDeploy, SGLang, llama.cpp, Ollama, api_stream.py) and our own engine the same, and compare.

    Exit status: 0 = they say the same, 2 = they do not, and the likely reason is named; 3 = the server does not answer.
    """

    endpoint: str = ""
    """Address of the server, with or without /v1 at its end: http://127.0.0.1:8000."""
    model: str = ""
    """Name of the model as the server knows it; left out, the first one that it lists."""
    prompts: str = ""
    """File of questions: a text with one in each line, or records as data has them (.json, .jsonl, .csv, .parquet);
    left out, a dozen questions on which servers part company."""
    max_new_tokens: int = 64
    """Longest answer that is compared, in tokens."""
    tolerance: float = 0.1
    """Mean difference of log-probabilities that still counts as the same; 1 lets 8-bit and most 4-bit weights pass."""
    api_key: str = ""
    """Key that the server asks for; left out, that of the variable OPENAI_API_KEY."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    report: str = ""
    """File for all that was found, as JSON."""

    @property
    def key(self) -> str:
        """The key, wherever it is from; '' = none."""
        return (self.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()

    def problems(self) -> Iterator[str]:
        """What is missing or out of range."""
        yield from ModelConfig.problems(self)
        if not _is_address(self.endpoint):
            yield _("--endpoint {value}: an address that begins with http:// or https://", value=self.endpoint)
        for name in ("max_new_tokens", "tolerance", "timeout"):
            if getattr(self, name) <= 0:
                yield _("--{name} {value}: must be above 0", name=name, value=getattr(self, name))
        if not (self.key.isascii() and self.key.isprintable()):
            yield _("--api_key (or OPENAI_API_KEY): no key has such characters; it is sent in a header of HTTP")
        if self.report and not Path(self.report).absolute().parent.is_dir():
            yield _("--report {value}: there is no such folder", value=self.report)


def _is_address(text: str) -> bool:
    """Whether a text is an address of HTTP."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without their ends, or a port that is none
        return False
