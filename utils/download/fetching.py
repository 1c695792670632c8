"""Some files of a listing -> a folder: what is there is proved, what is missing is fetched and proved."""

from configs.download import DownloadConfig
from utils.download.display import Display
from utils.download.failover import SourcePool
from utils.download.folder import begin_manifest, check_room, locked, prove_existing, remove_stale_parts
from utils.download.listing import Listing
from utils.download.manifest import Manifest
from utils.download.options import TransferOptions
from utils.download.transfer import Downloader


def fetch(
    config: DownloadConfig,
    sources: SourcePool,
    listing: Listing,
    wanted: Listing,
    options: TransferOptions,
    display: Display,
) -> tuple[Manifest, Listing]:
    """Have the wanted files in the configuration's folder, each proved by its hash.

    Args:
        listing: all files of the revision.
        wanted: those of them that are to be here.

    Returns:
        What the folder holds, and the files that were missing.

    Raises:
        UserError: the disk has too little room, or a file can't be had from any source.
        NetworkGaveUpError: the network failed for longer than allowed.
    """
    with locked(config.folder, display):
        here = prove_existing(config.folder, wanted, display)
        missing = wanted.without(here)
        check_room(config.folder, missing)
        remove_stale_parts(config.folder, listing)
        manifest = begin_manifest(config, sources.current.endpoint, listing, wanted, here)
        Downloader(sources, manifest, config.folder, options, display).run(missing)
    return manifest, missing
