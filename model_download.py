"""Download a model over a bad line, go on after any interruption, and prove every byte.

    python model_download.py --repo_id NousResearch/Llama-2-7b-hf                        # into ./models/<repo_id>
    python model_download.py --repo_id NousResearch/Llama-2-7b-hf --endpoint hf-mirror   # a mirror; repeat for more
    python model_download.py --repo_id NousResearch/Llama-2-7b-hf --dry_run              # what would be fetched
    python model_download.py --local_dir ./models/NousResearch/Llama-2-7b-hf --verify_only

Interrupted? Run the same command again. Exit status: 0 done and proved; 2 you must change something (the message says
what); 3 the network failed for longer than --give_up_after: run the same command again to go on.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.command_line import configure, run_command
from configs.download import DownloadConfig
from configs.errors import Interrupted, NetworkGaveUpError, UserError, explained
from configs.messages import _
from utils.download.display import Display, make_display, readable_size
from utils.download.failover import open_sources
from utils.download.fetching import fetch
from utils.download.folder import check_room, listing_of_manifest, mark_proved, prove_existing
from utils.download.listing import Listing, check_folder, check_paths, select
from utils.download.manifest import STATE_FOLDER
from utils.download.options import TransferOptions
from utils.download.part import bytes_missing


@explained()
def main(**settings: Any) -> Path:
    """Prove what is here of a model, or download what is not; what `python model_download.py` does, for Python.

        folder = main(repo_id="NousResearch/Llama-2-7b-hf", endpoint=["hf-mirror", "modelscope"])

    Args:
        settings: the flags, by name; configs/download.py says what each means (`--help` lists them).

    Returns:
        The folder with the files.

    Raises:
        UserError: something has to be changed first; the message says what.
        NetworkGaveUpError: the network failed for longer than allowed; the same call goes on.
        Interrupted: Ctrl-C came; the same call goes on.
    """
    config = configure(DownloadConfig, settings)
    display = make_display(config.json)
    with reported(display):
        if config.verify_only:
            verify(config, display)
        else:
            download(config, display, TransferOptions.from_config(config))
    return config.folder


def download(config: DownloadConfig, display: Display, options: TransferOptions) -> None:
    """List the repository, see what of it is here, fetch the rest and prove it.

    Raises:
        UserError: something has to be changed first.
        NetworkGaveUpError: the network failed for longer than allowed.
    """
    with open_sources(config, display, options) as sources:
        listing = sources.pin(config.revision)
        wanted = choose_files(config, listing, display)
        if config.dry_run:
            show_plan(config, wanted, display)
            return
        manifest, missing = fetch(config, sources, listing, wanted, options, display)
        show_end(config, manifest.revision, wanted, missing, display)


def verify(config: DownloadConfig, display: Display) -> None:
    """Prove the files of a folder against its manifest, or where it has none against the repository's list.

    Raises:
        UserError: a file is missing or wrong, or there is nothing to compare with.
    """
    listing = listing_of_manifest(config)
    if listing is None:
        with open_sources(config, display, TransferOptions.from_config(config)) as sources:
            listing = sources.pin(config.revision)
            wanted = choose_files(config, listing, display)
    else:
        wanted, _duplicates = select(listing, config.include, config.exclude, safe_formats=False)
    here = prove_existing(config.folder, wanted, display)
    mark_proved(config.folder, wanted, here)
    wrong = sorted(wanted.without(here).files)
    if wrong:
        raise UserError(
            _(
                "{wrong} of {count} files in {folder} are missing or wrong: {names}\n"
                "Fetch them again by the same command without --verify_only (with --repo_id); what is right stays.",
                wrong=len(wrong),
                count=len(wanted.files),
                folder=config.folder,
                names=", ".join(wrong),
            )
        )
    display.note(
        _("All {count} files in {folder} are right.", count=len(wanted.files), folder=config.folder), event="done"
    )


def choose_files(config: DownloadConfig, listing: Listing, display: Display) -> Listing:
    """The wanted files of a listing, with a word about those that are left out.

    Raises:
        UserError: a name in the listing is dangerous, or no file is wanted.
    """
    check_paths(listing)
    wanted, duplicates = select(listing, config.include, config.exclude, safe_formats=config.repo_type == "model")
    check_folder(config.folder, wanted)
    if duplicates:
        display.note(
            _(
                "Left out, because the safetensors files hold the same weights: {names} ({size}). "
                "--include fetches them.",
                names=", ".join(duplicates),
                size=readable_size(sum(listing.files[path].size for path in duplicates)),
            ),
            event="left_out",
            files=duplicates,
        )
    if wanted.has_only_pickles():
        display.note(
            _("The weights come only as pickle files, which can run code when loaded: trust their owner first.")
        )
    return wanted


def show_plan(config: DownloadConfig, wanted: Listing, display: Display) -> None:
    """Say, file by file, what is here and what would be fetched."""
    here = prove_existing(config.folder, wanted, display)
    state = config.folder / STATE_FOLDER
    missing = {path: bytes_missing(state, file) for path, file in wanted.without(here).files.items()}
    for path, file in sorted(wanted.files.items()):
        left = missing.get(path, 0)
        state = _("already here") if path in here else _("{size} to fetch", size=readable_size(left))
        display.note(
            f"{readable_size(file.size):>12}  {path}  ({state})", event="plan", file=path, size=file.size, left=left
        )
    display.note(
        _(
            "{left} of {total} would be fetched into {folder}. Nothing was written.",
            left=readable_size(sum(missing.values())),
            total=readable_size(wanted.size),
            folder=config.folder,
        ),
        event="done",
    )
    check_room(config.folder, wanted.without(here))


def show_end(config: DownloadConfig, revision: str, wanted: Listing, missing: Listing, display: Display) -> None:
    """Say what was done."""
    display.note(
        _(
            "{folder} holds {count} files of {repo_id} ({size}), revision {revision}, every one proved by its hash. "
            "{fetched} files were fetched ({received} over the network).",
            folder=config.folder,
            count=len(wanted.files),
            repo_id=config.repo_id,
            size=readable_size(wanted.size),
            revision=revision,
            fetched=len(missing.files),
            received=readable_size(display.fetched),
        ),
        event="done",
        folder=str(config.folder),
        revision=revision,
        bytes_received=display.fetched,
    )


@contextmanager
def reported(display: Display) -> Iterator[None]:
    """Tell programs (--json) how it ended too, and people what to do after Ctrl-C or a fault of the system."""
    try:
        yield
    except (UserError, NetworkGaveUpError) as error:
        display.failure(str(error), error.exit_status)
        raise
    except KeyboardInterrupt:
        display.end()
        message = _("Stopped. What is here stays: run the same command again to go on.")
        raise Interrupted(signal.SIGINT, message) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        message = _("{error}. What is here stays: put it right and run the same command again.", error=error)
        display.failure(message, UserError.exit_status)
        raise UserError(message) from error


if __name__ == "__main__":
    run_command(main, DownloadConfig)
