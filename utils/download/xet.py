"""Xet storage: hf_xet fetches a file, the proof stays ours."""

from huggingface_hub import get_hf_file_metadata
from huggingface_hub.file_download import xet_get

from configs.messages import _
from utils.download.display import Display
from utils.download.huggingface import HuggingFaceSource
from utils.download.listing import RemoteFile
from utils.download.part import PartFile
from utils.download.source import Source


def fetch_by_xet(source: Source, file: RemoteFile, part: PartFile, display: Display) -> bool:
    """Have hf_xet fill the part file. False, with the reason said, where it can't: plain HTTP will do it then."""
    if not isinstance(source, HuggingFaceSource):
        return False
    try:
        metadata = get_hf_file_metadata(
            source.url(file), token=source.token or False, timeout=source.timeout, endpoint=source.endpoint
        )
        if metadata.xet_file_data is None:
            return False
        xet_get(
            incomplete_path=part.path,
            xet_file_data=metadata.xet_file_data,
            headers=source.headers,
            expected_size=file.size,
            displayed_filename=file.path,
        )
    except Exception as error:  # hf_xet raises kinds of its own; whatever it is, HTTP is the way out
        display.note(_("{file}: hf_xet failed ({error}); fetching over HTTP", file=file.path, error=error))
        return False
    part.adopt()
    display.advance(file.path, file.size)
    return True
