"""What the tests of model_download.py share: a download from the hub that misbehaves, and whether it came out right."""

from collections import Counter

from soak_download import FILES, OPTIONS

import model_download
from configs.download import DownloadConfig
from helpers.fake_hub import content
from utils.download.display import Display
from utils.download.manifest import unfinished_files

SEED = 7


class Notes(Display):
    """Keeps what was said."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def show_note(self, text, event, values):
        self.notes.append((event, text))

    @property
    def events(self):
        return Counter(event for event, _text in self.notes)


def fetch(folder, *endpoints, options=OPTIONS, **settings):
    """Download; gives the display with what was said and counted."""
    settings = {"repo_id": "owner/model", "give_up_after": 0.05, "local_dir": str(folder), **settings}
    config = DownloadConfig(endpoint=list(endpoints), **settings)
    assert not list(config.problems())
    display = Notes()
    model_download.download(config, display, options)
    return display


def assert_right(folder, paths=FILES, seed=SEED):
    for path in paths:
        assert (folder / path).read_bytes() == content(path, FILES[path]["size"], seed), path
    assert unfinished_files(folder) == []
    assert not list(folder.rglob("*.part"))
