"""ModelScope (modelscope.cn), by its public HTTP API."""

from urllib.parse import quote, urlencode

import httpx2
from huggingface_hub.utils import hf_raise_for_status

from configs.messages import _
from utils.download.errors import SourceError, TransientError
from utils.download.http import check_passing
from utils.download.listing import Listing, RemoteFile
from utils.download.source import Source


class ModelScopeSource(Source):
    """A repository at ModelScope, which keeps a history of its own, so the SHA-256 alone identifies a file."""

    LONGEST_LISTING = 3000
    """A list of this length may have been cut by the server, which does not say so."""

    def list_files(self, revision: str) -> Listing:
        revision = "master" if revision == "main" else revision
        query = urlencode({"Revision": revision, "Recursive": "True"})
        url = f"{self.endpoint}/api/v1/models/{quote(self.repo_id)}/repo/files?{query}"
        with self.refusals():
            answer = self.client.get(url, headers=self.headers)
            check_passing(answer)
            hf_raise_for_status(answer)
        try:
            items = answer.json()["Data"]["Files"]
            strange = [item["Path"] for item in items if item["Type"] not in ("blob", "tree")]
            blobs = [item for item in items if item["Type"] == "blob"]
            files = {
                item["Path"]: RemoteFile(item["Path"], int(item["Size"]), "sha256", item["Sha256"], item["Revision"])
                for item in blobs
            }
        except (ValueError, KeyError, TypeError) as error:
            raise TransientError(_("{host} sent a list that makes no sense", host=self.name)) from error
        if strange:
            raise SourceError(
                _(
                    "{host} lists {path}, which is a link or something stranger, not a file.",
                    host=self.name,
                    path=strange[0],
                )
            )
        if len(items) >= self.LONGEST_LISTING:
            raise SourceError(
                _(
                    "{host} lists no more than {count} files, and this repository may have more.",
                    host=self.name,
                    count=len(items),
                )
            )
        return Listing("", files)

    def url(self, file: RemoteFile) -> str:
        query = urlencode({"Revision": file.commit, "FilePath": file.path})
        return f"{self.endpoint}/api/v1/models/{quote(self.repo_id)}/repo?{query}"

    def list_like(self, pinned: Listing, revision: str) -> Listing:
        return self.list_files(revision)

    def check_answer(self, file: RemoteFile, headers: httpx2.Headers) -> None:
        """ModelScope's answers say nothing of the revision; the hash will tell."""
