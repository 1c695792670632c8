"""Settings of model_download.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.messages import _

SIZE_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass
class DownloadConfig:
    """Download a model from Hugging Face, one of its mirrors or ModelScope, and prove every byte of it.

    Steps: list the files, see what is here already, fetch the rest, prove it.
    """

    repo_id: str = ""
    """Which repository, as owner/name. Only --verify_only with --local_dir does without."""
    revision: str = "main"
    """Branch, tag or commit. It is pinned to a commit before the first byte, so that all files belong together."""
    repo_type: Literal["model", "dataset", "space"] = "model"
    """What kind of repository it is."""
    include: list[str] = field(default_factory=list)
    """Fetch only files that match one of these patterns, such as `*.json`. Switches off the choice of safe formats."""
    exclude: list[str] = field(default_factory=list)
    """Leave out files that match one of these patterns."""
    local_dir: str = ""
    """Folder for the files; empty = ./models/<repo_id>."""
    endpoint: list[str] = field(default_factory=list)
    """Where to fetch from: huggingface, hf-mirror, modelscope, or an http(s) address that speaks Hugging Face's API.
    Give several and the next takes over when one fails. Empty = HF_ENDPOINT if it is set, else huggingface."""
    token: str = ""
    """Access token for the first --endpoint, and for no other host. Empty = for huggingface the one that HF_TOKEN or
    `hf auth login` holds, elsewhere none."""
    workers: int = 8
    """Connections at the same time; large files are fetched over several."""
    max_rate: str = ""
    """Most bytes a second in all, such as 500K or 2M; empty = no limit."""
    timeout: float = 20.0
    """Seconds without a byte, or nearly without, after which a connection is given up and tried anew."""
    give_up_after: float = 30.0
    """Minutes without any progress after which the program gives up with exit status 3; 0 = never."""
    use_xet: bool = False
    """Let the hf_xet library fetch the files that Hugging Face keeps in Xet storage. It needs another host to be
    reachable, and a file that was cut off starts anew; what it brings is proved in the same way."""
    verify_only: bool = False
    """Fetch nothing: prove the files that are here, against the folder's manifest or else the repository's list."""
    dry_run: bool = False
    """Fetch and write nothing: print what is here and what would be fetched."""
    json: bool = False
    """Print one JSON object a line for programs, instead of text."""

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return Path(self.local_dir or Path("models") / self.repo_id)

    @property
    def bytes_per_second(self) -> float | None:
        """`max_rate` as a number; None = no limit."""
        return _parse_size(self.max_rate) if self.max_rate else None

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        if not self.repo_id and not (self.verify_only and self.local_dir):
            yield _("Say what to download: --repo_id NousResearch/Llama-2-7b-hf")
        if self.repo_id and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.repo_id, re.ASCII):
            yield _("--repo_id {repo_id}: expected owner/name, as in the page's address", repo_id=self.repo_id)
        for endpoint in self.endpoint:
            if endpoint not in ("huggingface", "hf-mirror", "modelscope") and not re.match(r"https?://", endpoint):
                yield _(
                    "--endpoint {endpoint}: expected huggingface, hf-mirror, modelscope or an address that begins "
                    "with https://",
                    endpoint=endpoint,
                )
        if re.search(r"[^!-~]", self.token):
            yield _("--token holds a character that no token has; copy it anew")
        if self.max_rate and not _parse_size(self.max_rate):
            yield _("--max_rate {rate}: expected bytes a second, such as 500K or 2M", rate=self.max_rate)
        if not 1 <= self.workers <= 64:
            yield _("--workers {workers}: expected 1 to 64", workers=self.workers)
        if self.timeout <= 0:
            yield _("--timeout {timeout}: expected a number above 0", timeout=self.timeout)
        if self.give_up_after < 0:
            yield _("--give_up_after {minutes}: expected 0 or more minutes", minutes=self.give_up_after)
        if self.verify_only and self.dry_run:
            yield _("--verify_only and --dry_run exclude each other")


def _parse_size(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?(?:/s)?", text.strip(), re.IGNORECASE)
    return float(match[1]) * SIZE_UNITS[match[2].upper()] if match else None
