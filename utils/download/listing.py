"""What is to be fetched: a revision's files, checked for dangerous names and cut down to those that are wanted."""

import difflib
import fnmatch
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from configs.errors import UserError
from configs.messages import _
from utils.download.manifest import MANIFEST_NAME, STATE_FOLDER

SAFE_FORMAT = ".safetensors"
DUPLICATE_FORMATS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data")
"""The same weights in formats that can run code when loaded, or for other frameworks."""
PICKLE_FORMATS = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a revision, with what proves it."""

    path: str
    size: int
    algorithm: str
    """sha256, or git-sha1 for the files that a hub keeps outside LFS."""
    digest: str
    commit: str
    """The commit to ask the source for."""

    def same_content(self, other: "RemoteFile | None") -> bool:
        """Whether size and hash say that both hold the same bytes."""
        mine = (self.size, self.algorithm, self.digest)
        return other is not None and mine == (other.size, other.algorithm, other.digest)


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    commit: str
    """Empty where the source has no commit in common with the others; then each file's hash alone identifies it."""
    files: dict[str, RemoteFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def without(self, paths: set[str]) -> "Listing":
        """The files that are not among `paths`."""
        return Listing(self.commit, {path: file for path, file in self.files.items() if path not in paths})

    def has_only_pickles(self) -> bool:
        """Whether the weights come only in a format that can run code when loaded."""
        return any(path.endswith(PICKLE_FORMATS) for path in self.files) and not any(
            path.endswith(SAFE_FORMAT) for path in self.files
        )


def check_paths(listing: Listing) -> None:
    """Refuse a listing with a name that would be written outside of the folder, or over our own files.

    Raises:
        UserError: there is such a name.
    """
    for path in listing.files:
        parts = path.split("/")
        windows = PureWindowsPath(path)
        harmless = (
            path.isprintable()
            and not any(part in ("", ".", "..") for part in parts + list(windows.parts))
            and not PurePosixPath(path).is_absolute()
            and not windows.drive
            and not windows.root
            and path != MANIFEST_NAME
            and parts[0] != STATE_FOLDER
            and not any(str(parent) in listing.files for parent in PurePosixPath(path).parents)
        )
        if not harmless:
            raise UserError(
                _(
                    "The repository's list of files holds the name {path!r}, which must not be written. Nothing was "
                    "fetched. Don't use this repository, or tell its owner.",
                    path=path,
                )
            )


def check_folder(folder: Path, listing: Listing) -> None:
    """Refuse to write through a link: the files would land outside of the folder.

    Raises:
        UserError: a folder on the way to a file is a link, or a file stands where a folder is needed.
    """
    for parent in sorted({folder / parent for path in listing.files for parent in PurePosixPath(path).parents}):
        if parent == folder:
            continue
        if parent.is_symlink():
            raise UserError(
                _("{path} is a link: files would be written outside of the folder. Remove it.", path=parent)
            )
        if parent.exists() and not parent.is_dir():
            raise UserError(_("{path} is a file, but the repository has a folder there. Move it away.", path=parent))


def select(listing: Listing, include: list[str], exclude: list[str], safe_formats: bool) -> tuple[Listing, list[str]]:
    """The wanted part of a listing, and the files left out because safetensors hold the same weights.

    Raises:
        UserError: nothing is left.
    """
    wanted = {
        path: file
        for path, file in listing.files.items()
        if (not include or _matches(path, include)) and not _matches(path, exclude)
    }
    duplicates = []
    if safe_formats and not include:
        safe_folders = {PurePosixPath(path).parent for path in wanted if path.endswith(SAFE_FORMAT)}
        for path in list(wanted):
            if path.endswith(DUPLICATE_FORMATS) and safe_folders.intersection(PurePosixPath(path).parents):
                duplicates.append(path)
                del wanted[path]
    if not wanted:
        near = [difflib.get_close_matches(pattern, listing.files, n=3, cutoff=0.3) for pattern in include]
        names = ", ".join(dict.fromkeys(name for names in near for name in names)) or ", ".join([*listing.files][:10])
        raise UserError(
            _(
                "No file of the repository matches --include and --exclude. There are, among others: {names}",
                names=names,
            )
        )
    return Listing(listing.commit, wanted), duplicates


def _matches(path: str, patterns: list[str]) -> bool:
    # A pattern that ends with a slash means the whole folder, as in `hf download`.
    return any(fnmatch.fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)
