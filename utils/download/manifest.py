"""The manifest beside a model: which revision the folder holds, each file's hash, and whether it was proved.

No library beyond the standard one is imported here, so that the trainer can ask `unfinished_files` at no cost.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.files import write_durably

MANIFEST_NAME = "download_manifest.json"
STATE_FOLDER = ".download"
"""Holds, within the model's folder, the lock, .part files and their journals."""

HUGGINGFACE_STATE_FOLDER = Path(".cache") / "huggingface" / "download"
"""Where `hf download --local-dir` keeps its temporary files."""


@dataclass
class ManifestEntry:
    """What is known of one file. `algorithm` is sha256, or git-sha1 (a git blob's) for files outside LFS."""

    size: int
    algorithm: str
    digest: str
    proved: bool = False
    """The bytes on the disk have been read and have this digest."""


@dataclass
class Manifest:
    """The files of one revision of a repository that belong into a folder."""

    repo_id: str
    repo_type: str
    revision: str
    source: str
    files: dict[str, ManifestEntry]

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The folder's manifest; None where there is none.

        Raises:
            ValueError: it is there but unreadable.
        """
        try:
            values: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            files = {path: ManifestEntry(**entry) for path, entry in values.pop("files").items()}
            return cls(files=files, **values)
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(str(error)) from error

    def write(self, folder: Path) -> None:
        """Put the manifest into the folder; a power cut leaves the old one or the new one."""
        write_durably(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=2) + "\n")


def unfinished_files(folder: Path) -> list[str]:
    """Files of a downloaded model that are missing, cut short or unproved; empty for a folder that others filled.

    It looks at names and sizes only, in a few milliseconds.
    """
    try:
        manifest = Manifest.read(folder)
    except ValueError:
        return [MANIFEST_NAME]
    if manifest is None:
        leftovers = [
            *(folder / STATE_FOLDER).rglob("*.part"),
            *(folder / HUGGINGFACE_STATE_FOLDER).rglob("*.incomplete"),
        ]
        return sorted(str(path.relative_to(folder)) for path in leftovers)
    return [path for path, entry in manifest.files.items() if not entry.proved or _size(folder / path) != entry.size]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
