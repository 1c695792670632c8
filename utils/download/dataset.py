"""A data set that lies on a hub -> the files of one split, of one commit, here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from configs.datasets import FROM_HUB, CustomDataset, FileDataset
from configs.download import DownloadConfig
from configs.errors import NetworkGaveUpError, UserError
from configs.messages import _
from ft_datasets.records import DataFiles, name_records
from utils.download.dataset_layout import HubData, choose_files, split_of
from utils.download.display import Display
from utils.download.listing import Listing, check_folder, check_paths
from utils.download.manifest import Manifest, unfinished_files
from utils.download.options import TransferOptions
from utils.quiet import hubs_allowed

FOLDER = Path("data")
"""Where data sets go, each into OWNER/NAME, as models go into ./models."""
CARD = "README.md"


def fetch_data(
    settings: FileDataset | CustomDataset, say: Callable[[str], None], options: TransferOptions | None = None
) -> DataFiles | None:
    """Have here what the settings name on a hub, beside what lies here; None where nothing is a hub's.

    What was fetched before is used as it is, without a network, so that a run goes on with the data that it began with.

    Raises:
        UserError: there is no such data set, configuration or split, or none in files that are read; or the network
            failed for too long.
    """
    if not isinstance(settings, FileDataset) or not any(path.startswith(FROM_HUB) for path in settings.paths):
        return None
    return DataFiles.joined(
        [
            _fetched(HubData.named(path), say, options) if path.startswith(FROM_HUB) else DataFiles((Path(path),))
            for path in settings.paths
        ]
    )


def _fetched(wanted: HubData, say: Callable[[str], None], options: TransferOptions | None) -> DataFiles:
    """The files of one data set of a hub."""
    folder = FOLDER / wanted.repository
    manifest = _manifest(wanted, folder)
    paths = _fetched_before(wanted, folder, manifest)
    if manifest and paths:
        say(_("{folder} holds commit {commit}; to fetch it anew, remove it.", folder=folder, commit=manifest.revision))
    else:
        revision = wanted.revision or (manifest.revision if manifest else "main")
        manifest, paths = _fetch(wanted, folder, revision, say, options)
    origin = {
        "repository": wanted.repository,
        "configuration": wanted.configuration,
        "split": wanted.split,
        "revision": manifest.revision,
    }
    return DataFiles(tuple(folder / path for path in paths), {name: value for name, value in origin.items() if value})


def _manifest(wanted: HubData, folder: Path) -> Manifest | None:
    """What the folder holds of the data set; None where that is nothing, or another revision."""
    try:
        manifest = Manifest.read(folder)
    except ValueError:
        return None
    if manifest is None or (manifest.repo_id, manifest.repo_type) != (wanted.repository, "dataset"):
        return None
    return manifest if wanted.revision in ("", manifest.revision) else None


def _fetched_before(wanted: HubData, folder: Path, manifest: Manifest | None) -> list[str]:
    """The files of the split, where all of them are here; a split is always fetched whole."""
    if manifest is None:
        return []
    card = _card(folder)
    try:
        paths = choose_files(wanted, [*manifest.files], card)
    except UserError:
        return []
    # A configuration that was named then and is not now may be one of several.
    is_named = wanted.configuration or "configs" in card or not any(folder for folder, _split in map(split_of, paths))
    return paths if is_named and not set(unfinished_files(folder)).intersection(paths) else []


def _fetch(
    wanted: HubData, folder: Path, revision: str, say: Callable[[str], None], options: TransferOptions | None
) -> tuple[Manifest, list[str]]:
    # Late: a run whose data lie here needs no network, nor the libraries for it.
    from utils.download.failover import open_sources
    from utils.download.fetching import fetch

    config = DownloadConfig(repo_id=wanted.repository, repo_type="dataset", revision=revision, local_dir=str(folder))
    options, display = options or TransferOptions.from_config(config), Display(say)
    try:
        with hubs_allowed(), open_sources(config, display, options) as sources:
            listing = sources.pin(revision)
            check_paths(listing)
            card = _part(listing, [CARD])
            check_folder(folder, card)
            if card.files:
                fetch(config, sources, listing, card, options, display)
            paths = choose_files(wanted, [*listing.files], _card(folder) if card.files else {})
            files = _part(listing, [CARD, *paths])
            check_folder(folder, files)
            manifest, _missing = fetch(config, sources, listing, files, options, display)
    except NetworkGaveUpError as error:
        by_hand = f"python model_download.py --repo_type dataset --repo_id {wanted.repository} --local_dir {folder}"
        advice = _("With other flags (--endpoint …) it can be fetched beforehand: {command}", command=by_hand)
        raise NetworkGaveUpError(f"{error}\n{advice}") from error
    say(
        _(
            "{data}, split {split}, commit {commit}: {files}",
            data=wanted,
            split=wanted.split,
            commit=manifest.revision,
            files=name_records(paths),
        )
    )
    return manifest, paths


def _part(listing: Listing, paths: Sequence[str]) -> Listing:
    return Listing(listing.commit, {path: listing.files[path] for path in paths if path in listing.files})


def _card(folder: Path) -> dict[str, Any]:
    """What the data set's card says to programs; nothing where it has none, or a broken one."""
    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return {}
