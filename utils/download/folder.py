"""The model's folder: its lock, its manifest, what is in it already, and whether there is room for the rest."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
from huggingface_hub.utils import WeakFileLock

from configs.download import DownloadConfig
from configs.errors import UserError
from configs.messages import _
from utils.download.display import Display, readable_size
from utils.download.listing import Listing, RemoteFile
from utils.download.manifest import MANIFEST_NAME, STATE_FOLDER, Manifest, ManifestEntry
from utils.download.part import bytes_missing, part_path
from utils.download.proof import has_digest
from utils.files import free_space

READING_THREADS = 2
SPARE_BYTES = 64 * 1024**2
"""Room to leave on the disk for everything else."""


@contextlib.contextmanager
def locked(folder: Path, display: Display) -> Iterator[None]:
    """Have the folder to ourselves; a second download of the same repository waits, and then finds it done."""
    state = folder / STATE_FOLDER
    state.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(state / "lock", timeout=0.2))
        except filelock.Timeout:
            display.note(
                _("Another download is writing into {folder}; waiting for it.", folder=folder), event="waiting"
            )
            stack.enter_context(WeakFileLock(state / "lock"))
        yield


def prove_existing(folder: Path, listing: Listing, display: Display) -> set[str]:
    """Read the files that are in the folder; the paths of those whose hash is right."""
    files = [file for file in listing.files.values() if (folder / file.path).is_file()]
    display.begin("check", _("Checking what is here"), sum(file.size for file in files))

    stop = threading.Event()

    def is_right(file: RemoteFile) -> bool:
        def read(count: int) -> None:
            display.advance(file.path, count)
            if stop.is_set():
                raise InterruptedError

        return has_digest(folder / file.path, file.size, file.algorithm, file.digest, read)

    with ThreadPoolExecutor(READING_THREADS) as readers:
        try:
            answers = {file.path: readers.submit(is_right, file) for file in files}
            while not all(answer.done() for answer in answers.values()):
                display.tick()
                time.sleep(0.02)
        finally:
            stop.set()  # Ctrl-C must not wait for the rest of the files
    display.end()
    return {path for path, answer in answers.items() if answer.result()}


def check_room(folder: Path, missing: Listing) -> None:
    """Refuse a download that the disk has no room for.

    Raises:
        UserError: the disk has less room than the files need.
    """
    needed = sum(bytes_missing(folder / STATE_FOLDER, file) for file in missing.files.values())
    free = free_space(folder)
    if needed and needed + SPARE_BYTES > free:
        raise UserError(
            _(
                "{needed} are still to be fetched into {folder}, but its disk has {free} free. Make room, or give a "
                "folder on another disk with --local_dir. Nothing was fetched.",
                needed=readable_size(needed),
                folder=folder,
                free=readable_size(free),
            )
        )


def remove_stale_parts(folder: Path, listing: Listing) -> None:
    """Remove part files of contents that the revision no longer has."""
    state = folder / STATE_FOLDER
    current = {part_path(state, file).stem for file in listing.files.values()}
    for path in state.iterdir():
        if path.suffix in (".part", ".journal") and path.stem not in current:
            path.unlink()


def begin_manifest(
    config: DownloadConfig, source: str, listing: Listing, wanted: Listing, proved: set[str]
) -> Manifest:
    """Note down what the folder is to hold, before the first byte: from now on it can be told from a finished one.

    Files of the same revision that an earlier run has fetched (with another --include) stay in the manifest.
    """
    files = {path: _entry(file, path in proved) for path, file in wanted.files.items()}
    with contextlib.suppress(ValueError):  # an unreadable manifest is replaced
        for path, entry in getattr(Manifest.read(config.folder), "files", {}).items():
            listed = listing.files.get(path)
            if listed is not None and _entry(listed, True) == entry and (config.folder / path).is_file():
                files.setdefault(path, entry)
    manifest = Manifest(config.repo_id, config.repo_type, listing.commit or config.revision, source, files)
    manifest.write(config.folder)
    return manifest


def listing_of_manifest(config: DownloadConfig) -> Listing | None:
    """The files that the folder's manifest says it holds; None where there is no manifest but a repository is named.

    Raises:
        UserError: there is nothing to compare the folder with, or it holds another repository.
    """
    folder = config.folder
    again = _("Run the same command without --verify_only (with --repo_id) to set it right.")
    if not folder.is_dir():
        raise UserError(_("There is no folder {folder}.", folder=folder))
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        raise UserError(_("{file} is damaged.", file=folder / MANIFEST_NAME) + " " + again) from error
    if manifest is None:
        if not config.repo_id:
            raise UserError(
                _(
                    "{folder} has no {manifest}, so it was not filled by model_download.py. Give --repo_id, and its "
                    "files are compared with the repository's list.",
                    folder=folder,
                    manifest=MANIFEST_NAME,
                )
            )
        return None
    if config.repo_id not in ("", manifest.repo_id):
        raise UserError(
            _("{folder} holds {found}, not {repo_id}.", folder=folder, found=manifest.repo_id, repo_id=config.repo_id)
        )
    files = {
        path: RemoteFile(path, entry.size, entry.algorithm, entry.digest, manifest.revision)
        for path, entry in manifest.files.items()
    }
    return Listing(manifest.revision, files)


def mark_proved(folder: Path, wanted: Listing, right: set[str]) -> None:
    """Note in the manifest, if there is one, which files have just been found right and which wrong."""
    manifest = Manifest.read(folder)
    if manifest is None:
        return
    for path in wanted.files:
        manifest.files[path].proved = path in right
    with contextlib.suppress(PermissionError):  # a folder that others own can be verified all the same
        manifest.write(folder)


def _entry(file: RemoteFile, proved: bool) -> ManifestEntry:
    return ManifestEntry(file.size, file.algorithm, file.digest, proved)
